"""Fills a rank's stages from any checkpoint, whatever layout it was written in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from mindspeed_lora.errors import CheckpointError
from mindspeed_lora.model.stage import GPTStage
from mindspeed_lora.parallel.context import ParallelContext
from mindspeed_lora.parallel.on_demand import BaseStorage
from mindspeed_lora.weights.sources import Adapter, Base
from mindspeed_lora.weights.table import WeightTable, named_slices


@dataclass(frozen=True)
class LoadReport:
    """How many tensors of this rank came from where; had one been missing, loading would have failed."""

    base: int = 0
    adapter: int = 0


def _copy(parameter: torch.Tensor, value: torch.Tensor, name: str, source: object) -> None:
    if parameter.shape != value.shape:
        raise CheckpointError(f"{source}: {name} has shape {list(value.shape)} where the model needs {list(parameter.shape)}")
    parameter.copy_(value)


@torch.no_grad()
def load_base(stages: Sequence[GPTStage], base: Base, table: WeightTable, context: ParallelContext) -> LoadReport:
    """Copy every base tensor of this rank, cast to the parameter's dtype.

    Raises:
        CheckpointError: a tensor is missing, left over, or of another shape.
    """
    base.check_coverage(table)
    count = 0
    for stage in stages:
        storage: BaseStorage | None = getattr(stage, "storage", None)
        for stacked, whole in stage.named_parameters():
            if ".lora_" in stacked:
                continue
            holder = None if storage is None else storage.holder(whole)
            for number, (name, parameter) in enumerate(named_slices([(stacked, whole)], stage.experts)):
                row, layer = table.parse(name.replace(".base_layer", ""))
                rank, size = context.cut(row.expert is not None)
                if holder is not None:
                    holder.load(whole, partial(table.shard_rows, row, base.pieces(row, layer), rank, size), number)
                else:
                    _copy(parameter, base.shard(table, row, layer, rank, size), name, base.path)
                count += 1
    return LoadReport(base=count)


@torch.no_grad()
def load_adapter(
    stages: Sequence[GPTStage], adapter: Adapter, table: WeightTable, context: ParallelContext, adapter_name: str = "default"
) -> LoadReport:
    """Copy every LoRA tensor of this rank; ``adapter_name``: which of the stage's adapters it becomes.

    Raises:
        CheckpointError: a tensor is missing or of another shape.
    """
    count = 0
    for stage in stages:
        for name, parameter in named_slices(stage.named_parameters(), stage.experts):
            if ".lora_" not in name or f".{adapter_name}." not in name:
                continue
            lora_row = table.lora_row(name.replace(f".{adapter_name}.", ".default."))
            row, layer = table.parse(base_name(name))
            a, b_parts = adapter.lora_parts(row, layer)
            parts = [a] if ".lora_A." in name else b_parts
            _copy(parameter, table.shard(lora_row, parts, *context.cut(row.expert is not None)), name, adapter.path)
            count += 1
    return LoadReport(adapter=count)


def base_name(lora_name: str) -> str:
    """``...linear_qkv.lora_A.default.weight`` -> ``...linear_qkv.weight``."""
    return lora_name.split(".lora_")[0] + ".weight"
