"""A mixture of experts in the place of a layer's MLP: router, routed experts, shared expert.

::

    hidden [s, b, h] -> tokens [n, h] -> router: top k of E experts, weights [n, k]
      rows [n k, h], sorted by expert -> fc1, SwiGLU, fc2 of each expert -> back in order, weighted, summed over k
      + shared expert (Qwen2-MoE: times its gate)

The experts are cut over TP like an MLP, all of them at once: the tokens are gathered once before (with sequence parallelism) and
the ranks' shares of the result are summed once after, whatever the number of experts. What lies between computes shares, so
gradients of replicated parameters are partial over TP (``grad_sum`` "always" in the weight table). No token is dropped and none
is padded; an expert without tokens computes nothing and gets a zero gradient.

| EP > 1                        | the sorted rows of this rank                                                      |
|-------------------------------|-----------------------------------------------------------------------------------|
| each rank has its own tokens  | travel to the ranks that hold their experts, results travel back (training)       |
| all have the same tokens      | each rank computes its experts' rows, results are summed over EP (asking)         |

Experts that are not cut over TP (expert tensor parallel size 1) get from each TP rank its part of the tokens: its section of the
sequence with sequence parallelism, else one of t parts. The router works on the same tokens, so its gradient stays partial over TP.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from mindspeed_lora import ops
from mindspeed_lora.model.balance import LayerBalance
from mindspeed_lora.model.router import Router
from mindspeed_lora.ops.grouped import RowGroups
from mindspeed_lora.ops.permute import permute, sort_by_expert, unpermute
from mindspeed_lora.parallel.collectives import all_reduce
from mindspeed_lora.parallel.context import ParallelContext
from mindspeed_lora.parallel.dispatch import from_experts, plan_exchange, to_experts
from mindspeed_lora.parallel.grouped import GroupedLinear
from mindspeed_lora.parallel.layers import ColumnParallelLinear, RowParallelLinear, enter_column, leave_row
from mindspeed_lora.weights.config import ExpertShape, ModelConfig


class RoutedExperts(nn.Module):
    """The experts of this rank; ``linear_fc1`` holds [gate | up] of each."""

    def __init__(self, config: ModelConfig, shape: ExpertShape, context: ParallelContext, dtype: torch.dtype) -> None:
        super().__init__()
        self.range, self.grid = context.own_experts(shape.count), context.experts
        width = shape.ffn_hidden_size // self.grid.tp_size
        self.linear_fc1 = GroupedLinear(len(self.range), config.hidden_size, 2 * width, dtype, context.device)
        self.linear_fc2 = GroupedLinear(len(self.range), width, config.hidden_size, dtype, context.device)
        self.num_experts = shape.count

    def forward(self, tokens: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """tokens ``[n, h]``, weights and experts ``[n, k]`` -> the weighted sum ``[n, h]``, where experts are cut this rank's share."""
        if self.grid.ep_group is not None and self.grid.same_tokens:
            return all_reduce(self._own_part(tokens, weights, experts), self.grid.ep_group)
        order = sort_by_expert(experts, self.num_experts)
        rows = permute(tokens, order)
        if self.grid.ep_group is None:
            return unpermute(self._compute(rows, order.groups), order, weights)
        exchange = plan_exchange(order.groups.counts, self.grid.ep_group)
        rows = self._compute(to_experts(rows, exchange), exchange.groups)
        return unpermute(from_experts(rows, exchange), order, weights)

    def _compute(self, rows: torch.Tensor, groups: RowGroups) -> torch.Tensor:
        """rows ``[m, h]`` of this rank's experts, sorted -> the same."""
        return self.linear_fc2(ops.swiglu(self.linear_fc1(rows, groups)), groups)

    def _own_part(self, tokens: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """As :meth:`forward`, of this rank's experts alone; the rows of others are sorted behind theirs and count as zero."""
        local = experts - self.range.start
        local = local.where((local >= 0) & (local < len(self.range)), len(self.range))
        order = sort_by_expert(local, len(self.range) + 1)
        own = RowGroups(order.groups.counts[:-1])
        rows = self._compute(permute(tokens, order)[: sum(own.lengths)], own)
        return unpermute(F.pad(rows, (0, 0, 0, experts.numel() - len(rows))), order, weights)


class SharedExperts(nn.Module):
    """An MLP that every token takes; with a gate where the family has one. ``gate_weight`` ``[1, h]``."""

    def __init__(self, config: ModelConfig, shape: ExpertShape, context: ParallelContext, dtype: torch.dtype) -> None:
        super().__init__()
        size, width = config.hidden_size, shape.shared_ffn_hidden_size
        self.linear_fc1 = ColumnParallelLinear(size, 2 * width, context, dtype=dtype)
        self.linear_fc2 = RowParallelLinear(width, size, context, dtype)
        gate = torch.empty(1, size, dtype=dtype, device=context.device) if shape.shared_gate else None
        self.gate_weight = None if gate is None else nn.Parameter(gate)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """``[n, h]`` -> this rank's share ``[n, h]``."""
        output = self.linear_fc2(ops.swiglu(self.linear_fc1(tokens)))
        return output if self.gate_weight is None else output * F.linear(tokens, self.gate_weight).sigmoid()


class MixtureOfExperts(nn.Module):
    """Takes the place of :class:`mindspeed_lora.model.layers.MLP`."""

    def __init__(self, config: ModelConfig, context: ParallelContext, dtype: torch.dtype) -> None:
        super().__init__()
        assert config.experts is not None
        self.context = context
        inside = replace(context, tp_group=None, sequence_parallel=False)  # sizes are cut, nothing is communicated
        self.router = Router(config, config.experts, context, dtype)
        self.experts = RoutedExperts(config, config.experts, context, dtype)
        self.shared_experts = SharedExperts(config, config.experts, inside, dtype) if config.experts.shared_ffn_hidden_size else None

    def forward(self, hidden: torch.Tensor, balance: LayerBalance | None = None) -> torch.Tensor:
        """``[s, b, h]`` (SP: ``[s/t, b, h]``) -> the same."""
        context = self.context
        if context.experts.tp_size < context.tp_size and context.sequence_parallel:
            return self._by_section(hidden, balance)
        whole = enter_column(hidden, context)
        tokens = whole.flatten(0, 1)
        whole_experts = context.experts.tp_size < context.tp_size
        share = self._share_of_whole_experts(tokens, balance) if whole_experts else self._routed(tokens, balance)
        if self.shared_experts is not None:
            share = share + self.shared_experts(tokens)
        return leave_row(share.view_as(whole), context)

    def _routed(self, tokens: torch.Tensor, balance: LayerBalance | None) -> torch.Tensor:
        return self.experts(tokens, *self.router(tokens, balance))

    def _by_section(self, hidden: torch.Tensor, balance: LayerBalance | None) -> torch.Tensor:
        """Uncut experts with sequence parallelism: the routed part needs no other rank's section, the shared one does."""
        routed = self._routed(hidden.flatten(0, 1), balance).view_as(hidden)
        if self.shared_experts is None:
            return routed
        whole = enter_column(hidden, self.context)
        return routed + leave_row(self.shared_experts(whole.flatten(0, 1)).view_as(whole), self.context)

    def _share_of_whole_experts(self, tokens: torch.Tensor, balance: LayerBalance | None) -> torch.Tensor:
        """Uncut experts without it: ``[n, h]`` with the results of this rank's part of the tokens, zero elsewhere."""
        size, rank = self.context.tp_size, self.context.tp_rank
        if self.context.experts.same_tokens:  # all ranks compute all tokens, one of them gives the result
            routed = self._routed(tokens, balance)
            return routed if rank == 0 else torch.zeros_like(routed)
        start, stop = rank * len(tokens) // size, (rank + 1) * len(tokens) // size
        return F.pad(self._routed(tokens[start:stop], balance), (0, 0, start, len(tokens) - stop))
