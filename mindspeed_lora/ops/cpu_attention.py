"""Causal attention in bf16 for a CPU that multiplies large bf16 matrices fast, but not the small ones of torch's flash attention.

Some hundred queries take all keys before them in one batched product, pieces of about :data:`_SCORES` scores at a time. As in flash
attention only the output and the logarithm of each query's sum are kept; a few hundred queries take flash attention itself forward,
where it is the faster one. What is large in a query's scores is subtracted before they are rounded to bf16: as two more columns of the
product's inner dimension, which sums in fp32 (m and what its rounding left, times -1). Exponentials are powers of 2, which take less
time::

    P = 2^(c [q, m] [k, -1]^T) / sum           m: the largest q k^T that the query may attend to; backward its sum's logarithm too
    dS = P * [dy, d] [v, -1]^T                 d = y dy, the mean of dy v^T under P;  c = scale log2(e)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from mindspeed_lora.ops.fused import Grads

LOG2_OF_E = math.log2(math.e)
_FLASH = 256  # up to here forward torch's flash attention takes less time: a call in place of a dozen
_QUERIES, _FEWEST_QUERIES = 256, 64
_SCORES = 1 << 21  # 4 MiB, and as much again of their gradient: a core's share of the third-level cache


def _grouped(heads: torch.Tensor, groups: int) -> torch.Tensor:
    """``[b, n, s, x] -> [b g, n/g, s, x]``, without a copy where it is a layer's ``[s, b, n, x]`` permuted."""
    batch, count, *rest = heads.shape
    return heads.reshape(batch * groups, count // groups, *rest)


def _new_heads(like: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Undefined ``[b, n, s, width]`` for ``like``'s ``[b, n, s, d]``, laid out as a layer has them, so that groups of it are views."""
    batch, heads, length = like.shape[:3]
    return like.new_empty(length, batch, heads, width, dtype=dtype).permute(1, 2, 0, 3)


def _less_one(keys: torch.Tensor) -> torch.Tensor:
    """``[b, g, s, d] -> [b g, s, d + 2]``, the last two columns -1."""
    return F.pad(keys.flatten(0, 1), (0, 2), value=-1.0)


def _pieces(queries: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    """(groups, positions) to work on at once, the last positions first; queries ``[b g, n/g, s, d]``."""
    groups, heads, length = queries.shape[:3]
    count = min(_QUERIES, max(_FEWEST_QUERIES, _SCORES // (heads * length)))
    for start in reversed(range(0, length, count)):
        stop = min(start + count, length)
        size = max(1, _SCORES // (heads * (stop - start) * stop))
        yield from ((slice(first, first + size), slice(start, stop)) for first in range(0, groups, size))


def _own_positions(scores: torch.Tensor, length: int) -> torch.Tensor:
    """Scores ``[B, n/g L, s]`` of the last L keys, ``[B, n/g, L, L]``: above its diagonal are keys ahead of the query."""
    return scores.view(len(scores), -1, length, scores.shape[-1])[..., -length:]


def _largest(queries: torch.Tensor, keys: torch.Tensor, length: int) -> torch.Tensor:
    """Largest ``q k^T`` that each query may attend to, fp32: ``[B, n/g L, d]``, ``[B, s, d + 2]`` -> ``[B, n/g L, 1]``."""
    scores = torch.bmm(queries, keys[..., :-2].mT)
    _own_positions(scores, length).add_(scores.new_full((length, length), -math.inf).triu_(1))
    return scores.amax(dim=-1, keepdim=True).float()


def _less(rows: torch.Tensor, shift: torch.Tensor, columns: torch.Tensor, scale: float) -> torch.Tensor:
    """``scale (rows columns^T - shift)``: ``[B, R, d]``, fp32 ``[B, R, 1]``, ``[B, s, d + 2]`` -> ``[B, R, s]``."""
    rounded = shift.to(rows.dtype)
    return _scaled_product(torch.cat((rows, rounded, (shift - rounded).to(rows.dtype)), dim=-1), columns.mT, scale)


def _scaled_product(left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    return torch.baddbmm(left.new_empty(1), left, right, beta=0, alpha=scale)


def _weights(queries: torch.Tensor, shift: torch.Tensor, keys: torch.Tensor, length: int, scale: float) -> torch.Tensor:
    """``e^(scale (q k^T - shift))``, 0 for keys ahead; shapes as for :func:`_less`."""
    weights = _less(queries, shift, keys, scale * LOG2_OF_E).exp2_()
    _own_positions(weights, length).tril_()
    return weights


@functools.cache
def flash_takes_groups() -> bool:
    """Whether torch's flash attention takes fewer keys than queries; torch 2.7 falls back to scores of ``[b, n, s, s]``."""
    query, key = torch.zeros(1, 2, 16, 8), torch.zeros(1, 1, 16, 8)
    return torch._fused_sdp_choice(query, key, key, is_causal=True, enable_gqa=True) != 0


def repeated(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values in as many groups as flash attention takes for these queries."""
    if key.shape[1] == query.shape[1] or flash_takes_groups():
        return key, value
    times = query.shape[1] // key.shape[1]
    return key.repeat_interleave(times, dim=1), value.repeat_interleave(times, dim=1)


def _flash_takes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether these are few enough, and what the kernel reads: it looks at no stride of the last dim."""
    dense = all(tensor.stride(-1) == 1 for tensor in (query, key, value))
    return query.shape[2] <= _FLASH and value.shape[-1] == query.shape[-1] and dense


def _by_flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`_by_products`, in one call."""
    key, value = repeated(query, key, value)
    output, logs = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, is_causal=True, scale=scale)
    return output, logs.unsqueeze(-1).div_(scale)


def _by_products(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Output ``[b, n, s, d]``, and of each query the logarithm of its sum over ``scale``, fp32 ``[b, n, s, 1]``."""
    output, logs = _new_heads(query, value.shape[-1], query.dtype), _new_heads(query, 1, torch.float32)
    keys, values = _less_one(key), value.flatten(0, 1)
    queries, outputs, all_logs = (_grouped(tensor, key.shape[1]) for tensor in (query, output, logs))
    for groups, rows in _pieces(queries):
        here, count = (groups, slice(None), rows), rows.stop - rows.start
        part, seen = queries[here].flatten(1, 2), keys[groups, : rows.stop]
        largest = _largest(part, seen, count)
        weights = _weights(part, largest, seen, count, scale)
        total = weights.sum(dim=-1, keepdim=True, dtype=torch.float32)
        outputs[here] = (torch.bmm(weights, values[groups, : rows.stop]) / total).view_as(outputs[here])
        all_logs[here] = total.log_().div_(scale).add_(largest).view_as(all_logs[here])
    return output, logs


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        output, logs = (_by_flash if _flash_takes(query, key, value) else _by_products)(query, key, value, scale)
        ctx.save_for_backward(query, key, value, output, logs)
        ctx.scale = scale
        return output

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Grads:
        query, key, value, output, logs = ctx.saved_tensors
        mean = output.float().mul_(dy).sum(dim=-1, keepdim=True)
        grads = [_new_heads(tensor, tensor.shape[-1], torch.float32) for tensor in (key, value)]
        key_grad, value_grad = (grad.flatten(0, 1) for grad in grads)
        query_grad = _new_heads(query, query.shape[-1], query.dtype)
        keys, values = _less_one(key), _less_one(value)
        queries, query_grads, dys, means, all_logs = (_grouped(tensor, key.shape[1]) for tensor in (query, query_grad, dy, mean, logs))
        for groups, rows in _pieces(queries):
            here, seen, count = (groups, slice(None), rows), (groups, slice(rows.stop)), rows.stop - rows.start
            part, part_dy, part_logs, part_means = (tensor[here].flatten(1, 2) for tensor in (queries, dys, all_logs, means))
            weights = _weights(part, part_logs, keys[seen], count, ctx.scale)
            scores_grad = _less(part_dy, part_means, values[seen], 1.0).mul_(weights)
            query_grads[here] = _scaled_product(scores_grad, keys[seen][..., :-2], ctx.scale).view_as(query_grads[here])
            for total, left, right, scale in ((key_grad, scores_grad, part, ctx.scale), (value_grad, weights, part_dy, 1.0)):
                summand = _scaled_product(left.mT, right, scale)
                if rows.stop == queries.shape[2]:  # the first for these groups
                    total[groups] = summand
                else:
                    total[seen] += summand
        return query_grad, grads[0].to(key.dtype), grads[1].to(value.dtype), None


def causal_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> torch.Tensor:
    """:func:`mindspeed_lora.ops.eager.attention` of bf16 with ``is_causal``, no mask and as many keys as queries."""
    return _CausalAttention.apply(query, key, value, scale or 1.0 / math.sqrt(query.shape[-1]))
