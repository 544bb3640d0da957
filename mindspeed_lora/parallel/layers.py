"""Linear layers and the embedding, cut over the tensor-parallel group.

| layer                  | weight per rank | input                    | output                                  |
|------------------------|-----------------|--------------------------|-----------------------------------------|
| ColumnParallelLinear   | [out/t, in]     | [s, b, in] (SP: [s/t..]) | [s, b, out/t]                           |
| RowParallelLinear      | [out, in/t]     | [s, b, in/t]             | [s, b, out] (SP: [s/t, b, out])         |
| ReplicatedLinear       | [out, in]       | [s or s/t, b, in]        | of the same rows                        |
| VocabParallelEmbedding | [v/t, h]        | ids [b, s]               | [s, b, h] (SP: [s/t, b, h])             |

SP = ``context.sequence_parallel``. Source: Shoeybi et al., "Megatron-LM" (2019).
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from mindspeed_lora import ops
from mindspeed_lora.parallel.collectives import copy_to_tp, gather_from_sequence, reduce_from_tp, scatter_to_sequence
from mindspeed_lora.parallel.context import ParallelContext

EVERY = slice(None)


def enter_column(x: torch.Tensor, context: ParallelContext) -> torch.Tensor:
    """The whole sequence on every rank, with the backward that sums the ranks' gradients."""
    enter = gather_from_sequence if context.sequence_parallel else copy_to_tp
    return enter(x, context.tp_group)


def leave_row(partial: torch.Tensor, context: ParallelContext) -> torch.Tensor:
    """Sum the ranks' partial results, scattered over the sequence with SP."""
    leave = scatter_to_sequence if context.sequence_parallel else reduce_from_tp
    return leave(partial, context.tp_group)


class _ParallelLinear(nn.Module):
    """What both linear layers share; ``in_features`` and ``out_features`` are the local sizes (as peft reads them)."""

    def __init__(self, in_features: int, out_features: int, context: ParallelContext, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features, self.context = in_features, out_features, context
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype, device=context.device))
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=context.device)) if bias else None

    def low_rank(self) -> tuple[torch.Tensor, torch.Tensor, float | torch.Tensor] | None:
        """A ``[r, in]``, B ``[out, r]`` and scale of what is added to the weight; None: nothing. LoRA layers have it too."""
        return None


class ColumnParallelLinear(_ParallelLinear):
    """``y_i = x W_i^T + b_i``: the outputs are cut. ``in_size``, ``out_size`` are the whole layer's."""

    def __init__(
        self, in_size: int, out_size: int, context: ParallelContext, bias: bool = False, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(in_size, out_size // context.tp_size, context, bias, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[s, b, in]`` (SP: ``[s/t, b, in]``) -> ``[s, b, out/t]``."""
        return ops.linear(enter_column(x, self.context), self.weight, self.bias)


class RowParallelLinear(_ParallelLinear):
    """``y = sum_i x_i W_i^T``: the inputs are cut."""

    def __init__(self, in_size: int, out_size: int, context: ParallelContext, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(in_size // context.tp_size, out_size, context, False, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[s, b, in/t]`` -> ``[s, b, out]`` (SP: ``[s/t, b, out]``)."""
        return leave_row(ops.linear(x, self.weight), self.context)


class ReplicatedLinear(_ParallelLinear):
    """``y = x W^T`` on every rank for its own x, all outputs or some; whoever calls it knows whose gradients are then partial."""

    def __init__(self, in_size: int, out_size: int, context: ParallelContext, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(in_size, out_size, replace(context, tp_group=None, sequence_parallel=False), False, dtype)

    def forward(self, x: torch.Tensor, outputs: slice = EVERY) -> torch.Tensor:
        """``[..., in]`` -> ``[..., out]``, or those of ``outputs``."""
        return ops.linear(x, self.weight[outputs])


class VocabParallelEmbedding(nn.Module):
    """Rank i holds the rows ``[i v/t, (i+1) v/t)``; ids outside give zero rows, and the ranks' results are summed."""

    def __init__(self, vocab_size: int, hidden_size: int, context: ParallelContext, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.context = context
        self.rows = vocab_size // context.tp_size
        self.weight = nn.Parameter(torch.empty(self.rows, hidden_size, dtype=dtype, device=context.device))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids ``[b, s]`` -> ``[s, b, h]`` (SP: this rank's ``[s/t, b, h]``)."""
        ids = ids.transpose(0, 1)
        if self.context.tp_group is None:
            return F.embedding(ids, self.weight)
        local = ids - self.context.tp_rank * self.rows
        foreign = (local < 0) | (local >= self.rows)
        partial = F.embedding(local.masked_fill(foreign, 0), self.weight).masked_fill(foreign.unsqueeze(-1), 0)
        return leave_row(partial, self.context)
