"""The kernels of a CPU without gradients, which asks, scores or generates: made for a few rows in fp32.

A step reads every weight once, so a product should take no longer than that. MKL's ``x W^T`` does for 2 and 3 rows; from 4 on it takes
a multiple, and one row is slower than its product of a matrix and a vector. The table shows ms for the products of
benchmarks/decode_speed.py (166 MB) on one core of a Xeon, where reading takes 7:

| rows | x W^T | (W x^T)^T | blocks of 64 outputs, each a product of one batch |
|------|-------|-----------|---------------------------------------------------|
| 1    | 9     | 7.2       | 8                                                 |
| 2    | 8     | 17        | 9                                                 |
| 4    | 19    | 22        | 13                                                |
| 8    | 21    | 17        | 15                                                |
| 16   | 24    | 21        | 31                                                |

Where oneDNN multiplies fp32 faster than MKL (:mod:`~mindspeed_lora.ops.products`), it does so for every number of rows: on one core of
an EPYC (Zen 5), for a weight of 32,000 x 512, 1 row takes 2.4 ms in place of 4.3, 8 rows 4.5 in place of 6.6, 63 rows 11 in place of 23.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mindspeed_lora.ops import eager
from mindspeed_lora.ops.products import goes_to_onednn, times_transposed

_BLOCK = 64  # outputs
_FIRST_BLOCKED, _FIRST_TRANSPOSED, _FIRST_PLAIN = 4, 12, 17  # rows


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """See :func:`mindspeed_lora.ops.eager.linear`."""
    rows = x.numel() // x.shape[-1]
    if goes_to_onednn(x):
        return times_transposed(x.reshape(rows, -1), weight, bias).view(*x.shape[:-1], -1)
    if x.dtype != torch.float32 or not torch.backends.mkl.is_available():
        return F.linear(x, weight, bias)
    if rows == 1:
        vector = x.reshape(-1)
        y = torch.mv(weight, vector) if bias is None else torch.addmv(bias, weight, vector)
        return y.view(*x.shape[:-1], -1)
    if not _FIRST_BLOCKED <= rows < _FIRST_PLAIN:
        return F.linear(x, weight, bias)
    flat = x.reshape(rows, -1)
    if rows < _FIRST_TRANSPOSED and weight.shape[0] % _BLOCK == 0 and weight.is_contiguous():
        blocks = weight.view(-1, _BLOCK, weight.shape[1]).transpose(1, 2)
        y = torch.bmm(flat.expand(len(blocks), -1, -1), blocks).transpose(0, 1).reshape(*x.shape[:-1], -1)
        return y if bias is None else y.add_(bias)
    narrow = flat.t().contiguous()
    y = torch.mm(weight, narrow) if bias is None else torch.addmm(bias.unsqueeze(1), weight, narrow)
    return y.t().reshape(*x.shape[:-1], -1)


def times_vector(weight: torch.Tensor, x: torch.Tensor, onto: torch.Tensor | None = None, scale: float = 1.0) -> torch.Tensor:
    """``onto + scale W x``: weight ``[out, in]``, x ``[in]``, onto ``[out]``."""
    if not goes_to_onednn(x):
        return torch.addmv(x[:1], weight, x, beta=0, alpha=scale) if onto is None else torch.addmv(onto, weight, x, alpha=scale)
    y = times_transposed(x.view(1, -1), weight).view(-1)
    return y.mul_(scale) if onto is None else torch.add(onto, y, alpha=scale)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """See :func:`mindspeed_lora.ops.eager.rms_norm`: the same formula, in fewer calls than torch's own makes on a CPU."""
    if x.dtype != torch.float32:
        return eager.rms_norm(x, weight, epsilon)
    scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
    return torch.mul(x, scale).mul_(weight)
