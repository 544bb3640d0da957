"""Building adapters and comparing folders, for the tests of conversion."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from mindspeed_lora.arguments.configs import ConvertConfig
from mindspeed_lora.conversion.run import convert
from mindspeed_lora.manifest import Manifest, write_manifest
from mindspeed_lora.weights.config import Layout
from mindspeed_lora.weights.lora_spec import LoraSpec
from mindspeed_lora.weights.megatron_files import chunk_rows, megatron_args, model_keys, write_rank_file, write_tracker
from mindspeed_lora.weights.table import Row, WeightTable

TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
LoraTensors = dict[tuple[Row, int | None], tuple[torch.Tensor, list[torch.Tensor]]]


def run_convert(load_type: str, save_type: str, load_dir: Path, save_dir: Path, **options: Any) -> int:
    return convert(ConvertConfig(load_type, save_type, Path(load_dir), Path(save_dir), **options))


def assert_same_tensors(first: Path, second: Path) -> None:
    one, two = load_folder(first), load_folder(second)
    assert set(one) == set(two)
    for name, tensor in one.items():
        assert tensor.dtype == two[name].dtype and torch.equal(tensor, two[name]), name


def load_folder(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("model*.safetensors")) for name, tensor in load_file(file).items()}


def random_lora(table: WeightTable, lora: LoraSpec, seed: int = 0, dtype: torch.dtype = torch.float32) -> LoraTensors:
    generator = torch.Generator().manual_seed(seed)
    tensors: LoraTensors = {}
    for row, layer in table.target_entries(lora.targets):
        matrix_a = torch.randn(lora.r, row.part_shapes[0][1], generator=generator).to(dtype)
        tensors[row, layer] = (matrix_a, [0.1 * torch.randn(shape[0], lora.r, generator=generator).to(dtype) for shape in row.part_shapes])
    return tensors


def write_megatron_adapter(
    folder: Path,
    table: WeightTable,
    lora: LoraSpec,
    tensors: LoraTensors,
    layout: Layout,
    base: dict[str, Any] | None = None,
    args: bool = True,
) -> Path:
    """An adapter save as training makes it: LoRA tensors only, cut over ``layout``, with args or a manifest or neither."""
    iteration_dir = folder / "iter_0000007"
    stages = table.check_pipeline(layout.pipeline_parallel_size, layout.layers_per_virtual_stage)
    namespace = megatron_args(table.config, layout, torch.float32, lora if args else None, 7)
    for stage, chunks in enumerate(stages):
        for tp_rank in range(layout.tensor_parallel_size):
            models = {}
            for chunk, key in enumerate(model_keys(len(chunks))):
                models[key] = _local_lora(table, tensors, layout, stage, chunk, tp_rank)
            write_rank_file(
                iteration_dir, tp_rank, stage, layout.tensor_parallel_size, layout.pipeline_parallel_size, models, _copy(namespace), 7
            )
    if base is not None:
        entry = {"r": lora.r, "alpha": lora.alpha, "targets": list(lora.targets)}
        write_manifest(iteration_dir, Manifest(kind="adapter", lora=entry, base=base, iteration=7))
    write_tracker(folder, 7)
    return folder


def _copy(namespace: argparse.Namespace) -> argparse.Namespace:
    return argparse.Namespace(**vars(namespace))


def _local_lora(
    table: WeightTable, tensors: LoraTensors, layout: Layout, stage: int, chunk: int, tp_rank: int
) -> dict[str, torch.Tensor | None]:
    model: dict[str, torch.Tensor | None] = {}
    for name, row, layer in chunk_rows(table, layout, stage, chunk):
        if (row, layer) in tensors:
            matrix_a, matrices_b = tensors[row, layer]
            a_row, b_row = table.lora_pair(row)
            stem = name.removesuffix("weight")
            model[f"{stem}lora_A.default.weight"] = table.shard(a_row, [matrix_a], tp_rank, layout.tensor_parallel_size)
            model[f"{stem}lora_B.default.weight"] = table.shard(b_row, matrices_b, tp_rank, layout.tensor_parallel_size)
            model[f"{stem}lora_B.default._extra_state"] = None
    return model
