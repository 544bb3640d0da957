"""One new token of one answer, in fp32 on a CPU: dense layers in as few calls as it takes.

A token's time is that of reading every weight once and that of the calls in between, which cost about twice what they cost alone: the
weights that stream through the cache drive the interpreter out of it. So hidden is a vector here, what modules know is looked up once an
answer, and

    norm      scale * (g * h), scale = 1 / sqrt(h.h / size + epsilon): a number, which the product behind it takes as its factor
    product   scale * W (g * h), the bias or the residual what it is added to, an adapter's B (A ...) added in place
    rotation  x * cos + (x rolled by half) * sin, sin's first half negated once a token
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from mindspeed_lora.model.decode import DecodeState
from mindspeed_lora.model.layers import MLP, SelfAttention, TransformerLayer
from mindspeed_lora.model.rotary import RotaryTables
from mindspeed_lora.ops.few_rows import times_vector
from mindspeed_lora.parallel.context import ParallelContext
from mindspeed_lora.parallel.layers import leave_row


def applies(hidden: torch.Tensor, decode: DecodeState) -> bool:
    """Whether ``hidden`` ``[s, b, h]`` is what this file is for."""
    return (
        decode.cache is not None
        and hidden.shape[:2] == (1, 1)
        and hidden.dtype == torch.float32
        and hidden.device.type == "cpu"
        and not torch.is_grad_enabled()
    )


def run(
    layers: Iterable[nn.Module], hidden: torch.Tensor, rotary: RotaryTables, decode: DecodeState, context: ParallelContext
) -> torch.Tensor:
    """``[1, 1, h]`` -> the same behind all ``layers``; those of experts or latent attention compute as ever."""
    assert decode.cache is not None
    cosine, sine = (table.view(-1) for table in rotary)
    first, second = sine.chunk(2)
    turn = cosine, torch.cat((-first, second))
    vector = hidden.view(-1)
    for layer in layers:
        assert isinstance(layer, TransformerLayer)
        if isinstance(layer.self_attention, SelfAttention) and isinstance(layer.mlp, MLP):
            dense = decode.cache.constant((_DenseLayer, layer.layer), partial(_DenseLayer, layer, context))
            vector = dense(vector, turn, decode)
        else:
            vector = layer(vector.view(1, 1, -1), rotary, decode).view(-1)
    return vector.view(1, 1, -1)


@dataclass(frozen=True, slots=True)
class _Product:
    """``W x``, with the adapter in use; of weights cut by ``in`` over ranks, this rank's part."""

    weight: torch.Tensor
    added: tuple[torch.Tensor, torch.Tensor, float | torch.Tensor] | None

    @classmethod
    def of(cls, linear: nn.Module) -> _Product:
        """Of a linear layer, with or without adapters around it."""
        weight, low_rank = linear.weight, linear.low_rank
        assert isinstance(weight, torch.Tensor) and callable(low_rank)
        return cls(weight, low_rank())

    def __call__(self, x: torch.Tensor, onto: torch.Tensor | None, scale: float = 1.0) -> torch.Tensor:
        """``onto + scale W x``: x ``[in]``, onto ``[out]``."""
        y = times_vector(self.weight, x, onto, scale)
        if self.added is None:
            return y
        a, b, factor = self.added
        u = torch.mv(a, x)
        return y.addmv_(b, u, alpha=scale * factor) if isinstance(factor, float) else y.addmv_(b, u.mul_(factor), alpha=scale)


class _DenseLayer:
    """:class:`mindspeed_lora.model.layers.TransformerLayer` for one answer."""

    def __init__(self, layer: TransformerLayer, context: ParallelContext) -> None:
        attention, mlp = layer.self_attention, layer.mlp
        assert isinstance(attention, SelfAttention) and isinstance(mlp, MLP)
        self.number, self.context, self.attention = layer.layer, context, attention
        self.input_norm, self.mlp_norm = layer.input_layernorm.weight, layer.pre_mlp_layernorm.weight
        self.size, self.epsilon = self.input_norm.shape[0], layer.input_layernorm.epsilon
        self.qkv, self.bias, self.proj = _Product.of(attention.linear_qkv), attention.linear_qkv.bias, _Product.of(attention.linear_proj)
        self.fc1, self.fc2 = _Product.of(mlp.linear_fc1), _Product.of(mlp.linear_fc2)
        self.queries, self.channels = attention.heads_per_group, attention.kv_channels
        self.shape = (1, attention.groups, self.queries + 2, self.channels)
        self.head_norm = attention.query_key_weight() if attention.qk_layernorm else None
        self.head_epsilon = torch.tensor(self.epsilon)

    def __call__(self, hidden: torch.Tensor, turn: RotaryTables, decode: DecodeState) -> torch.Tensor:
        """``[h]`` -> the same; ``turn``: cosine and sine ``[d]``, the first half of the sine negated."""
        qkv = self.qkv(self.input_norm * hidden, self.bias, self._inverse_rms(hidden))
        hidden = self._add(hidden, self.proj, self._attend(qkv, turn, decode))
        gate, up = self.fc1(self.mlp_norm * hidden, None, self._inverse_rms(hidden)).chunk(2)
        return self._add(hidden, self.fc2, F.silu(gate).mul_(up))

    def _inverse_rms(self, hidden: torch.Tensor) -> float:
        return 1.0 / math.sqrt(float(torch.dot(hidden, hidden)) / self.size + self.epsilon)

    def _add(self, hidden: torch.Tensor, product: _Product, x: torch.Tensor) -> torch.Tensor:
        """``hidden`` and a row-parallel product."""
        if self.context.tp_group is None:
            return product(x, hidden)
        return hidden + leave_row(product(x, None), self.context)

    def _attend(self, qkv: torch.Tensor, turn: RotaryTables, decode: DecodeState) -> torch.Tensor:
        """See :meth:`mindspeed_lora.model.layers.SelfAttention._one_token`: ``[(n/g + 2) g/t d] -> [n/t d]``."""
        assert decode.cache is not None
        heads, count = qkv.view(self.shape), self.queries
        turned = heads.narrow(2, 0, count + 1)
        if self.head_norm is not None:
            norm = torch.linalg.vector_norm(turned, dim=-1, keepdim=True)
            scale = torch.addcmul(self.head_epsilon, norm, norm, value=1.0 / self.channels).rsqrt_()
            turned = torch.mul(turned, scale).mul_(self.head_norm)
        turned = torch.mul(turned, turn[0]).addcmul_(torch.roll(turned, self.channels // 2, -1), turn[1])
        mask = self.attention.decode_mask(decode, 1, decode.cache.length, qkv.device)
        key, value = decode.cache.append(self.number, turned.narrow(2, count, 1), heads.narrow(2, count + 1, 1))
        return F.scaled_dot_product_attention(turned.narrow(2, 0, count), key, value, attn_mask=mask).view(-1)
