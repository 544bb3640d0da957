"""Every kernel against its eager reference in float64: values, gradients, and what is kept for backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mindspeed_lora import ops
from mindspeed_lora.ops import cpu, cpu_attention, cuda, eager, few_rows, fused, products

KERNELS: dict[str, tuple[tuple[int, ...], Callable[[Any], tuple[Any, ...]]]] = {
    "rms_norm": ((5, 2, 3, 8), lambda draw: (draw(8), 1e-3)),
    "rotate": ((5, 2, 3, 8), lambda draw: (draw(5, 1, 1, 8), draw(5, 1, 1, 8))),
    "swiglu": ((5, 2, 12), lambda draw: ()),
}


def _draw(seed: int) -> Callable[..., torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)


def _gradients(function: Callable[..., torch.Tensor], x: torch.Tensor, rest: tuple[Any, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    inputs = [value.detach().to(dtype, copy=True).requires_grad_() if isinstance(value, torch.Tensor) else value for value in (x, *rest)]
    y = function(*inputs)
    y.backward(_draw(7)(*y.shape).to(dtype))
    trained = inputs[:2] if function.__name__ == "rms_norm" else inputs[:1]
    return [y.detach(), *(value.grad for value in trained)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("module", [fused, cpu, cuda, ops], ids=lambda module: module.__name__.rpartition(".")[2])
@pytest.mark.parametrize("name", KERNELS)
def test_kernel_equals_eager(name: str, module: Any, dtype: torch.dtype, tolerance: float) -> None:
    shape, more = KERNELS[name]
    draw = _draw(0)
    x, rest = draw(*shape), more(draw)
    expected = _gradients(getattr(eager, name), x, rest, torch.float64)
    for got, want in zip(_gradients(getattr(module, name), x, rest, dtype), expected, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


def test_fused_kernels_keep_their_input_and_no_more() -> None:
    draw = _draw(1)
    for name, (shape, more) in KERNELS.items():
        kept: list[torch.Tensor] = []
        x = draw(*shape).float().requires_grad_()
        rest = tuple(value.float() if isinstance(value, torch.Tensor) else value for value in more(draw))
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor, kept=kept: kept.append(tensor) or tensor, lambda tensor: tensor):
            getattr(fused, name)(x, *rest)
        own = [
            tensor
            for tensor in kept
            if tensor.data_ptr() not in {x.data_ptr(), *(r.data_ptr() for r in rest if isinstance(r, torch.Tensor))}
        ]
        assert sum(tensor.numel() for tensor in own) == (x.numel() // x.shape[-1] if name == "rms_norm" else 0)


@pytest.mark.parametrize("length", [8, 40])
def test_cpu_attention_in_16_bit_is_attention_in_fp32(length: int) -> None:
    draw = _draw(2)
    query, key, value = draw(2, 4, length, 8).bfloat16(), draw(2, 2, length, 8).bfloat16(), draw(2, 2, length, 8).bfloat16()
    want = eager.attention(query.double(), key.double(), value.double())
    got = ops.attention(query, key, value)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), want, rtol=2e-2, atol=2e-2)
    ends = [[3, length], [length]]
    torch.testing.assert_close(
        ops.document_attention(query, key, value, ends).double(),
        eager.document_attention(query.double(), key.double(), value.double(), ends),
        rtol=2e-2,
        atol=2e-2,
    )


@pytest.mark.parametrize("takes_groups", [False, True])
def test_attention_on_a_cpu_never_makes_the_scores(takes_groups: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Grouped queries too, where torch's flash attention wants a key for each (2.7): nothing of ``[b, n, s, s]`` is kept."""
    if not takes_groups:
        monkeypatch.setattr(cpu_attention, "flash_takes_groups", lambda: False)
    draw, length = _draw(9), 128
    query, key, value = (draw(1, heads, length, 8).float().requires_grad_() for heads in (4, 2, 2))
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        got = ops.attention(query, key, value)
    got.square().sum().backward()
    assert max(tensor.numel() for tensor in kept) <= 4 * length * 8
    wide = [tensor.detach().double().requires_grad_() for tensor in (query, key, value)]
    eager.attention(*wide).square().sum().backward()
    for one, other in zip((query, key, value), wide, strict=True):
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wide", [False, True])
def test_products_round_once_and_write_where_they_are_told(wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Widened on a CPU without 16-bit matrix units, in several blocks of the weight's rows; as they are where it has them."""
    monkeypatch.setattr(products, "cpu_multiplies_fast", lambda dtype: not wide)
    monkeypatch.setattr(products, "_BLOCK_ELEMENTS", 100)
    draw = _draw(3)
    x, weight, bias = draw(70, 24).bfloat16(), draw(40, 24).bfloat16(), draw(40).bfloat16()
    rows = x.to(products.product_dtype(x))
    assert rows.dtype == (torch.float32 if wide else torch.bfloat16)
    both = torch.zeros(70, 50, dtype=torch.bfloat16)
    products.times_transposed(rows, weight, bias, out=both[:, :40])
    torch.testing.assert_close(both[:, :40].double(), x.double() @ weight.double().t() + bias.double(), rtol=1e-2, atol=2e-2)
    assert not both[:, 40:].any()
    back = torch.zeros(70, 50, dtype=torch.bfloat16)
    products.times(both[:, :40].to(rows.dtype), weight, out=back[:, 26:])
    want = products.times_transposed(rows, weight, bias).bfloat16().double() @ weight.double()
    assert not back[:, :26].any()
    torch.testing.assert_close(back[:, 26:].double(), want, rtol=1e-2, atol=1.0)
    assert products.product_dtype(x[:8]) == torch.bfloat16  # a few rows: reading the weight is the cost


@pytest.mark.parametrize("trained", [False, True])
def test_a_widened_linear_is_exact_to_one_rounding_and_keeps_little(trained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU without 16-bit matrix units, in several blocks: y, dx, dW and the bias's gradient, and x kept only for dW."""
    monkeypatch.setattr(products, "cpu_multiplies_fast", lambda dtype: False)
    monkeypatch.setattr(products, "_BLOCK_ELEMENTS", 100)
    draw = _draw(8)
    x, weight, bias, dy = draw(35, 2, 24).bfloat16(), draw(40, 24).bfloat16(), draw(40).bfloat16(), draw(35, 2, 40).bfloat16()
    inputs = [x.requires_grad_(), weight.requires_grad_(trained), bias.requires_grad_(trained)]
    wide = [value.detach().double().requires_grad_(value.requires_grad) for value in inputs]
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        got = ops.linear(*inputs)
    want = torch.nn.functional.linear(*wide)
    got.backward(dy)
    want.backward(dy.double())
    assert {tensor.data_ptr() for tensor in kept} == {value.data_ptr() for value in ((x, weight) if trained else (weight,))}
    pairs = [(got, want), *((one.grad, other.grad) for one, other in zip(inputs, wide, strict=True) if one.requires_grad)]
    for one, other in pairs:
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one.double(), other, rtol=2**-8, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(ops.linear(x, weight, bias), got)


@torch.no_grad()
def test_without_gradients_the_kernels_say_the_same() -> None:
    for name, (shape, more) in KERNELS.items():
        draw = _draw(4)
        x, rest = draw(*shape).float(), tuple(value.float() if isinstance(value, torch.Tensor) else value for value in more(draw))
        with torch.enable_grad():
            want = getattr(eager, name)(x, *rest)
        torch.testing.assert_close(getattr(ops, name)(x, *rest), want, rtol=1e-6, atol=1e-6)
    heads, weights = draw(2, 4, 3, 8).float(), draw(3, 8).float()  # generation: a row of weights for each head
    torch.testing.assert_close(ops.rms_norm(heads, weights, 1e-3), eager.rms_norm(heads, weights, 1e-3), rtol=1e-6, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 3, 4, 8, 11, 12, 16, 17])
@pytest.mark.parametrize("outputs", [128, 129])  # whole blocks of outputs, or not
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("by_onednn", [False, True])
def test_products_of_a_few_rows(rows: int, outputs: int, dtype: torch.dtype, by_onednn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "mkl_leaves_units_idle", lambda: by_onednn)
    draw, (rtol, atol) = _draw(5), (1e-5, 1e-5) if dtype == torch.float32 else (1e-2, 5e-2)
    x, weight, bias = draw(1, rows, 24).to(dtype), draw(outputs, 24).to(dtype), draw(outputs).to(dtype)
    got = ops.linear(x, weight, bias)
    assert got.shape == (1, rows, outputs) and got.dtype == dtype
    want = x.double() @ weight.double().t() + bias.double()
    torch.testing.assert_close(got.double(), want, rtol=rtol, atol=atol)
    torch.testing.assert_close(ops.linear(x, weight).double(), want - bias.double(), rtol=rtol, atol=atol)
    if rows == 1 and dtype == torch.float32:
        vector = x.view(-1)
        torch.testing.assert_close(few_rows.times_vector(weight, vector, bias, 0.5), (want - bias).view(-1).float() / 2 + bias)
        torch.testing.assert_close(few_rows.times_vector(weight, vector, scale=0.5), (want - bias).view(-1).float() / 2)
