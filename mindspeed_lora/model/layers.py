"""One decoder layer: norm, attention, norm, MLP, with Megatron's names."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mindspeed_lora import ops
from mindspeed_lora.model.balance import MicroBatch
from mindspeed_lora.model.decode import Attend, DecodeState, PackedDocuments
from mindspeed_lora.model.experts import MixtureOfExperts
from mindspeed_lora.model.latent_attention import LatentAttention
from mindspeed_lora.model.norm import RMSNorm
from mindspeed_lora.model.rotary import RotaryTables
from mindspeed_lora.parallel.context import ParallelContext
from mindspeed_lora.parallel.layers import ColumnParallelLinear, RowParallelLinear
from mindspeed_lora.weights.config import ModelConfig


class SelfAttention(nn.Module):
    """Grouped-query attention over this rank's g/t query groups; ``linear_qkv`` holds them group by group."""

    def __init__(self, config: ModelConfig, layer: int, context: ParallelContext, dtype: torch.dtype, recompute_core: bool) -> None:
        super().__init__()
        self.layer, self.recompute_core = layer, recompute_core
        self.kv_channels, self.window = config.kv_channels, config.sliding_window
        self.groups = config.num_query_groups // context.tp_size
        self.heads_per_group = config.num_attention_heads // config.num_query_groups
        qkv_size = (config.num_attention_heads + 2 * config.num_query_groups) * config.kv_channels
        self.linear_qkv = ColumnParallelLinear(config.hidden_size, qkv_size, context, config.qkv_bias, dtype)
        self.linear_proj = RowParallelLinear(config.num_attention_heads * config.kv_channels, config.hidden_size, context, dtype)
        if config.qk_layernorm:
            self.q_layernorm = RMSNorm(config.kv_channels, config, context, dtype)
            self.k_layernorm = RMSNorm(config.kv_channels, config, context, dtype)
        self.qk_layernorm = config.qk_layernorm

    def _split(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``[s, b, (n/g + 2) g/t d]`` -> query ``[s, b, n/t, d]``, key and value ``[s, b, g/t, d]``."""
        length, batch = qkv.shape[:2]
        qkv = qkv.contiguous().view(length, batch, self.groups, self.heads_per_group + 2, self.kv_channels)
        query, key, value = qkv.split((self.heads_per_group, 1, 1), dim=3)
        return query.reshape(length, batch, -1, self.kv_channels), key.squeeze(3), value.squeeze(3)

    def forward(self, hidden: torch.Tensor, rotary: RotaryTables, attend: Attend) -> torch.Tensor:
        """hidden ``[s, b, h]`` (SP: ``[s/t, b, h]``) -> the same shape."""
        qkv = self.linear_qkv(hidden)
        if isinstance(attend, DecodeState) and attend.cache is not None and qkv.shape[0] == 1:
            return self.linear_proj(self._one_token(qkv, rotary, attend))
        query, key, value = self._split(qkv)
        if self.qk_layernorm:
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        query, key = ops.rotate(query, *rotary), ops.rotate(key, *rotary)
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        if self.recompute_core and torch.is_grad_enabled():
            core = checkpoint(self._core, query, key, value, attend, use_reentrant=False)
        else:
            core = self._core(query, key, value, attend)
        return self.linear_proj(core.permute(2, 0, 1, 3).flatten(2))

    def linears(self) -> list[ColumnParallelLinear | RowParallelLinear]:
        """Whatever holds a matrix."""
        return [self.linear_qkv, self.linear_proj]

    def _one_token(self, qkv: torch.Tensor, rotary: RotaryTables, decode: DecodeState) -> torch.Tensor:
        """One new position in each row: ``[1, b, (n/g + 2) g/t d]`` -> ``[1, b, n/t d]``, with as few kernels as it takes.

        A group's query heads and its key lie behind one another in qkv, so they are normed and rotated together; and since they
        all attend to the same keys, they can stand as the positions of one head (no copy of keys for each of them).
        """
        assert decode.cache is not None
        batch = qkv.shape[1]
        heads = qkv.contiguous().view(batch, self.groups, self.heads_per_group + 2, self.kv_channels)
        turned, value = heads.narrow(2, 0, self.heads_per_group + 1), heads.narrow(2, self.heads_per_group + 1, 1)
        if self.qk_layernorm:
            turned = ops.rms_norm(
                turned, decode.cache.constant((SelfAttention, self.layer), self.query_key_weight), self.q_layernorm.epsilon
            )
        turned = ops.rotate(turned.reshape(1, batch, -1, self.kv_channels), *rotary).view_as(turned)
        query, key = turned.narrow(2, 0, self.heads_per_group), turned.narrow(2, self.heads_per_group, 1)
        mask = self.decode_mask(decode, 1, decode.cache.length, qkv.device)
        key, value = decode.cache.append(self.layer, key, value)
        return ops.attention(query, key, value, mask, is_causal=False).reshape(1, batch, -1)

    def query_key_weight(self) -> torch.Tensor:
        """``[n/g + 1, d]``: the norm's weight of each query head of a group and of its key."""
        return torch.cat((self.q_layernorm.weight.expand(self.heads_per_group, -1), self.k_layernorm.weight[None]))

    def _core(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attend: Attend) -> torch.Tensor:
        """query ``[b, n/t, s, d]``, key and value ``[b, g/t, s, d]`` -> ``[b, n/t, s, d]``."""
        if isinstance(attend, PackedDocuments):
            return ops.document_attention(query, key, value, attend.ends, self.window)
        if attend is None:
            return ops.attention(query, key, value, self._own_mask(query.shape[2], 0, query.device))
        return self._decode(query, key, value, attend)

    def _own_mask(self, length: int, seen: int, device: torch.device) -> torch.Tensor | None:
        """bool ``[s, seen + s]`` where plain causal attention over what was seen would not do; None where it does."""
        window = self.window or seen + length
        if seen + length <= window and (seen == 0 or length == 1):
            return None
        return ops.band_mask(length, seen, window, device)

    def _decode(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, decode: DecodeState) -> torch.Tensor:
        seen, length = 0 if decode.cache is None else decode.cache.length, query.shape[2]
        if decode.cache is not None:
            key, value = decode.cache.append(self.layer, key, value)
        return ops.attention(query, key, value, self.decode_mask(decode, length, seen, query.device), is_causal=seen == 0)

    def decode_mask(self, decode: DecodeState, length: int, seen: int, device: torch.device) -> torch.Tensor | None:
        """bool ``[b or 1, 1, s, seen + s]`` or ``[s, seen + s]``: the batch's padding and the layer's window; None: neither."""
        own = self._own_mask(length, seen, device)
        if decode.mask is None or own is None:
            return own if decode.mask is None else decode.mask
        return decode.mask & own


class MLP(nn.Module):
    """SwiGLU: ``fc2(silu(gate) * up)``; ``linear_fc1`` holds this rank's [gate | up]."""

    def __init__(self, config: ModelConfig, context: ParallelContext, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear_fc1 = ColumnParallelLinear(config.hidden_size, 2 * config.ffn_hidden_size, context, dtype=dtype)
        self.linear_fc2 = RowParallelLinear(config.ffn_hidden_size, config.hidden_size, context, dtype)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[s, b, h]`` (SP: ``[s/t, b, h]``) -> the same."""
        return self.linear_fc2(ops.swiglu(self.linear_fc1(hidden)))


class TransformerLayer(nn.Module):
    """Pre-norm residual block; ``layer`` is its global number."""

    def __init__(self, config: ModelConfig, layer: int, context: ParallelContext, dtype: torch.dtype, recompute_core: bool = False) -> None:
        super().__init__()
        self.layer = layer
        self.input_layernorm = RMSNorm(config.hidden_size, config, context, dtype)
        attention = LatentAttention if config.latent else SelfAttention
        self.self_attention = attention(config, layer, context, dtype, recompute_core)
        self.pre_mlp_layernorm = RMSNorm(config.hidden_size, config, context, dtype)
        self.mlp = (MixtureOfExperts if config.has_experts(layer) else MLP)(config, context, dtype)

    def linear_weights(self) -> list[nn.Parameter]:
        """The weights of attention's and the MLP's linears, of stacked and shared experts too: nearly all of a layer."""
        blocks = (self.mlp.experts, self.mlp.shared_experts) if isinstance(self.mlp, MixtureOfExperts) else (self.mlp,)
        linears = [linear for block in blocks if block is not None for linear in (block.linear_fc1, block.linear_fc2)]
        return [linear.weight for linear in (*self.self_attention.linears(), *linears)]

    def forward(self, hidden: torch.Tensor, rotary: RotaryTables, attend: Attend = None, balance: MicroBatch | None = None) -> torch.Tensor:
        """``[s, b, h]`` (SP: ``[s/t, b, h]``) -> the same."""
        hidden = hidden + self.self_attention(self.input_layernorm(hidden), rotary, attend)
        normed = self.pre_mlp_layernorm(hidden)
        if balance is None or not isinstance(self.mlp, MixtureOfExperts):
            return hidden + self.mlp(normed)
        return hidden + self.mlp(normed, balance.of(self.layer))
