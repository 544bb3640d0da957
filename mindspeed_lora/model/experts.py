"""A mixture of experts in the place of a layer's MLP: router, routed experts, shared expert.

::

    hidden [s, b, h] -> tokens [n, h] -> router: top k of E experts, weights [n, k]
      rows [n k, h], sorted by expert -> fc1, SwiGLU, fc2 of each expert -> back in order, weighted, summed over k
      + shared expert (Qwen2-MoE: times its gate)

The experts are cut over TP like an MLP, all of them at once: the tokens are gathered once before (with sequence parallelism) and
the ranks' shares of the result are summed once after, whatever the number of experts. What lies between computes shares, so
gradients of replicated parameters are partial over TP (``grad_sum`` "always" in the weight table). No token is dropped and none
is padded; an expert without tokens computes nothing and gets a zero gradient.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from mindspeed_lora import ops
from mindspeed_lora.model.router import Router
from mindspeed_lora.ops.permute import permute, sort_by_expert, unpermute
from mindspeed_lora.parallel.context import ParallelContext
from mindspeed_lora.parallel.grouped import GroupedLinear
from mindspeed_lora.parallel.layers import ColumnParallelLinear, RowParallelLinear, enter_column, leave_row
from mindspeed_lora.weights.config import ExpertShape, ModelConfig


class RoutedExperts(nn.Module):
    """The experts of this rank; ``linear_fc1`` holds [gate | up] of each."""

    def __init__(self, config: ModelConfig, shape: ExpertShape, context: ParallelContext, dtype: torch.dtype) -> None:
        super().__init__()
        width = shape.ffn_hidden_size // context.tp_size
        self.linear_fc1 = GroupedLinear(shape.count, config.hidden_size, 2 * width, dtype, context.device)
        self.linear_fc2 = GroupedLinear(shape.count, width, config.hidden_size, dtype, context.device)
        self.num_experts = shape.count

    def forward(self, tokens: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """tokens ``[n, h]``, weights and experts ``[n, k]`` -> this rank's share of the weighted sum ``[n, h]``."""
        order = sort_by_expert(experts, self.num_experts)
        rows = self.linear_fc1(permute(tokens, order), order.groups)
        return unpermute(self.linear_fc2(ops.swiglu(rows), order.groups), order, weights)


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
        self.experts = RoutedExperts(config, config.experts, inside, dtype)
        self.shared_experts = SharedExperts(config, config.experts, inside, dtype) if config.experts.shared_ffn_hidden_size else None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[s, b, h]`` (SP: ``[s/t, b, h]``) -> the same."""
        whole = enter_column(hidden, self.context)
        tokens = whole.flatten(0, 1)
        share = self.experts(tokens, *self.router(tokens))
        if self.shared_experts is not None:
            share = share + self.shared_experts(tokens)
        return leave_row(share.view_as(whole), self.context)
