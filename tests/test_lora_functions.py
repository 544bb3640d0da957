"""Fused and plain LoRA layers against one float64 linear layer: values, all gradients, and the number of collectives."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mindspeed_lora.device import cpu_multiplies_fast
from mindspeed_lora.ops import products
from mindspeed_lora.parallel import collectives
from mindspeed_lora.parallel.context import ParallelContext, build_context

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from collective_counts import counted  # the benchmarks are no package

SEQUENCE, BATCH, HIDDEN, FFN, RANK = 8, 2, 12, 16, 3
SCALE = 2.0


def _tensors(sequence: int = SEQUENCE, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "w1": (FFN, HIDDEN),
        "a1": (RANK, HIDDEN),
        "b1": (FFN, RANK),
        "w2": (HIDDEN, FFN),
        "a2": (RANK, FFN),
        "b2": (HIDDEN, RANK),
        "x": (sequence, BATCH, HIDDEN),  # behind the weights, which do not depend on its length
        "dy": (sequence, BATCH, HIDDEN),
    }
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for name, shape in shapes.items()}


def _reference(sequence: int = SEQUENCE, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """In float64, over values rounded to ``dtype``."""
    drawn = _tensors(sequence, dtype).items()
    t = {name: value.double().requires_grad_(name in ("x", "a1", "b1", "a2", "b2")) for name, value in drawn}
    hidden = torch.tanh(t["x"] @ (t["w1"] + SCALE * t["b1"] @ t["a1"]).t())
    y = hidden @ (t["w2"] + SCALE * t["b2"] @ t["a2"]).t()
    y.backward(t["dy"])
    return {"y": y.detach(), **{name: t[name].grad for name in ("x", "a1", "b1", "a2", "b2")}}


def _pair(context: ParallelContext, fusion: bool, dtype: torch.dtype = torch.float64) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A column and a row layer with LoRA, holding this rank's part of the tensors."""
    from mindspeed_lora.lora.layers import ParallelLoraLinear
    from mindspeed_lora.parallel.layers import ColumnParallelLinear, RowParallelLinear

    t, size, rank = _tensors(), context.tp_size, context.tp_rank
    column = ColumnParallelLinear(HIDDEN, FFN, context, dtype=dtype)
    row = RowParallelLinear(FFN, HIDDEN, context, dtype=dtype)
    layers = []
    for base, (w, a, b), (w_dim, a_dim, b_dim) in ((column, ("w1", "a1", "b1"), (0, None, 0)), (row, ("w2", "a2", "b2"), (1, 1, None))):
        layer = ParallelLoraLinear(base, "default", r=RANK, lora_alpha=SCALE * RANK)
        layer.fusion = fusion
        base.weight.requires_grad_(False)
        targets = ((base.weight, w, w_dim), (layer.lora_A["default"].weight, a, a_dim), (layer.lora_B["default"].weight, b, b_dim))
        for parameter, name, dim in targets:
            parameter.data.copy_(t[name] if dim is None else t[name].chunk(size, dim)[rank])
        layers.append(layer)
    return layers[0], layers[1]


def _frozen_calls(tp_size: int) -> list[tuple[str, int]]:
    """The same pair with its adapters off: what the frozen base alone communicates."""
    context = build_context(torch.device("cpu"), tp_size, 1, True)
    t = _tensors()
    column, row = _pair(context, True)
    for layer in (column, row):
        layer.enable_adapters(False)
    x = t["x"].chunk(tp_size, 0)[context.tp_rank].clone().requires_grad_()
    with counted() as calls:
        row(torch.tanh(column(x))).backward(t["dy"].chunk(tp_size, 0)[context.tp_rank])
    return calls


def _run_pair(
    tp_size: int, sequence_parallel: bool, fusion: bool, sequence: int = SEQUENCE, dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    context = build_context(torch.device("cpu"), tp_size, 1, sequence_parallel)
    t = _tensors(sequence, dtype)
    local = (lambda value: value.chunk(tp_size, 0)[context.tp_rank]) if context.sequence_parallel else (lambda value: value)
    column, row = _pair(context, fusion, dtype)
    x = local(t["x"]).clone().requires_grad_()
    with counted() as calls:
        y = row(torch.tanh(column(x)))
        y.backward(local(t["dy"]))
    grads = {
        name: layer.get_parameter(f"{part}.default.weight").grad
        for layer, name, part in ((column, "a1", "lora_A"), (column, "b1", "lora_B"), (row, "a2", "lora_A"), (row, "b2", "lora_B"))
    }
    collectives.all_reduce(grads["a1"], context.tp_group)  # grad_sum "always"
    if context.sequence_parallel:
        collectives.all_reduce(grads["b2"], context.tp_group)  # grad_sum "sp"
    return {"y": y.detach(), "x": x.grad, **grads, "calls": calls}


def _assemble(results: list[dict[str, Any]], sequence_parallel: bool) -> dict[str, torch.Tensor]:
    """Whole tensors from the ranks' parts."""
    whole = {}
    for name, dim in (
        ("y", 0 if sequence_parallel else None),
        ("x", 0 if sequence_parallel else None),
        ("a1", None),
        ("b1", 0),
        ("a2", 1),
        ("b2", None),
    ):
        parts = [result[name] for result in results]
        if dim is None:
            assert all(torch.equal(part, parts[0]) for part in parts), f"{name} differs between tp ranks"
            whole[name] = parts[0]
        else:
            whole[name] = torch.cat(parts, dim)
    return whole


@pytest.mark.parametrize("fusion", [False, True])
@pytest.mark.parametrize(("tp_size", "sequence_parallel"), [(1, False), (2, False), (2, True), (4, True)])
def test_pair_equals_one_linear(pool: Any, tp_size: int, sequence_parallel: bool, fusion: bool) -> None:
    results = pool.run(_run_pair, tp_size, tp_size, sequence_parallel, fusion)
    got = _assemble(results, sequence_parallel)
    for name, expected in _reference().items():
        torch.testing.assert_close(got[name], expected, rtol=1e-11, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(("tp_size", "sequence_parallel", "sequence"), [(1, False, 40), (2, False, 40), (2, True, 40), (2, True, 80)])
def test_bf16_of_many_rows_is_within_its_rounding(pool: Any, tp_size: int, sequence_parallel: bool, sequence: int) -> None:
    """From 64 rows on a CPU may multiply in fp32 (40 x 2 cut over two ranks: the whole alone has as many); lost terms are 30 % and more."""
    results = pool.run(_run_pair, tp_size, tp_size, sequence_parallel, True, sequence, torch.bfloat16)
    got = _assemble(results, sequence_parallel)
    tolerance = 0.04 if cpu_multiplies_fast(torch.bfloat16) else 0.02  # there u and its gradient are rounded to bf16 too
    for name, expected in _reference(sequence, torch.bfloat16).items():
        assert float((got[name].double() - expected).norm() / expected.norm()) < tolerance, name


@pytest.mark.parametrize(("dtype", "sequence", "tolerance"), [(torch.float64, SEQUENCE, 1e-11), (torch.bfloat16, 40, 0.02)])
def test_gradients_summed_over_a_few_rows_at_a_time(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, sequence: int, tolerance: float
) -> None:
    """Five or three rows of the 16 (80) at a time, and fewer in the end; in bf16 where its products are made in fp32."""
    monkeypatch.setattr(products, "cpu_multiplies_fast", lambda dtype: False)
    monkeypatch.setattr(products, "_CACHED_ELEMENTS", 5 * HIDDEN // torch.get_num_threads())
    assert len(list(products.in_cached_rows(_tensors(sequence, dtype)["dy"].flatten(0, 1)))) > 1
    got = _run_pair(1, False, True, sequence, dtype)
    for name, expected in _reference(sequence, dtype).items():
        assert float((got[name].double() - expected).norm() / expected.norm()) < tolerance, name


def _kept_bytes(tp_size: int) -> tuple[int, int]:
    """(bytes whose memory the pair keeps for its backward pass beside parameters and inputs, those that it has to)."""
    context = build_context(torch.device("cpu"), tp_size, 1, True)
    t = _tensors()
    column, row = _pair(context, True)
    x = t["x"].chunk(tp_size, 0)[context.tp_rank].clone().requires_grad_()
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    own = {tensor.untyped_storage().data_ptr() for tensor in (x, *column.parameters(), *row.parameters())}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        middle = column(x)
        y = row(middle)
    inputs = {middle.untyped_storage().data_ptr(), *own}
    rank = column.lora_A["default"].weight.shape[0], row.lora_A["default"].weight.shape[0]
    tokens = y.shape[0] * y.shape[1]
    return sum(size for place, size in kept.items() if place not in inputs), y.itemsize * tokens * (tp_size * rank[0] + rank[1])


def test_beside_its_input_a_layer_keeps_u_alone(pool: Any) -> None:
    for kept, needed in pool.run(_kept_bytes, 2, 2):
        assert kept == needed


def test_fused_pair_makes_the_frozen_pairs_collectives(pool: Any) -> None:
    """SP: all-gather + reduce-scatter each way; beyond the frozen pair only the r-wide parts of the two reduce-scatters."""
    calls = pool.run(_run_pair, 2, 2, True, True)[0]["calls"]
    tokens, width = SEQUENCE * BATCH, 8
    local = tokens // 2
    assert calls == [
        ("all_gather", local * HIDDEN * width),
        ("reduce_scatter", tokens * (HIDDEN + RANK) * width),
        ("all_gather", local * HIDDEN * width),
        ("reduce_scatter", tokens * (HIDDEN + RANK) * width),
    ]
    frozen = pool.run(_frozen_calls, 2, 2)[0]
    assert [kind for kind, _ in frozen] == [kind for kind, _ in calls]
    assert sum(size for _, size in calls) - sum(size for _, size in frozen) == 2 * tokens * RANK * width
