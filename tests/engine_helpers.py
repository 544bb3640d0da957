"""Build our model from a folder, in one process or on a rank of the pool, and reference values from transformers + PEFT."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from mindspeed_lora.arguments.configs import ArchitectureFlags, RecomputeFlags
from mindspeed_lora.checkpoint.load import base_name, load_adapter, load_base
from mindspeed_lora.checkpoint.resolve import resolve_lora, resolve_model_config
from mindspeed_lora.lora.inject import inject_lora
from mindspeed_lora.model.stage import GPTStage, build_stage_modules
from mindspeed_lora.parallel.context import ParallelContext, single_process_context
from mindspeed_lora.parallel.on_demand import BaseStorage
from mindspeed_lora.weights.config import Layout
from mindspeed_lora.weights.lora_spec import LoraSpec
from mindspeed_lora.weights.sources import open_adapter, open_base
from mindspeed_lora.weights.table import Row, WeightTable, named_slices

TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
SPEC = LoraSpec(4, 8.0, TARGETS)


@dataclass(frozen=True)
class Engine:
    """A loaded model and what is needed to run it."""

    stages: list[GPTStage]
    table: WeightTable
    context: ParallelContext


def build_engine(
    folder: Path,
    context: ParallelContext | None = None,
    lora: LoraSpec | None = None,
    fusion: bool = False,
    dtype: torch.dtype = torch.float32,
    layers_per_virtual_stage: int | None = None,
    recompute: RecomputeFlags | None = None,
    random_b: bool = True,
    make_storage: Callable[[], BaseStorage] | None = None,
    adapter: Path | None = None,
) -> Engine:
    """Load ``folder`` at the context's layout; LoRA's B gets values (a zero B hides mistakes in A's path), or those of ``adapter``."""
    context = context or single_process_context()
    base = open_base(folder)
    config = resolve_model_config(base, ArchitectureFlags(), Layout(context.tp_size, expert_tensor_parallel_size=context.experts.tp_size))
    table = WeightTable(config)
    stages = build_stage_modules(config, context, dtype, layers_per_virtual_stage, recompute, make_storage)
    if lora is not None:
        for stage in stages:
            inject_lora(stage, table, lora, context, fusion, seed=7)
            if random_b:
                fill_b(stage, table, context)
    load_base(stages, base, table, context)
    if adapter is not None:
        opened = open_adapter(adapter)
        spec = resolve_lora(None, opened, table)
        assert spec is not None
        for stage in stages:
            inject_lora(stage, table, spec, context, fusion)
        load_adapter(stages, opened, table, context)
    return Engine(stages, table, context)


@torch.no_grad()
def fill_b(stage: GPTStage, table: WeightTable, context: ParallelContext) -> None:
    """Give each B this rank's part of a whole matrix that depends on the name only."""
    for name, parameter in named_slices(stage.named_parameters(), stage.experts):
        if ".lora_B." in name:
            row, layer = table.parse(base_name(name))
            parts = lora_b_parts(row, layer, parameter.shape[1])
            parameter.copy_(table.shard(table.lora_row(name), parts, *context.cut(row.expert is not None)))


def lora_b_parts(row: Row, layer: int | None, r: int) -> list[torch.Tensor]:
    """B of each Hugging Face module of ``row``, ``[out, r]``."""
    generator = torch.Generator().manual_seed(1000 + hash_name(row.megatron) + (layer or 0))
    sizes = [shape[0] for shape in row.part_shapes]
    return [0.05 * torch.randn(size, r, generator=generator) for size in sizes]


def hash_name(name: str) -> int:
    """Small and equal in all processes (``hash`` is not)."""
    return sum(ord(letter) * (index + 1) for index, letter in enumerate(name)) % 9973


def batch(rows: int = 4, length: int = 16, vocab_size: int = 320, seed: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids, shifted labels (some ignored, last position always) and row weights that sum the loss to a token mean."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocab_size, (rows, length), generator=generator)
    labels = torch.full_like(ids, -100)
    labels[:, :-1] = ids[:, 1:]
    labels[:, : length // 4] = -100
    labels[-1, length // 2 :] = -100
    weights = torch.full((rows,), 1.0 / int((labels != -100).sum()))
    return ids, labels, weights
