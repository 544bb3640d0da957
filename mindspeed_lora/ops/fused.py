"""The kernels of :mod:`mindspeed_lora.ops.eager` as autograd functions: fewer passes over memory, and less kept for backward.

| function   | kept for backward          | beside eager                                                      |
|------------|----------------------------|-------------------------------------------------------------------|
| rms_norm   | x, 1/rms per row           | no fp32 copy of x                                                 |
| rotate     | nothing but the tables     | no concatenation                                                  |
| swiglu     | x = [gate, up]             | silu(gate) is computed again; gate's and up's gradient in one buffer |
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

Grads = tuple[torch.Tensor | None, ...]


def _wide(x: torch.Tensor) -> torch.Tensor:
    """At least fp32; no copy where it is."""
    return x.float() if x.dtype.itemsize == 2 else x


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        wide = _wide(x)
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Grads:
        x, weight, scale = ctx.saved_tensors
        wide, grad = _wide(x), _wide(dy * weight)
        along = (grad * wide).sum(dim=-1, keepdim=True).mul_(scale.pow(3))
        grad = torch.mul(grad, scale).addcmul_(wide, along, value=-1.0 / x.shape[-1])
        weight_grad = None
        if ctx.needs_input_grad[1]:
            weight_grad = (_wide(dy) * (wide * scale).to(x.dtype)).flatten(0, -2).sum(dim=0).to(weight.dtype)
        return grad.to(x.dtype), weight_grad, None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """See :func:`mindspeed_lora.ops.eager.rms_norm`."""
    return _RMSNorm.apply(x, weight, epsilon)


def _rotated(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, back: bool = False) -> torch.Tensor:
    """``back``: by the transposed matrix, as gradients are."""
    y = x * cosine
    (first, second), (y_first, y_second), sines = x.chunk(2, -1), y.chunk(2, -1), sine.chunk(2, -1)
    y_first.addcmul_(second, sines[back], value=1 if back else -1)
    y_second.addcmul_(first, sines[not back], value=-1 if back else 1)
    return y


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cosine, sine)
        return _rotated(x, cosine, sine)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Grads:
        cosine, sine = ctx.saved_tensors
        return _rotated(dy, cosine, sine, back=True), None, None


def rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """See :func:`mindspeed_lora.ops.eager.rotate`."""
    return (_Rotate.apply if torch.is_grad_enabled() else _rotated)(x, cosine, sine)


def _gated(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return _gated(x)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Grads:
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        grad = torch.empty_like(x)
        gate_grad, up_grad = grad.chunk(2, dim=-1)
        torch.mul(F.silu(gate), dy, out=up_grad)
        torch.ops.aten.silu_backward.grad_input(dy * up, gate, grad_input=gate_grad)
        return (grad,)


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """See :func:`mindspeed_lora.ops.eager.swiglu`."""
    return (_SwiGLU.apply if torch.is_grad_enabled() else _gated)(x)
