"""Writing a Megatron V1 folder from any source, one rank file at a time and one tensor at a time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mindspeed_lora.conversion.merge import WeightStream
from mindspeed_lora.files import atomic_file
from mindspeed_lora.weights.config import Layout
from mindspeed_lora.weights.megatron_files import (
    RANK_FILE_NAME,
    checkpoint_content,
    chunk_keys,
    iteration_directory_name,
    megatron_args,
    model_keys,
    rank_directory_name,
    write_tracker,
)
from mindspeed_lora.weights.table import Row, WeightTable
from mindspeed_lora.weights.torch_stream import TensorSpec, save_streamed

CONVERTED_ITERATION = 1  # the peer's converters write iteration 1


def write_megatron(folder: Path, stream: WeightStream, table: WeightTable, layout: Layout, dtype: torch.dtype) -> None:
    """Write every rank's file below ``folder``, and the tracker last. ``dtype`` is recorded in ``args``."""
    iteration_dir = folder / iteration_directory_name(CONVERTED_ITERATION)
    iteration_dir.mkdir()
    stages = range(layout.pipeline_parallel_size)
    keys = [key for stage in stages for chunk in _stage_chunks(table, layout, stage) for key in chunk]
    total = layout.tensor_parallel_size * sum(row is not None for _, row, _ in keys)
    with tqdm(total=total, desc="writing Megatron files", unit="tensor") as progress:
        for stage in stages:
            for tp_rank in range(layout.tensor_parallel_size):
                rank_dir = iteration_dir / rank_directory_name(tp_rank, stage, layout.pipeline_parallel_size)
                rank_dir.mkdir()
                with atomic_file(rank_dir / RANK_FILE_NAME) as temporary:
                    _write_rank(temporary, stream, table, layout, (tp_rank, stage), dtype, progress.update)
    write_tracker(folder, CONVERTED_ITERATION)


def _stage_chunks(table: WeightTable, layout: Layout, stage: int) -> list[list[tuple[str, Row | None, int | None]]]:
    num_chunks = len(table.check_pipeline(layout.pipeline_parallel_size, layout.layers_per_virtual_stage)[stage])
    return [chunk_keys(table, layout, stage, chunk) for chunk in range(num_chunks)]


def _write_rank(
    path: Path,
    stream: WeightStream,
    table: WeightTable,
    layout: Layout,
    rank: tuple[int, int],
    dtype: torch.dtype,
    progress: Callable[[int], Any],
) -> None:
    tp_rank, stage = rank
    tp_size = layout.tensor_parallel_size
    chunks = _stage_chunks(table, layout, stage)
    order = [(row, layer) for keys in chunks for _, row, layer in keys if row is not None]

    def spec(row: Row, layer: int | None) -> TensorSpec:
        return TensorSpec(table.local_shape(row, tp_size), _fused_dtype(stream.part_dtypes(row, layer)))

    def build(placeholder: Callable[[TensorSpec], torch.Tensor]) -> dict[str, Any]:
        models = {}
        for chunk, keys in zip(model_keys(len(chunks)), chunks, strict=True):
            models[chunk] = OrderedDict((name, None if row is None else placeholder(spec(row, layer))) for name, row, layer in keys)
        return checkpoint_content(models, megatron_args(table.config, layout, dtype), CONVERTED_ITERATION)

    def read(index: int) -> torch.Tensor:
        row, layer = order[index]
        tensor = table.shard(row, stream.parts(row, layer), tp_rank, tp_size)
        progress(1)
        return tensor

    save_streamed(path, build, read)


def _fused_dtype(dtypes: list[torch.dtype]) -> torch.dtype:
    """dtype of parts laid into one tensor: the widest, which holds each of them exactly."""
    result = dtypes[0]
    for dtype in dtypes[1:]:
        result = torch.promote_types(result, dtype)
    return result
