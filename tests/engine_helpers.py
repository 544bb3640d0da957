"""Build our model from a folder, in one process or on a rank of the pool, and reference values from transformers + PEFT."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mindspeed_lora.arguments.configs import ArchitectureFlags, RecomputeFlags
from mindspeed_lora.checkpoint.load import base_name, load_adapter, load_base
from mindspeed_lora.checkpoint.resolve import resolve_lora, resolve_model_config
from mindspeed_lora.lora.inject import inject_lora, kaiming_uniform
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


def peft_twin(reference: Any, table: WeightTable) -> Any:
    """PEFT around ``reference``, a model of transformers, with our A in each of q, k, v (gate, up) and the same B."""
    from peft import LoraConfig, get_peft_model

    leaves = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    twin = get_peft_model(reference, LoraConfig(r=SPEC.r, lora_alpha=SPEC.alpha, target_modules=leaves))
    parameters = dict(twin.named_parameters())
    with torch.no_grad():
        for row, layer in table.target_entries(SPEC.targets):
            a_name = row.name(layer).removesuffix("weight") + "lora_A.default.weight"
            for name, part in zip(row.hf_names(layer), lora_b_parts(row, layer, SPEC.r), strict=True):
                stem = "base_model.model." + name.removesuffix("weight")
                a = parameters[f"{stem}lora_A.default.weight"]
                a.copy_(kaiming_uniform(a_name, 7, *a.shape))
                parameters[f"{stem}lora_B.default.weight"].copy_(part)
    return twin


def reference_loss(model: Any) -> torch.Tensor:
    """Of :func:`batch`, weighted as ours."""
    ids, labels, weights = batch()
    logits = model(input_ids=ids).logits
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none")
    return (losses.view_as(labels).sum(dim=1) * weights).sum()


def twin_gradients(twin: Any, table: WeightTable) -> dict[str, torch.Tensor]:
    """By our names, whole: dA = sum over the fused parts, dB = the parts' rows behind one another."""
    reference_loss(twin).backward()
    parameters = dict(twin.named_parameters())
    gradients = {}
    for row, layer in table.target_entries(SPEC.targets):
        stem = row.name(layer).removesuffix("weight")
        parts = ["base_model.model." + name.removesuffix("weight") for name in row.hf_names(layer)]
        gradients[f"{stem}lora_A.default.weight"] = sum(parameters[f"{part}lora_A.default.weight"].grad for part in parts)
        gradients[f"{stem}lora_B.default.weight"] = torch.cat([parameters[f"{part}lora_B.default.weight"].grad for part in parts])
    return gradients
