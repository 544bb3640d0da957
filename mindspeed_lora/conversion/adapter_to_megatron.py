"""A PEFT adapter as a Megatron LoRA checkpoint: LoRA tensors only, in the names and the cut that training saves."""

from __future__ import annotations

from dataclasses import asdict, dataclass
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
from mindspeed_lora.weights.lora_blocks import adapted_entries, module_of
from mindspeed_lora.weights.lora_spec import LoraSpec
from mindspeed_lora.weights.megatron_files import (
    GroupRow,
    chunk_rows,
    iteration_directory_name,
    megatron_args,
    model_keys,
    write_rank_file,
    write_tracker,
)
from mindspeed_lora.weights.placement import check_experts, place_layers, row_cut, stage_ranks
from mindspeed_lora.weights.sources import Adapter, open_adapter
from mindspeed_lora.weights.table import Row, WeightTable

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


@dataclass(frozen=True)
class _Cutter:
    """Cuts an adapter for the ranks of a layout; ``dtype`` None: as in the file."""

    table: WeightTable
    adapter: Adapter
    lora: LoraSpec
    layout: Layout
    dtype: torch.dtype | None

    def halves(self, row: Row, layer: int | None, tp_rank: int) -> list[torch.Tensor] | None:
        """A and B of one rank; None: the row is not adapted."""
        if module_of(self.lora, row, layer) is None:
            return None
        matrix_a, matrices_b = self.adapter.lora_parts(row, layer)
        cut = row_cut(self.layout, row, tp_rank)
        parts = zip(self.table.lora_pair(row), ([matrix_a], matrices_b), strict=True)
        shards = [self.table.shard(half, tensors, *cut) for half, tensors in parts]
        return [shard.to(self.dtype or shard.dtype) for shard in shards]

    def chunk(self, stage: int, chunk: int, rank: tuple[int, int]) -> dict[str, torch.Tensor | None]:
        """The LoRA tensors of one model chunk; ``rank``: tensor and expert rank."""
        model: dict[str, torch.Tensor | None] = {}
        for name, row, layer in chunk_rows(self.table, self.layout, stage, chunk, rank):
            if isinstance(row, GroupRow):
                model |= self._group(name, row, layer, rank[0])
            elif (halves := self.halves(row, layer, rank[0])) is not None:
                model |= {f"{name.removesuffix('weight')}lora_{half}.default.weight": each for half, each in zip("AB", halves, strict=True)}
        return model

    def _group(self, name: str, row: GroupRow, layer: int | None, tp_rank: int) -> dict[str, torch.Tensor | None]:
        """Experts of one grouped tensor: fc1 ``[in, experts * out]``, fc2 ``[experts * in, out]`` of each half, as for the weights.

        Raises:
            UsageError: they have different ranks, or only some are adapted.
        """
        members = [self.halves(member, layer, tp_rank) for member in row.members]
        whole = [halves for halves in members if halves is not None]
        if not whole:
            return {}
        if len(whole) < len(members) or len({halves[0].shape for halves in whole}) > 1:
            raise UsageError(
                f"--moe-grouped-gemm: the experts of layer {layer} differ in their ranks, which one tensor cannot hold; leave the flag out"
            )
        model: dict[str, torch.Tensor | None] = {}
        for index, half in enumerate("ab"):
            stacked = torch.stack([halves[index].T for halves in whole])
            count, rows, size = stacked.shape
            model[f"{name}_lora_{half}"] = stacked.view((rows, count * size) if row.members[0].axis == 0 else (count * rows, size))
        return model


def import_adapter(config: ConvertConfig) -> int:
    """Write the PEFT adapter of ``--load-dir`` as a Megatron LoRA checkpoint for ``--save-dir``, at any layout.

    Raises:
        UsageError: the layout does not fit the model.
        CheckpointError: the adapter is damaged, or of another model.
    """
    adapter, table, layout = open_adapter(config.load_dir), _table(config), target_layout(config)
    lora = adapter_values(config, adapter, table)
    check_experts(table.config, layout)
    table.check_tensor_parallel(layout.tensor_parallel_size)
    stages = place_layers(table.config.num_layers, layout)
    target = megatron_target(config.save_dir)
    dtype = PARAMS_DTYPES[config.params_dtype] if config.params_dtype else None
    cutter = _Cutter(table, adapter, lora, layout, dtype)
    row, layer, _ = adapted_entries(table, lora)[0]
    args = megatron_args(table.config, layout, dtype or adapter.lora_parts(row, layer)[0].dtype, lora, IMPORTED_ITERATION)

    def write(staging: Path) -> None:
        iteration_dir = staging / iteration_directory_name(IMPORTED_ITERATION)
        for stage, chunks in enumerate(stages):
            keys = model_keys(len(chunks))
            for rank in stage_ranks(layout):
                models = {key: cutter.chunk(stage, chunk, rank) for chunk, key in enumerate(keys)}
                place = (rank[0], stage, layout.tensor_parallel_size, layout.pipeline_parallel_size)
                expert = (rank[1], layout.expert_parallel_size)
                write_rank_file(iteration_dir, *place, models, args, IMPORTED_ITERATION, expert=expert)
        _describe(iteration_dir, adapter, lora, table, layout)
        write_tracker(staging, IMPORTED_ITERATION)

    if config.dry_run:
        return report(forecast(target, write, resident_bytes()))
    with staged_folder(target) as staging:
        write(staging)
    get_logger().info("wrote %s: Megatron adapter, %s", target, lora.describe())
    return 0


def _describe(iteration_dir: Path, adapter: Adapter, lora: LoraSpec, table: WeightTable, layout: Layout) -> None:
    manifest = Manifest(
        kind="adapter",
        model=asdict(table.config),
        layout=asdict(layout),
        lora=lora.entry(),
        base=dict(adapter.base_reference) if adapter.base_reference else None,
        iteration=IMPORTED_ITERATION,
        parts=[part_of(iteration_dir, file) for file in sorted(iteration_dir.glob("*/*.pt"))],
    )
    write_manifest(iteration_dir, manifest)
