"""The kernels of a CPU that generates: a few rows in fp32, no gradient. Elsewhere they are :mod:`mindspeed_lora.ops.eager`'s.

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
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mindspeed_lora.ops import eager

_BLOCK = 64  # outputs
_FIRST_BLOCKED, _FIRST_TRANSPOSED, _FIRST_PLAIN = 4, 12, 17  # rows


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """See :func:`mindspeed_lora.ops.eager.linear`."""
    rows = x.numel() // x.shape[-1]
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


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """See :func:`mindspeed_lora.ops.eager.rms_norm`: the same formula, in fewer calls than torch's own makes on a CPU."""
    if x.dtype != torch.float32:
        return eager.rms_norm(x, weight, epsilon)
    scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
    return torch.mul(x, scale).mul_(weight)
