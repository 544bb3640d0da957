"""Causal attention in bf16 for a CPU that multiplies large bf16 matrices fast, but not the small ones of torch's flash attention.

Some hundred queries take all keys before them in one batched product, pieces of about :data:`_SCORES` scores at a time. As in flash
attention only the output and the logarithm of each query's sum are kept. What is large in a query's scores is subtracted before they
are rounded to bf16: as two more columns of the product's inner dimension, which sums in fp32 (``-m`` and what its rounding left,
times ones)::

    P = e^(scale [q, -m] [k, 1]^T) / sum       m: the largest q k^T that the query may attend to; backward its sum's logarithm too
    dS = P * [dy, -d] [v, 1]^T                 d = y dy, the mean of dy v^T under P
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from mindspeed_lora.ops.fused import Grads

_QUERIES, _FEWEST_QUERIES = 256, 64
_SCORES = 1 << 21  # 4 MiB, and as much again of their gradient: a core's share of the third-level cache


def _grouped(heads: torch.Tensor, groups: int) -> torch.Tensor:
    """``[b, n, s, x] -> [b g, n/g, s, x]``, without a copy where it is a layer's ``[s, b, n, x]`` permuted."""
    return heads.unflatten(1, (groups, -1)).flatten(0, 1)


def _with_ones(keys: torch.Tensor) -> torch.Tensor:
    """``[b, g, s, d] -> [b g, s, d + 2]``."""
    return F.pad(keys.flatten(0, 1), (0, 2), value=1.0)


def _pieces(queries: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    """(groups, positions) to work on at once; queries ``[b g, n/g, s, d]``."""
    groups, heads, length = queries.shape[:3]
    count = min(_QUERIES, max(_FEWEST_QUERIES, _SCORES // (heads * length)))
    for start in range(0, length, count):
        stop = min(start + count, length)
        size = max(1, _SCORES // (heads * (stop - start) * stop))
        yield from ((slice(first, first + size), slice(start, stop)) for first in range(0, groups, size))


def _own_positions(scores: torch.Tensor, length: int) -> torch.Tensor:
    """Scores ``[B, n/g L, s]`` of the last L keys, ``[B, n/g, L, L]``: above its diagonal are keys ahead of the query."""
    return scores.unflatten(1, (-1, length))[..., -length:]


def _largest(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Largest ``q k^T`` that each query may attend to: ``[B, n/g, L, d]``, ``[B, s, d + 2]`` -> ``[B, n/g, L, 1]``."""
    heads, length = queries.shape[1:3]
    scores = torch.bmm(queries.flatten(1, 2), keys[..., :-2].mT)
    _own_positions(scores, length).add_(scores.new_full((length, length), -math.inf).triu_(1))
    return scores.amax(dim=-1).view(-1, heads, length, 1)


def _less(rows: torch.Tensor, shift: torch.Tensor, columns: torch.Tensor, scale: float) -> torch.Tensor:
    """``scale (rows columns^T - shift)``: ``[B, n/g, L, d]``, fp32 ``[B, n/g, L, 1]``, ``[B, s, d + 2]`` -> ``[B, n/g L, s]``."""
    rounded = shift.to(rows.dtype)
    extended = torch.cat((rows, -rounded, (rounded - shift).to(rows.dtype)), dim=-1).flatten(1, 2)
    return torch.baddbmm(rows.new_zeros(1), extended, columns.mT, beta=0, alpha=scale)


def _weights(queries: torch.Tensor, shift: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """``e^(scale (q k^T - shift))``, 0 for keys ahead; shapes as for :func:`_less`."""
    weights = _less(queries, shift, keys, scale).exp_()
    _own_positions(weights, queries.shape[2]).tril_()
    return weights


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        batch, heads, length = query.shape[:3]
        output = query.new_empty(length, batch, heads, value.shape[-1]).permute(1, 2, 0, 3)  # as the next linear takes it
        logs = query.new_empty(batch, heads, length, 1, dtype=torch.float32)
        keys, values = _with_ones(key), value.flatten(0, 1)
        queries, outputs, all_logs = (_grouped(tensor, key.shape[1]) for tensor in (query, output, logs))
        for groups, rows in _pieces(queries):
            part, seen = queries[groups, :, rows], keys[groups, : rows.stop]
            largest = _largest(part, seen).float()
            weights = _weights(part, largest, seen, scale)
            total = weights.sum(dim=-1, dtype=torch.float32).view_as(largest)
            outputs[groups, :, rows] = torch.bmm(weights, values[groups, : rows.stop]).view(*part.shape[:3], -1) / total
            all_logs[groups, :, rows] = total.log_().div_(scale).add_(largest)
        ctx.save_for_backward(query, key, value, output, logs)
        ctx.scale = scale
        return output

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Grads:
        query, key, value, output, logs = ctx.saved_tensors
        mean = output.float().mul_(dy.float()).sum(dim=-1, keepdim=True)
        grads = [torch.zeros_like(tensor, dtype=torch.float32) for tensor in (key, value)]
        key_grad, value_grad = (grad.flatten(0, 1) for grad in grads)
        query_grad = torch.empty_like(query)
        keys, values = _with_ones(key), _with_ones(value)
        queries, query_grads, dys, means, all_logs = (_grouped(tensor, key.shape[1]) for tensor in (query, query_grad, dy, mean, logs))
        for groups, rows in _pieces(queries):
            seen = groups, slice(rows.stop)
            part, part_dy = queries[groups, :, rows], dys[groups, :, rows]
            weights = _weights(part, all_logs[groups, :, rows], keys[seen], ctx.scale)
            value_grad[seen] += torch.bmm(weights.mT, part_dy.flatten(1, 2))
            scores_grad = _less(part_dy, means[groups, :, rows], values[seen], 1.0).mul_(weights)
            query_grads[groups, :, rows] = torch.bmm(scores_grad, keys[seen][..., :-2]).mul_(ctx.scale).view_as(part)
            key_grad[seen].add_(torch.bmm(scores_grad.mT, part.flatten(1, 2)), alpha=ctx.scale)
        return query_grad, grads[0].to(key.dtype), grads[1].to(value.dtype), None


def causal_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> torch.Tensor:
    """:func:`mindspeed_lora.ops.eager.attention` of bf16 with ``is_causal``, no mask and as many keys as queries."""
    return _CausalAttention.apply(query, key, value, scale or 1.0 / math.sqrt(query.shape[-1]))
