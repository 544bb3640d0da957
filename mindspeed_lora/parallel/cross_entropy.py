"""The language-model head and its loss in one function, so that ``[tokens, vocabulary]`` logits never exist at once.

For each chunk of tokens: logits of this rank's vocabulary slice in fp32, the softmax's maximum and sum over the
tensor-parallel group, the target's logit, and (in training) the gradient of the hidden states. Only trained positions
come in, so prompt and padding cost nothing. Backward scales the stored gradient by what arrives per token; a trained
head recomputes each chunk's logits for its weight gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from mindspeed_lora.parallel.collectives import all_reduce
from mindspeed_lora.parallel.context import ParallelContext

CHUNK_TOKENS = 1024


class _Slice:
    """This rank's columns of the vocabulary; ``valid`` of them are real, the rest are padding and never win."""

    def __init__(self, rows: int, vocab_size: int, context: ParallelContext) -> None:
        self.first, self.rows = context.tp_rank * rows, rows
        self.valid = max(0, min(rows, vocab_size - self.first))
        self.group = context.tp_group

    def logits(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """``[n, h] -> [n, v/t]`` float32."""
        logits = (hidden @ weight.t()).float()
        if self.valid < self.rows:
            logits[:, self.valid :] = float("-inf")
        return logits

    def local_target(self, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Column of each target on this rank (0 where it is not here) and whether it is here."""
        local = target - self.first
        here = (local >= 0) & (local < self.rows)
        return local.masked_fill(~here, 0), here

    def normalise(self, logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Turn ``logits`` into probabilities in place; returns (-log p of the target ``[n]``, probabilities)."""
        largest = all_reduce(logits.max(dim=-1).values, self.group, dist.ReduceOp.MAX)
        local, here = self.local_target(target)
        target_logit = logits.gather(1, local.unsqueeze(1)).squeeze(1).masked_fill(~here, 0.0)
        probabilities = logits.sub_(largest.unsqueeze(1)).exp_()
        total, target_logit = all_reduce(torch.stack([probabilities.sum(dim=-1), target_logit]), self.group)
        return total.log() + largest - target_logit, probabilities.div_(total.unsqueeze(1))

    def subtract_target(self, probabilities: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """d(-log p)/d logits = probabilities - onehot(target), in place."""
        local, here = self.local_target(target)
        return probabilities.scatter_add_(1, local.unsqueeze(1), -here.to(probabilities.dtype).unsqueeze(1))


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
        part = _Slice(weight.shape[0], vocab_size, context)
        losses = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
        hidden_grad = torch.empty_like(hidden) if need_hidden_grad else None
        for start in range(0, hidden.shape[0], CHUNK_TOKENS):
            rows = slice(start, start + CHUNK_TOKENS)
            losses[rows], probabilities = part.normalise(part.logits(hidden[rows], weight), target[rows])
            if hidden_grad is not None:
                hidden_grad[rows] = part.subtract_target(probabilities, target[rows]).to(weight.dtype) @ weight
        ctx.part = part
        ctx.save_for_backward(hidden_grad, target, *((hidden, weight) if weight.requires_grad else ()))
        return losses

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_grad, target, *trained = ctx.saved_tensors
        weight_grad = None
        if ctx.needs_input_grad[1]:
            hidden, weight = trained
            weight_grad = torch.zeros_like(weight, dtype=torch.float32)
            for start in range(0, hidden.shape[0], CHUNK_TOKENS):
                rows = slice(start, start + CHUNK_TOKENS)
                _, probabilities = ctx.part.normalise(ctx.part.logits(hidden[rows], weight), target[rows])
                logit_grad = ctx.part.subtract_target(probabilities, target[rows]).mul_(grad[rows].unsqueeze(1))
                weight_grad.addmm_(logit_grad.t(), hidden[rows].float())
            weight_grad = weight_grad.to(weight.dtype)
        scaled = None if hidden_grad is None else (hidden_grad * grad.unsqueeze(1)).to(hidden_grad.dtype)
        return scaled, weight_grad, None, None, None, None


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, vocab_size: int, context: ParallelContext
) -> torch.Tensor:
    """-log p(target) of each token.

    Args:
        hidden: ``[n, h]``, identical on all tp ranks; its gradient is this rank's part of the sum over tp.
        weight: ``[v/t, h]``, this rank's rows of the head.
        target: ``[n]`` int64 vocabulary ids, none ignored.
        vocab_size: ids from here on are padding rows and get no probability.

    Returns:
        ``[n]`` float32, identical on all tp ranks.
    """
    return _LinearCrossEntropy.apply(hidden, weight, target, vocab_size, context, torch.is_grad_enabled() and hidden.requires_grad)
