"""The products of a linear layer, ``x W^T``, ``dy W`` and ``dy^T x``, in the dtype that is fastest where the tensors lie.

A CPU without 16-bit matrix units multiplies bf16 and fp16 at little more than half the speed of fp32 (measured: 165 against
300 GFLOP/s on two cores with avx512_bf16 and no AMX). There both factors are widened, a block of the weight's rows at a time,
and the product stays fp32 until its user rounds it once. Everywhere else the product has the factors' dtype.

torch multiplies fp32 by MKL, which on AMD's Zen 5 reaches half of what the core can: 113 GFLOP/s where oneDNN, which torch brings along
too, makes 250 (one core, 512 x 512 x 1024 and larger, torch 2.13); on Zen 4 oneDNN is a tenth faster. There :func:`product` calls oneDNN
through the operator that torch's compiler calls, as torch has no public name for it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from mindspeed_lora.device import cpu_multiplies_fast, mkl_leaves_units_idle

_FEW_ROWS = 64  # widening would only add to what the weight costs
_THIN = 64  # up to here a sum of products is passes over the result, and oneDNN's needs one of its own
_CACHED_ELEMENTS = 1 << 18  # of rows that two products in turn take: 1 MiB of fp32, half of a core's second-level cache
_BLOCK_ELEMENTS = 1 << 22  # of a weight widened at once: 16 MiB, which the allocator keeps


def widens(device_type: str, dtype: torch.dtype) -> bool:
    """Whether many rows of ``dtype`` become fp32 where they are multiplied on this machine."""
    return device_type == "cpu" and dtype.itemsize == 2 and not cpu_multiplies_fast(dtype)


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """dtype of the products of ``x`` (rows on all dims but the last) with a weight of the same dtype."""
    if x.numel() < _FEW_ROWS * x.shape[-1] or not widens(x.device.type, x.dtype):
        return x.dtype
    return torch.float32


def wide_rows(x: torch.Tensor) -> torch.Tensor:
    """``[..., k] -> [n, k]`` in the dtype of its products: no copy but on a CPU that multiplies in fp32."""
    rows = x.reshape(-1, x.shape[-1])
    return rows.to(product_dtype(rows))


def goes_to_onednn(x: torch.Tensor) -> bool:
    """Whether :func:`product` multiplies ``x`` by oneDNN, not by torch's own choice."""
    return x.dtype == torch.float32 and x.device.type == "cpu" and mkl_leaves_units_idle()


def _by_onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor | None) -> torch.Tensor:
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.contiguous()  # gaps between its rows make oneDNN a thousand times slower
    y = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return y if out is None else out.copy_(y)


def product(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """``left right`` of one dtype: ``[m, k], [k, n] -> [m, n]``, or into ``out``."""
    return _by_onednn(left, right.t(), None, out) if goes_to_onednn(left) else torch.mm(left, right, out=out)


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """``total += scale * left right`` in place, all of one dtype; returns ``total`` ``[m, n]``."""
    if left.shape[1] > _THIN and goes_to_onednn(left):
        return total.add_(product(left, right), alpha=scale)
    return total.addmm_(left, right, alpha=scale)


def in_cached_rows(x: torch.Tensor, *others: torch.Tensor) -> Iterable[tuple[torch.Tensor, ...]]:
    """x ``[m, k]`` and ``others`` ``[m, ...]`` in rows to multiply at a time: where MKL makes fp32 products, as many of x as a CPU's
    caches hold; else all.
    """
    if x.device.type != "cpu" or product_dtype(x).itemsize < 4 or goes_to_onednn(x):
        return [(x, *others)]
    size = max(1, _CACHED_ELEMENTS * torch.get_num_threads() // x.shape[1])
    return zip(*(rows.split(size) for rows in (x, *others)), strict=True)


def add_outer(total: torch.Tensor | None, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``total + left^T right``, in place; None: nothing yet. left ``[m, r]``, right ``[m, k]`` -> ``[r, k]``."""
    return product(left.t(), right) if total is None else add_product(total, left.t(), right)


def _row_blocks(weight: torch.Tensor) -> list[slice]:
    size = max(1, _BLOCK_ELEMENTS // weight.shape[1])
    return [slice(start, start + size) for start in range(0, weight.shape[0], size)]


def times_transposed(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """``x W^T (+ bias)``: x ``[m, k]``, weight ``[n, k]``, bias ``[n]`` -> ``[m, n]`` in x's dtype, or into ``out``, rounded to its dtype.

    x is in the weight's dtype, or was widened to :func:`product_dtype`.
    """
    if x.dtype == weight.dtype:
        if goes_to_onednn(x):
            return _by_onednn(x, weight, bias, out)
        return torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias, x, weight.t(), out=out)
    y = x.new_empty(x.shape[0], weight.shape[0]) if out is None or out.dtype != x.dtype else out
    for rows in _row_blocks(weight):
        product(x, weight[rows].to(x.dtype).t(), y[:, rows])
    if bias is not None:
        y.add_(bias)
    return y if out is None or out is y else out.copy_(y)


def times(dy: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """``dy W``: dy ``[m, n]``, weight ``[n, k]`` -> ``[m, k]``, dtypes as in :func:`times_transposed`."""
    if dy.dtype == weight.dtype:
        return product(dy, weight, out)
    dx = dy.new_empty(dy.shape[0], weight.shape[1]) if out is None or out.dtype != dy.dtype else out
    for number, rows in enumerate(_row_blocks(weight)):
        block = weight[rows].to(dy.dtype)
        add_product(dx, dy[:, rows], block) if number else product(dy[:, rows], block, dx)
    return dx if out is None or out is dx else out.copy_(dx)


def transposed_times(dy: torch.Tensor, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``dy^T x``: dy ``[m, n]``, x ``[m, k]`` of one dtype -> ``[n, k]`` in ``dtype``, rounded a block of rows at a time."""
    if dtype == x.dtype:
        return product(dy.t(), x)
    outer = x.new_empty(dy.shape[1], x.shape[1], dtype=dtype)
    for rows in _row_blocks(outer):
        outer[rows] = product(dy[:, rows].t(), x)
    return outer
