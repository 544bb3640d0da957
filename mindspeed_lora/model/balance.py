"""Losses that keep a router's experts evenly used, and the tokens of each expert, layer by layer.

::

    w_t   share of token t in the global batch, 0 for padding          (all shares of a global batch sum to 1)
    p_t   scores of token t, summing to 1: softmax of the logits, or sigmoids over their sum
    f_i   share of the choices that fell on expert i, in the micro-batch (or in the token's own row); no gradient flows through it

    load balancing   E  sum_t w_t  sum_i f_i p_ti            Megatron's ``aux_loss`` (``seq_aux_loss``), averaged over the tokens
    z                   sum_t w_t  logsumexp(logits_t)^2     Megatron's ``z_loss``

Each layer's losses, times their coefficients, join the backward pass where the router's weights leave it: their gradient is 1
whatever the loss above, so no stage has to know of another's. A micro-batch counts once, also where its layers are computed again
for the backward pass. Ranks that share tokens over TP each take 1/t of the gradient, ranks that have parts of them all of theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mindspeed_lora.parallel.collectives import all_reduce
from mindspeed_lora.parallel.context import ParallelContext


@dataclass(frozen=True)
class BalanceTerms:
    """What is added to the loss, and whether the tokens of each expert are counted."""

    aux: float = 0.0  # coefficient of the load-balancing loss
    by_row: bool = False  # its f is of a row, not of a micro-batch
    z: float = 0.0
    counts: bool = False


class Balancer:
    """Sums over the micro-batches of a stage, until they are taken and set to zero.

    ``losses`` float32 ``[layers, 2]``: load balancing and z without coefficients. ``counts`` float32 ``[layers, E]``: real tokens.
    Both are this rank's share: summed over TP they are whole. ``layers``: numbers of the stage's layers with experts.
    """

    def __init__(self, terms: BalanceTerms, layers: Sequence[int], num_experts: int, context: ParallelContext) -> None:
        self.terms, self.num_experts, self.context = terms, num_experts, context
        self.index = {layer: place for place, layer in enumerate(layers)}
        self.losses = torch.zeros(len(layers), 2, dtype=torch.float32, device=context.device)
        self.counts = torch.zeros(len(layers), num_experts, dtype=torch.float32, device=context.device)

    def micro_batch(self, shares: torch.Tensor) -> MicroBatch:
        """``shares`` float32 ``[b, s]``: of each token in the global batch, 0 for padding."""
        return MicroBatch(self, shares)


class MicroBatch:
    """One micro-batch on its way through a stage's layers."""

    def __init__(self, balancer: Balancer, shares: torch.Tensor) -> None:
        self.balancer, self.rows = balancer, shares.shape[0]
        self.shares = shares.t().flatten()  # [s b], in the order of the hidden states
        self._seen: set[int] = set()

    def of(self, layer: int) -> LayerBalance:
        """What the layer's router calls."""
        return LayerBalance(self, layer)

    def first_time(self, layer: int) -> bool:
        """Whether the layer has not been counted yet; recomputation comes a second time."""
        if layer in self._seen:
            return False
        self._seen.add(layer)
        return True


@dataclass(frozen=True)
class LayerBalance:
    """A micro-batch in one layer."""

    micro_batch: MicroBatch
    layer: int

    def attach(self, weights: torch.Tensor, logits: torch.Tensor, scores: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """The same weights ``[n, k]``; their backward pass is that of the layer's losses as well.

        logits and scores float32 ``[n, E]``, experts int64 ``[n, k]``: of all the micro-batch's tokens, or of this TP rank's n of them.
        """
        balancer = self.micro_batch.balancer
        terms, context = balancer.terms, balancer.context
        whole = len(self.micro_batch.shares)
        spread = context.experts.tp_size < context.tp_size  # then each TP rank routes its part of the tokens
        start = context.tp_rank * whole // context.tp_size if spread else 0
        part = 1.0 if spread else 1.0 / context.tp_size
        shares = self.micro_batch.shares[start : start + len(experts)]
        zero = shares.new_zeros(())
        aux = part * self._load(shares, start, scores, experts, spread) if terms.aux else zero
        z = part * (shares * logits.logsumexp(-1).square()).sum() if terms.z else zero
        if self.micro_batch.first_time(self.layer):
            self._record(aux, z, part * (shares > 0), experts)
        loss = terms.aux * aux + terms.z * z
        return _Attach.apply(weights, loss) if loss.requires_grad else weights

    def _load(self, shares: torch.Tensor, start: int, scores: torch.Tensor, experts: torch.Tensor, spread: bool) -> torch.Tensor:
        balancer, rows = self.micro_batch.balancer, self.micro_batch.rows if self.micro_batch.balancer.terms.by_row else 1
        num_experts, top_k = balancer.num_experts, experts.shape[1]
        row = torch.arange(start, start + len(experts), device=experts.device).remainder(rows)
        chosen = torch.zeros(rows * num_experts, dtype=torch.float32, device=experts.device)
        chosen.index_add_(0, (row.unsqueeze(1) * num_experts + experts).flatten(), shares.repeat_interleave(top_k))
        if spread:
            all_reduce(chosen, balancer.context.tp_group)
        chosen = chosen.view(rows, num_experts)
        shares_chosen = chosen / chosen.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        probabilities = scores / scores.sum(-1, keepdim=True)
        return num_experts * (shares * (shares_chosen[row] * probabilities).sum(-1)).sum()

    @torch.no_grad()
    def _record(self, aux: torch.Tensor, z: torch.Tensor, real: torch.Tensor, experts: torch.Tensor) -> None:
        balancer = self.micro_batch.balancer
        place = balancer.index[self.layer]
        balancer.losses[place] += torch.stack((aux, z))
        if balancer.terms.counts:
            balancer.counts[place].index_add_(0, experts.flatten(), real.repeat_interleave(experts.shape[1]))


class _Attach(torch.autograd.Function):
    """``weights`` as they are; the loss gets the gradient 1."""

    @staticmethod
    def forward(ctx: Any, weights: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return grad, grad.new_ones(())
