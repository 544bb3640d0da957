"""The language-model head and its loss in one function, so that ``[tokens, vocabulary]`` logits never exist.

One sweep over this rank's rows W of the head but the target's, a block at a time, as flash attention sweeps over keys:

    z = hidden W_block^T in fp32                   m' = max(m, rowmax z)
    l = l e^(m - m') + rowsum e^(z - m')           G = G e^(m - m') + e^(z - m') W_block

Then, with d = log l + m - z_target, -log p = log(1 + e^d), and its gradient with respect to hidden is sigmoid(d) (G / l - W_target).
The target stands apart because it is nearly the whole softmax of a sure token, beside which 16-bit products round the others away.
Over tp ranks m is a maximum, l and z_target are sums: two small collectives per chunk of tokens. Only trained positions come in, so
prompt and padding cost nothing. Backward scales the stored gradient by what arrives per token; a trained head forms its weight
gradient there, block by block, from the logits computed once more.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

from mindspeed_lora.ops import exp_
from mindspeed_lora.ops.products import add_product, product, product_dtype
from mindspeed_lora.parallel.collectives import all_reduce
from mindspeed_lora.parallel.context import ParallelContext


class Tile(NamedTuple):
    """What is worked on at once: so many ``tokens``, and of their fp32 ``logits`` so many."""

    tokens: int
    logits: int

    def columns(self, tokens: int) -> int:
        """Columns of the vocabulary for so many tokens."""
        return max(256, self.logits // max(1, min(tokens, self.tokens)) // 256 * 256)


def tile_of(device_type: str) -> Tile:
    """8 MiB on a CPU, so that the passes over them run in its caches; 256 MiB on a device."""
    return Tile(1024, 1 << 21) if device_type == "cpu" else Tile(8192, 1 << 26)


class _Slice:
    """This rank's columns of the vocabulary; ``valid`` of them are real, the rest are padding and never win."""

    def __init__(self, weight: torch.Tensor, vocab_size: int, context: ParallelContext) -> None:
        self.weight, self.rows = weight, weight.shape[0]
        self.first = context.tp_rank * self.rows
        self.valid = max(0, min(self.rows, vocab_size - self.first))
        self.group = context.tp_group
        self.tile = tile_of(weight.device.type)

    def chunks(self, tokens: int) -> Iterator[slice]:
        """Tokens that are worked on together."""
        return (slice(start, start + self.tile.tokens) for start in range(0, tokens, self.tile.tokens))

    def blocks(self, tokens: int, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
        """(columns, rows of the head in ``dtype``) of each block, real columns only."""
        size = self.tile.columns(tokens)
        for start in range(0, self.valid, size):
            columns = slice(start, min(start + size, self.valid))
            yield columns, self.weight[columns].to(dtype)

    def local_target(self, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Column of each target on this rank (0 where it is not here) and whether it is here, both ``[n, 1]``."""
        local = target.unsqueeze(1) - self.first
        here = (local >= 0) & (local < self.valid)
        return local.masked_fill_(~here, 0), here

    def block_target(self, local: torch.Tensor, here: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Number of the block (of so many ``tokens``) that holds each target, -1 where none does, and its column there, ``[n, 1]``."""
        size = self.tile.columns(tokens)
        return local.floor_divide(size).masked_fill_(~here, -1), local % size


def _logits(hidden: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """``[n, h]``, ``[columns, h]`` -> ``[n, columns]`` float32 or wider."""
    logits = product(hidden, block.t())
    return logits.float() if logits.dtype.itemsize == 2 else logits


def _add_product(sums: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``sums += left right``, multiplied in the dtype of ``right``."""
    return add_product(sums, left, right) if right.dtype == sums.dtype else sums.add_(left.to(right.dtype) @ right)


def _sweep(
    part: _Slice, hidden: torch.Tensor, target: torch.Tensor, with_grad: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(-log p of the target ``[n]``, log of the softmax's sum ``[n]``, gradient of hidden ``[n, h]`` or None), fp32 or wider."""
    wide = hidden.to(product_dtype(hidden))
    statistics = torch.promote_types(hidden.dtype, torch.float32)
    largest = hidden.new_full((hidden.shape[0], 1), torch.finfo(statistics).min, dtype=statistics)
    total = torch.zeros_like(largest)
    target_logit = torch.zeros_like(largest)
    grad = torch.zeros(hidden.shape, dtype=statistics, device=hidden.device) if with_grad else None
    local, here = part.local_target(target)
    owner, place = part.block_target(local, here, hidden.shape[0])
    for number, (_, block) in enumerate(part.blocks(hidden.shape[0], wide.dtype)):
        logits = _logits(wide, block)
        inside, column = owner == number, place.clamp(max=block.shape[0] - 1)
        picked = logits.gather(1, column)
        target_logit = torch.where(inside, picked, target_logit)
        logits.scatter_(1, column, picked.masked_fill_(inside, float("-inf")))
        risen = torch.maximum(largest, logits.amax(dim=1, keepdim=True))
        shrink = (largest - risen).exp_()
        exponentials = exp_(logits.sub_(risen))
        total.mul_(shrink).add_(exponentials.sum(dim=1, keepdim=True))
        if grad is not None:
            _add_product(grad.mul_(shrink), exponentials, block)
        largest = risen
    return _over_ranks(part, largest, total, target_logit, grad, local, here)


def _over_ranks(
    part: _Slice,
    largest: torch.Tensor,
    total: torch.Tensor,
    target_logit: torch.Tensor,
    grad: torch.Tensor | None,
    local: torch.Tensor,
    here: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Join the ranks' sweeps, ``[n, 1]`` each; a rank of nothing but padding brings the smallest m and sums of 0."""
    everywhere = all_reduce(largest.clone(), part.group, dist.ReduceOp.MAX)
    shrink = (largest - everywhere).exp_()
    total, target_logit = all_reduce(torch.stack([total * shrink, target_logit]), part.group)
    surplus = total.log().add_(everywhere).sub_(target_logit)
    if grad is not None:
        missed = surplus.sigmoid()  # 1 - p
        grad.mul_(missed * shrink / total)
        grad.addcmul_(part.weight[local.squeeze(1)].to(grad.dtype), missed * here, value=-1)
    losses = F.softplus(surplus)
    return losses.squeeze(1), (losses + target_logit).squeeze(1), grad


def _weight_grad(part: _Slice, hidden: torch.Tensor, target: torch.Tensor, log_sum: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """d loss / d W ``[v/t, h]`` in W's dtype: (p - onehot)^T (grad hidden), a block of columns after the other."""
    wide = hidden.to(product_dtype(hidden))
    weight_grad = torch.empty_like(part.weight)
    weight_grad[part.valid :] = 0.0
    owner, place = part.block_target(*part.local_target(target), hidden.shape[0])
    for number, (columns, block) in enumerate(part.blocks(hidden.shape[0], wide.dtype)):
        sums = None
        for rows in part.chunks(hidden.shape[0]):
            logit_grad = exp_(_logits(wide[rows], block).sub_(log_sum[rows].unsqueeze(1)))
            inside, column = owner[rows] == number, place[rows].clamp(max=block.shape[0] - 1)
            logit_grad.scatter_add_(1, column, -inside.to(logit_grad.dtype))
            left, right = logit_grad.mul_(grad[rows].unsqueeze(1)).t(), wide[rows]
            sums = product(left.to(right.dtype), right) if sums is None else _add_product(sums.to(log_sum.dtype), left, right)
        weight_grad[columns] = 0.0 if sums is None else sums
    return weight_grad


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        target: torch.Tensor,
        vocab_size: int,
        context: ParallelContext,
        need_hidden_grad: bool,
    ) -> torch.Tensor:
        part = _Slice(weight, vocab_size, context)
        losses = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
        log_sums = hidden.new_empty(hidden.shape[0], dtype=torch.promote_types(hidden.dtype, torch.float32))
        kept = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype  # the loss scale, which fp16 needs, comes in backward
        hidden_grad = torch.empty_like(hidden, dtype=kept) if need_hidden_grad else None
        for rows in part.chunks(hidden.shape[0]):
            losses[rows], log_sums[rows], grad = _sweep(part, hidden[rows], target[rows], need_hidden_grad)
            if hidden_grad is not None and grad is not None:
                hidden_grad[rows] = grad
        ctx.vocab_size, ctx.context, ctx.dtype = vocab_size, context, hidden.dtype
        ctx.save_for_backward(hidden_grad, target, *((hidden, weight, log_sums) if weight.requires_grad else ()))
        return losses

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_grad, target, *trained = ctx.saved_tensors
        weight_grad = None
        if ctx.needs_input_grad[1]:
            hidden, weight, log_sums = trained
            weight_grad = _weight_grad(_Slice(weight, ctx.vocab_size, ctx.context), hidden, target, log_sums, grad)
        scaled = None if hidden_grad is None else (hidden_grad * grad.unsqueeze(1)).to(ctx.dtype)
        return scaled, weight_grad, None, None, None, None


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, vocab_size: int, context: ParallelContext
) -> torch.Tensor:
    """-log p(target) of each token.

    Args:
        hidden: ``[n, h]``, identical on all tp ranks; its gradient is this rank's part of the sum over tp.
        weight: ``[v/t, h]``, this rank's rows of the head.
        target: ``[n]`` int64 vocabulary ids below ``vocab_size``, none ignored.
        vocab_size: ids from here on are padding rows and get no probability.

    Returns:
        ``[n]`` float32, identical on all tp ranks.
    """
    return _LinearCrossEntropy.apply(hidden, weight, target, vocab_size, context, torch.is_grad_enabled() and hidden.requires_grad)
