"""Which parameters a rank trains, described for the flat buffers by the weight table."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from mindspeed_lora.checkpoint.resume import table_row
from mindspeed_lora.parallel.context import ParallelContext
from mindspeed_lora.training.flat import TrainedParameter
from mindspeed_lora.weights.table import WeightTable, is_shared

_EMBEDDING = "embedding.word_embeddings.weight"


def trained_parameters(stages: Sequence[nn.Module], table: WeightTable, context: ParallelContext) -> list[TrainedParameter]:
    """This rank's trainable parameters in the model's order.

    A tied embedding has two copies where the first and the last stage differ: both are ``tied``, the second is not counted.
    """
    trained = []
    two_copies = table.config.tied_embeddings and context.pp_size > 1
    for stage in stages:
        for name, parameter in stage.named_parameters():
            if not parameter.requires_grad:
                continue
            row, shared = table_row(table, name), is_shared(name, parameter)
            tp_size = context.cut(row.expert is not None)[1]
            partial = tp_size > 1 and (row.grad_sum == "always" or (row.grad_sum == "sp" and context.sequence_parallel))
            if shared and tp_size < context.tp_size:  # of whole experts: each TP rank has the gradient of its tokens and experts
                partial = True
            trained.append(
                TrainedParameter(
                    name,
                    parameter,
                    cut=row.axis is not None and tp_size == context.tp_size,
                    partial=partial,
                    counted=row.alias_of is None,
                    tied=two_copies and _EMBEDDING in (row.megatron, row.alias_of),
                    of_expert=row.expert is not None and not shared,  # a shared one lies everywhere, like a dense one
                )
            )
    return trained
