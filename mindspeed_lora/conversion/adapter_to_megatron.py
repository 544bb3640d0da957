"""A PEFT adapter as a Megatron LoRA checkpoint: LoRA tensors only, in the names and the cut that training saves."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch

from mindspeed_lora.arguments.configs import ConvertConfig
from mindspeed_lora.conversion.dry_run import forecast, report, resident_bytes
from mindspeed_lora.conversion.output import megatron_target, staged_folder
from mindspeed_lora.conversion.plan import PARAMS_DTYPES, adapter_values, config_candidates, target_layout
from mindspeed_lora.errors import CheckpointError, UsageError
from mindspeed_lora.log import get_logger
from mindspeed_lora.manifest import Manifest, part_of, write_manifest
from mindspeed_lora.weights.config import Layout
from mindspeed_lora.weights.families import check_model_type, model_config_from_hf
from mindspeed_lora.weights.lora_spec import LoraSpec
from mindspeed_lora.weights.megatron_files import (
    chunk_rows,
    iteration_directory_name,
    megatron_args,
    model_keys,
    write_rank_file,
    write_tracker,
)
from mindspeed_lora.weights.placement import place_layers
from mindspeed_lora.weights.sources import Adapter, open_adapter
from mindspeed_lora.weights.table import WeightTable

IMPORTED_ITERATION = 1


def is_adapter_folder(folder: Path) -> bool:
    """Whether a folder is a PEFT adapter."""
    return (folder / "adapter_config.json").is_file()


def _table(config: ConvertConfig) -> WeightTable:
    candidates = config_candidates(config, config.load_dir)
    if not candidates:
        raise CheckpointError(f"{config.load_dir}: has no config.json; name the base model's Hugging Face folder with --hf-cfg-dir")
    model = model_config_from_hf(candidates[0][1])
    check_model_type(config.model_type_hf, model)
    return WeightTable(model)


def _chunk(
    table: WeightTable, adapter: Adapter, lora: LoraSpec, layout: Layout, place: tuple[int, int, int], dtype: torch.dtype | None
) -> dict[str, torch.Tensor | None]:
    """The LoRA tensors of one model chunk; ``place``: stage, chunk, tensor rank."""
    stage, chunk, tp_rank = place
    model: dict[str, torch.Tensor | None] = {}
    for name, row, layer in chunk_rows(table, layout, stage, chunk):
        if row.module not in lora.targets:
            continue
        matrix_a, matrices_b = adapter.lora_parts(row, layer)
        stem = name.removesuffix("weight")
        for half, parts, lora_row in zip("AB", ([matrix_a], matrices_b), table.lora_pair(row), strict=True):
            shard = table.shard(lora_row, parts, tp_rank, layout.tensor_parallel_size)
            model[f"{stem}lora_{half}.default.weight"] = shard.to(dtype or shard.dtype)
    return model


def import_adapter(config: ConvertConfig) -> int:
    """Write the PEFT adapter of ``--load-dir`` as a Megatron LoRA checkpoint for ``--save-dir``, at any TP, PP and virtual stages.

    Raises:
        UsageError: the layout does not fit the model, or asks for expert parallelism.
        CheckpointError: the adapter is damaged, of another model, or has parts with their own A, r or scale.
    """
    adapter = open_adapter(config.load_dir)
    adapter.require_uniform("write it as a Megatron adapter")
    lora, table, layout = adapter_values(config, adapter), _table(config), target_layout(config)
    if layout.expert_parallel_size > 1 or layout.grouped_gemm or table.config.experts is not None:
        raise UsageError(f"--load-dir {config.load_dir}: an adapter of a model with experts cannot be written as Megatron files; merge it")
    table.check_tensor_parallel(layout.tensor_parallel_size)
    stages = place_layers(table.config.num_layers, layout)
    adapter.check_coverage(table)
    target = megatron_target(config.save_dir)
    dtype = PARAMS_DTYPES[config.params_dtype] if config.params_dtype else None
    row, layer = table.target_entries(lora.targets)[0]
    args = megatron_args(table.config, layout, dtype or adapter.lora_parts(row, layer)[0].dtype, lora, IMPORTED_ITERATION)
    tp_size, pp_size = layout.tensor_parallel_size, layout.pipeline_parallel_size

    def write(staging: Path) -> None:
        iteration_dir = staging / iteration_directory_name(IMPORTED_ITERATION)
        for stage, chunks in enumerate(stages):
            for tp_rank in range(tp_size):
                models = {
                    key: _chunk(table, adapter, lora, layout, (stage, chunk, tp_rank), dtype)
                    for chunk, key in enumerate(model_keys(len(chunks)))
                }
                write_rank_file(iteration_dir, tp_rank, stage, tp_size, pp_size, models, args, IMPORTED_ITERATION)
        _describe(iteration_dir, adapter, lora, table, layout)
        write_tracker(staging, IMPORTED_ITERATION)

    if config.dry_run:
        return report(forecast(target, write, resident_bytes()))
    with staged_folder(target) as staging:
        write(staging)
    get_logger().info("wrote %s: Megatron adapter, r %d, alpha %g, %s", target, lora.r, lora.alpha, " ".join(lora.targets))
    return 0


def _describe(iteration_dir: Path, adapter: Adapter, lora: LoraSpec, table: WeightTable, layout: Layout) -> None:
    manifest = Manifest(
        kind="adapter",
        model=asdict(table.config),
        layout=asdict(layout),
        lora={"r": lora.r, "alpha": lora.alpha, "targets": list(lora.targets)},
        base=dict(adapter.base_reference) if adapter.base_reference else None,
        iteration=IMPORTED_ITERATION,
        parts=[part_of(iteration_dir, file) for file in sorted(iteration_dir.glob("*/*.pt"))],
    )
    write_manifest(iteration_dir, manifest)
