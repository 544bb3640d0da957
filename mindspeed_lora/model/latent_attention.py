"""Multi-head latent attention (DeepSeek): keys and values of all heads come from one narrow latent, and one rotated key serves them all.

::

    hidden [s, b, h] -> linear_qkv -> [queries' latent a | key-value latent c | shared key p]
      query   [n, nope | rope] = linear_q_up_proj(norm(a))        (no q-lora: a are the queries themselves)
      key     [n, nope], value [n, d_v] = linear_kv_up_proj(norm(c))
      softmax(scale (q_nope k^T + rotated q_rope p^T)) v -> linear_proj

Over TP the heads are cut, and ``linear_qkv`` is whole on every rank (so are the peer's files). With a latent for the queries, a rank
projects its part of the sequence (SP) and the normed latents are gathered, all three at once, which is narrower than gathering
``hidden``. Without one, a are the queries of all heads, wider than ``hidden``: then ``hidden`` is gathered, and a rank
projects its own heads' queries. The weight table's ``grad_sum`` follows: "sp" there, "always" here.

The cache holds norm(c) and the rotated p, ``c + p`` numbers a position whatever the number of heads. What follows a cached prefix
attends to the latents themselves where that costs less than to expand them: ``q_nope W_k`` and ``W_v`` applied after the
sum are the same numbers, of the adapter's ``s B A`` too. Source: DeepSeek-AI, "DeepSeek-V2" (2024), section 2.1.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mindspeed_lora import ops
from mindspeed_lora.model.decode import Attend, DecodeState, PackedDocuments
from mindspeed_lora.model.norm import RMSNorm
from mindspeed_lora.model.rotary import RotaryTables, softmax_scale
from mindspeed_lora.parallel.context import ParallelContext
from mindspeed_lora.parallel.layers import ColumnParallelLinear, ReplicatedLinear, RowParallelLinear, enter_column
from mindspeed_lora.weights.config import LatentShape, ModelConfig

_NORM_EPSILON = 1e-6  # of the latents' norms, whatever rms_norm_eps says (transformers' and DeepSeek's own code)


def absorbing_is_cheaper(shape: LatentShape, new: int, total: int) -> bool:
    """Whether ``new`` positions that attend to ``total`` multiply less on latents than on expanded keys and values (counted per head)."""
    matrix = shape.kv_rank * (shape.nope_head_dim + shape.value_head_dim)
    on_latents = new * matrix + new * total * (2 * shape.kv_rank + shape.rope_head_dim)
    return on_latents < total * matrix + new * total * (shape.query_head_dim + shape.value_head_dim)


class LatentAttention(nn.Module):
    """Takes the place of :class:`mindspeed_lora.model.layers.SelfAttention`."""

    def __init__(self, config: ModelConfig, layer: int, context: ParallelContext, dtype: torch.dtype, recompute_core: bool) -> None:
        super().__init__()
        assert config.latent is not None
        self.layer, self.recompute_core, self.context = layer, recompute_core, context
        self.shape, heads, hidden = config.latent, config.num_attention_heads, config.hidden_size
        self.heads, self.scale = heads // context.tp_size, softmax_scale(config)
        self.sizes = (self.shape.q_rank or heads * self.shape.query_head_dim, self.shape.kv_rank, self.shape.rope_head_dim)
        inside = replace(context, tp_group=None, sequence_parallel=False)  # sizes are cut, nothing is communicated
        expanded = self.shape.nope_head_dim + self.shape.value_head_dim
        self.linear_qkv = ReplicatedLinear(hidden, sum(self.sizes), context, dtype)
        if self.shape.q_rank is not None:
            self.q_layernorm = RMSNorm(self.shape.q_rank, config, context, dtype, _NORM_EPSILON)
            self.linear_q_up_proj = ColumnParallelLinear(self.shape.q_rank, heads * self.shape.query_head_dim, inside, dtype=dtype)
        self.kv_layernorm = RMSNorm(self.shape.kv_rank, config, context, dtype, _NORM_EPSILON)
        self.linear_kv_up_proj = ColumnParallelLinear(self.shape.kv_rank, heads * expanded, inside, dtype=dtype)
        self.linear_proj = RowParallelLinear(heads * self.shape.value_head_dim, hidden, context, dtype)

    def forward(self, hidden: torch.Tensor, rotary: RotaryTables, attend: Attend) -> torch.Tensor:
        """hidden ``[s, b, h]`` (SP: ``[s/t, b, h]``) -> the same shape."""
        queries, latents, shared = self._queries_of_own_heads(hidden) if self.shape.q_rank is None else self._latents_of_own_part(hidden)
        query_nope, query_rope = queries.unflatten(-1, (self.heads, -1)).split((self.shape.nope_head_dim, self.shape.rope_head_dim), dim=-1)
        query_rope, shared = self._rotated(query_rope, rotary), self._rotated(shared.unsqueeze(2), rotary).squeeze(2)
        if isinstance(attend, DecodeState) and attend.cache is not None:
            return self.linear_proj(self._behind_cache(query_nope, query_rope, torch.cat((latents, shared), dim=-1), attend))
        return self.linear_proj(self._expanded(query_nope, query_rope, latents, shared, attend))

    def linears(self) -> list[ReplicatedLinear | ColumnParallelLinear | RowParallelLinear]:
        """Whatever holds a matrix."""
        queries = [] if self.shape.q_rank is None else [self.linear_q_up_proj]
        return [self.linear_qkv, *queries, self.linear_kv_up_proj, self.linear_proj]

    def _latents_of_own_part(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``[s, b, h]`` (SP: s/t) -> queries ``[s, b, n/t (nope + rope)]``, normed latents ``[s, b, c]``, shared key ``[s, b, p]``."""
        queries, latents, shared = self.linear_qkv(hidden).split(self.sizes, dim=-1)
        queries, latents = self.q_layernorm(queries), self.kv_layernorm(latents)
        if self.context.tp_group is not None:
            whole = enter_column(torch.cat((queries, latents, shared), dim=-1), self.context)
            queries, latents, shared = whole.split(self.sizes, dim=-1)
        return self.linear_q_up_proj(queries), latents, shared

    def _queries_of_own_heads(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The same without a latent for the queries."""
        hidden, (width, *others) = enter_column(hidden, self.context), self.sizes
        if self.context.tp_size == 1:
            queries, latents, shared = self.linear_qkv(hidden).split(self.sizes, dim=-1)
        else:
            own = width // self.context.tp_size
            queries = self.linear_qkv(hidden, slice(self.context.tp_rank * own, (self.context.tp_rank + 1) * own))
            latents, shared = self.linear_qkv(hidden, slice(width, None)).split(others, dim=-1)
        return queries, self.kv_layernorm(latents), shared

    def _rotated(self, x: torch.Tensor, rotary: RotaryTables) -> torch.Tensor:
        """``[s, b, heads, p]`` rotated; pairs that lay side by side lie half the size apart then, in queries and keys alike."""
        if self.shape.interleaved:
            x = x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        return ops.rotate(x, *rotary)

    def _expanded(
        self, query_nope: torch.Tensor, query_rope: torch.Tensor, latents: torch.Tensor, shared: torch.Tensor, attend: Attend
    ) -> torch.Tensor:
        """Attention over expanded keys and values.

        Args:
            query_nope, query_rope: ``[s, b, n/t, nope]``, ``[s, b, n/t, rope]``.
            latents, shared: ``[s_k, b, c]``, ``[s_k, b, p]``.

        Returns:
            ``[s, b, n/t d_v]``.
        """
        expanded = self.linear_kv_up_proj(latents).unflatten(-1, (self.heads, -1))
        key, value = expanded.split((self.shape.nope_head_dim, self.shape.value_head_dim), dim=-1)
        key = torch.cat((key, shared.unsqueeze(2).expand(-1, -1, self.heads, -1)), dim=-1)
        query = torch.cat((query_nope, query_rope), dim=-1)
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        if self.recompute_core and torch.is_grad_enabled():
            core = checkpoint(self._core, query, key, value, attend, use_reentrant=False)
        else:
            core = self._core(query, key, value, attend)
        return core.permute(2, 0, 1, 3).flatten(2)

    def _core(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attend: Attend) -> torch.Tensor:
        """query ``[b, n/t, s, nope + rope]``, key the same ``[.., s_k, ..]``, value ``[b, n/t, s_k, d_v]`` -> ``[b, n/t, s, d_v]``."""
        if isinstance(attend, PackedDocuments):
            return ops.document_attention(query, key, value, attend.ends, scale=self.scale)
        seen = key.shape[2] - query.shape[2]
        mask = None if attend is None else _mask(attend, query.shape[2], seen, query.device)
        return ops.attention(query, key, value, mask, is_causal=seen == 0, scale=self.scale)

    def _behind_cache(self, query_nope: torch.Tensor, query_rope: torch.Tensor, new: torch.Tensor, decode: DecodeState) -> torch.Tensor:
        """Positions behind what the cache holds; ``new`` ``[s, b, c + p]`` is put there. -> ``[s, b, n/t d_v]``."""
        assert decode.cache is not None
        length, seen = len(new), decode.cache.length
        (held,) = decode.cache.append(self.layer, new.transpose(0, 1).unsqueeze(1))
        if not seen or not absorbing_is_cheaper(self.shape, length, seen + length):
            latents, shared = held.squeeze(1).transpose(0, 1).split(self.sizes[1:], dim=-1)
            return self._expanded(query_nope, query_rope, latents, shared, decode)
        return self._absorbed(query_nope, query_rope, held, _mask(decode, length, seen, new.device))

    def _absorbed(self, query_nope: torch.Tensor, query_rope: torch.Tensor, held: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Attention to the latents ``held`` ``[b, 1, s_k, c + p]`` themselves: of all heads, as positions of one. -> ``[s, b, n/t d_v]``.

        The values are the latents, and stand in front of the rotated keys: no copy of either.
        """
        length, batch = query_nope.shape[:2]
        query = torch.cat((self._into_latents(query_nope), query_rope.permute(1, 2, 0, 3)), dim=-1)
        if mask is not None:
            mask = mask.expand(-1, -1, length, -1).repeat(1, 1, self.heads, 1)
        query = query.reshape(batch, 1, self.heads * length, -1)
        summed = ops.attention(query, held, held, mask, is_causal=False, scale=self.scale)[..., : self.shape.kv_rank]
        return self._out_of_latents(summed.view(batch, self.heads, length, -1)).flatten(2)

    def _by_head(self, matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``[n/t (nope + d_v), k]`` -> the keys' rows ``[n/t, nope, k]`` and the values' ``[n/t, d_v, k]``."""
        keys, values = matrix.unflatten(0, (self.heads, -1)).split((self.shape.nope_head_dim, self.shape.value_head_dim), dim=1)
        return keys, values

    def _into_latents(self, query: torch.Tensor) -> torch.Tensor:
        """``q W_k`` with the adapter's ``s (q B_k) A``: ``[s, b, n/t, nope]`` -> ``[b, n/t, s, c]``."""
        found = torch.einsum("sbnd,ndc->bnsc", query, self._by_head(self.linear_kv_up_proj.weight)[0])
        adapter = self.linear_kv_up_proj.low_rank()
        if adapter is None:
            return found
        a, b, scale = adapter
        narrow = torch.einsum("sbnd,ndr->bnsr", query, self._by_head(b)[0])
        return found + (narrow * scale).to(found.dtype) @ a

    def _out_of_latents(self, summed: torch.Tensor) -> torch.Tensor:
        """``W_v x`` with the adapter's ``s B_v (A x)``: ``[b, n/t, s, c]`` -> ``[s, b, n/t, d_v]``."""
        found = torch.einsum("bnsc,ndc->sbnd", summed, self._by_head(self.linear_kv_up_proj.weight)[1])
        adapter = self.linear_kv_up_proj.low_rank()
        if adapter is None:
            return found
        a, b, scale = adapter
        narrow = (summed @ a.t() * scale).to(found.dtype)
        return found + torch.einsum("bnsr,ndr->sbnd", narrow, self._by_head(b)[1])


def _mask(decode: DecodeState, length: int, seen: int, device: torch.device) -> torch.Tensor | None:
    """bool ``[b or 1, 1, s, seen + s]``; None: causal over new positions alone, or one position that sees everything."""
    if decode.mask is not None or not seen or length == 1:
        return decode.mask
    return ops.band_mask(length, seen, seen + length, device).view(1, 1, length, -1)
