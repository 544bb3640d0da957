"""Causal bf16 attention by products of whole matrices against float64, its pieces forced to be small."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mindspeed_lora import ops
from mindspeed_lora.ops import cpu, cpu_attention, eager

Draw = Callable[..., torch.Tensor]


@pytest.fixture
def draw() -> Draw:
    """``[b, n, s, d]`` in bf16 as a layer has it, permuted from ``[s, b, n, d]``, with a gradient."""
    generator = torch.Generator().manual_seed(0)

    def make(heads: int, length: int, width: int = 16, spread: float = 1.0) -> torch.Tensor:
        values = spread * torch.randn(length, 2, heads, width, generator=generator)
        return values.bfloat16().permute(1, 2, 0, 3).requires_grad_()

    return make


@pytest.fixture(params=[0, 256], ids=["by products", "by flash attention"])
def forward(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How few queries are attended forward."""
    monkeypatch.setattr(cpu_attention, "_FLASH", request.param)


def _results(attention: Callable[..., torch.Tensor], inputs: list[torch.Tensor], dy: torch.Tensor) -> list[torch.Tensor]:
    y = attention(*inputs)
    return [y.detach().double(), *(grad.double() for grad in torch.autograd.grad(y, inputs, dy.to(y.dtype)))]


def _assert_as_in_float64(inputs: list[torch.Tensor], tolerance: float, scale: float | None = None) -> None:
    query, value = inputs[0], inputs[2]
    dy = torch.randn(*query.shape[:3], value.shape[3], generator=torch.Generator().manual_seed(1)).bfloat16()
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    got = _results(lambda q, k, v: cpu_attention.causal_attention(q, k, v, scale), inputs, dy)
    want = _results(lambda q, k, v: eager.attention(q, k, v, scale=scale), exact, dy)
    for name, one, other in zip(("y", "dq", "dk", "dv"), got, want, strict=True):
        error = float((one - other).norm() / other.norm())
        assert error < tolerance, (name, error)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("length", "queries", "scores"), [(40, 256, 1 << 21), (40, 16, 1 << 21), (40, 16, 700), (37, 8, 1), (2, 8, 8)])
def test_every_piece_is_attention(groups: int, length: int, queries: int, scores: int, draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    """One piece, several of queries, of groups, one group each; a last one that is shorter."""
    monkeypatch.setattr(cpu_attention, "_QUERIES", queries)
    monkeypatch.setattr(cpu_attention, "_SCORES", scores)
    _assert_as_in_float64([draw(4, length), draw(groups, length), draw(groups, length, 24)], 1e-2)


@pytest.mark.usefixtures("forward")
def test_heads_may_lie_in_any_order(draw: Draw) -> None:
    """Gradients are written through views, which a copy would lose."""
    for order in ((0, 1, 2, 3), (1, 0, 2, 3), (2, 1, 0, 3), (3, 1, 0, 2)):
        back = sorted(range(4), key=order.__getitem__)
        inputs = [draw(heads, 40).detach().permute(order).contiguous().permute(back).requires_grad_() for heads in (4, 2, 2)]
        _assert_as_in_float64(inputs, 1e-2)


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.usefixtures("forward")
def test_scores_may_be_large(scale: float | None, draw: Draw) -> None:
    """Of some hundred, where bf16 alone has steps of 1: what the query attends to most is as sure as in small scores."""
    _assert_as_in_float64([draw(4, 40, spread=20.0), draw(2, 40), draw(2, 40)], 3e-2, scale)


@pytest.mark.usefixtures("forward")
def test_a_key_ahead_takes_no_part_however_large(draw: Draw) -> None:
    """The last key's score is 2000 above all others for every query; before it, scores are -1000 (dq: 0.03 by flash attention)."""
    query, key, value = draw(2, 20), draw(2, 20), draw(2, 20)
    with torch.no_grad():
        query[..., 0] = 100.0
        key[..., 0] = -40.0
        key[:, :, -1, 0] = 40.0
    _assert_as_in_float64([query, key, value], 0.1)


@pytest.mark.usefixtures("forward")
def test_nothing_as_large_as_the_scores_is_kept(draw: Draw) -> None:
    inputs = [draw(4, 128), draw(2, 128), draw(2, 128)]
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        cpu_attention.causal_attention(*inputs, None)
    assert max(tensor.numel() for tensor in kept) == inputs[0].numel()
    assert sum(tensor.numel() for tensor in kept) == 2 * inputs[0].numel() + 2 * inputs[1].numel() + inputs[0].numel() // 16


def test_it_is_taken_where_it_pays(draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16, many queries, plainly causal, as many keys, each document of a packed row; all else is flash attention's."""
    taken: list[int] = []

    def counted(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> torch.Tensor:
        taken.append(query.shape[2])
        return cpu_attention.causal_attention(query, key, value, scale)

    monkeypatch.setattr(cpu, "causal_attention", counted)
    monkeypatch.setattr(cpu, "small_bf16_products_are_slow", lambda: True)
    long, keys, short = draw(4, 100), draw(2, 100), draw(4, 20)
    ops.attention(long, keys, keys)
    ops.document_attention(long, keys, keys, [[70, 100], [100]])
    assert taken == [100, 70, 100]
    mask = torch.ones(100, 100, dtype=torch.bool).tril()
    ops.attention(long, keys, keys, mask)
    ops.attention(long, keys, keys, is_causal=False)
    ops.attention(long.float(), keys.float(), keys.float())
    ops.attention(short, short, short)
    ops.attention(long[:, :, -70:], keys, keys, mask[-70:])
    monkeypatch.setattr(cpu, "small_bf16_products_are_slow", lambda: False)
    ops.attention(long, keys, keys)
    assert len(taken) == 3
