"""Writing a Megatron V1 folder from any source, one rank file at a time, a block of rows at a time."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mindspeed_lora.conversion.stream import WeightStream
from mindspeed_lora.files import atomic_file
from mindspeed_lora.weights.block_writer import Block
from mindspeed_lora.weights.config import Layout
from mindspeed_lora.weights.megatron_files import (
    RANK_FILE_NAME,
    GroupRow,
    checkpoint_content,
    chunk_keys,
    iteration_directory_name,
    megatron_args,
    model_keys,
    rank_directory_name,
    write_tracker,
)
from mindspeed_lora.weights.placement import place_layers, row_cut, stage_ranks
from mindspeed_lora.weights.table import Row, WeightTable
from mindspeed_lora.weights.torch_stream import Data, TensorSpec, save_streamed

CONVERTED_ITERATION = 1  # the peer's converters write iteration 1


def write_megatron(folder: Path, stream: WeightStream, table: WeightTable, layout: Layout, dtype: torch.dtype) -> dict[Path, int]:
    """Write every rank's file below ``folder``, and the tracker last; ``dtype`` is recorded in ``args``. Returns the CRC32 of each."""
    iteration_dir = folder / iteration_directory_name(CONVERTED_ITERATION)
    iteration_dir.mkdir()
    stages, ranks = range(layout.pipeline_parallel_size), stage_ranks(layout)
    keys = [key for stage in stages for chunk in _stage_chunks(table, layout, stage, ranks[0]) for key in chunk]
    checksums = {}
    total = len(ranks) * sum(row is not None for _, row, _ in keys)
    with tqdm(total=total, desc=f"{stream.verb} Megatron files", unit="tensor") as progress:
        for stage in stages:
            for tp_rank, ep_rank in ranks:
                name = rank_directory_name(tp_rank, stage, layout.pipeline_parallel_size, ep_rank, layout.expert_parallel_size)
                path = iteration_dir / name / RANK_FILE_NAME
                path.parent.mkdir()
                with atomic_file(path) as temporary:
                    writer = _RankWriter(stream, table, layout, stage, (tp_rank, ep_rank))
                    checksums[path] = writer.write(temporary, dtype, progress.update)
    write_tracker(folder, CONVERTED_ITERATION)
    return checksums


def _stage_chunks(table: WeightTable, layout: Layout, stage: int, rank: tuple[int, int]) -> list[list[tuple[str, Row | None, int | None]]]:
    num_chunks = len(place_layers(table.config.num_layers, layout)[stage])
    return [chunk_keys(table, layout, stage, chunk, rank) for chunk in range(num_chunks)]


class _RankWriter:
    """Writes the file of one rank; ``rank``: tensor and expert rank."""

    def __init__(self, stream: WeightStream, table: WeightTable, layout: Layout, stage: int, rank: tuple[int, int]) -> None:
        self.stream, self.table, self.layout = stream, table, layout
        self.tp_rank = rank[0]
        self.chunks = _stage_chunks(table, layout, stage, rank)

    def _cut(self, row: Row) -> tuple[int, int]:
        return row_cut(self.layout, row, self.tp_rank)

    def _spec(self, row: Row, layer: int | None) -> TensorSpec:
        if isinstance(row, GroupRow):
            dtypes = [dtype for member in row.members for dtype in self.stream.part_dtypes(member, layer)]
            rows, columns = self.table.local_shape(row.members[0], self._cut(row.members[0])[1])
            count = len(row.members)
            shape = (columns, count * rows) if row.members[0].axis == 0 else (count * columns, rows)
            return TensorSpec(shape, _fused_dtype(dtypes))
        return TensorSpec(self.table.local_shape(row, self._cut(row)[1]), _fused_dtype(self.stream.part_dtypes(row, layer)))

    def _blocks(self, row: Row, layer: int | None) -> Iterator[Block]:
        """This rank's shard."""
        if isinstance(row, GroupRow):
            spec = self._spec(row, layer)
            yield Block(spec.shape, spec.dtype, self._group(row, layer, spec.shape))
        elif row.padded:
            yield from self._vocabulary_blocks(row)
        else:
            cut = self._cut(row)
            yield from self.stream.blocks(row, layer, self.table.shard_ranges(row, *cut), self.table.shard_columns(row, *cut))

    def _group(self, row: GroupRow, layer: int | None, shape: tuple[int, ...]) -> Callable[[], Iterator[torch.Tensor]] | None:
        """What makes a grouped tensor of its experts."""
        members = [list(self._blocks(member, layer)) for member in row.members]
        makers = [[block.make for block in member if block.make is not None] for member in members]
        if not all(makers):
            return None

        def made() -> Iterator[torch.Tensor]:
            rows, columns = sum(block.shape[0] for block in members[0]), members[0][0].shape[1]
            experts = torch.empty(len(members), columns, rows, dtype=members[0][0].dtype)
            for expert, member in zip(experts, makers, strict=True):
                first = 0
                for piece in itertools.chain.from_iterable(make() for make in member):
                    expert[:, first : first + len(piece)] = piece.T
                    first += len(piece)
            yield experts.view(shape)

        return made

    def _vocabulary_blocks(self, row: Row) -> Iterator[Block]:
        """This rank's rows of an embedding or head; copies of the last row pad the vocabulary."""
        start, stop, missing = self.table.vocabulary_range(row, *self._cut(row))
        yield from self.stream.blocks(row, None, [(0, start, stop)])
        if missing:
            count = row.part_shapes[0][0]
            for last in self.stream.blocks(row, None, [(0, count - 1, count)]):
                make = last.make and partial(_repeated, last.make, missing)
                yield Block((missing, *last.shape[1:]), last.dtype, make)

    def write(self, path: Path, dtype: torch.dtype, progress: Callable[[int], Any]) -> int:
        """Stream the tensors into ``path`` and return its CRC32."""
        order = [(row, layer) for keys in self.chunks for _, row, layer in keys if row is not None]

        def build(placeholder: Callable[[TensorSpec], torch.Tensor]) -> dict[str, Any]:
            models = {}
            for chunk, keys in zip(model_keys(len(self.chunks)), self.chunks, strict=True):
                models[chunk] = OrderedDict(
                    (name, None if row is None else placeholder(self._spec(row, layer))) for name, row, layer in keys
                )
            return checkpoint_content(models, megatron_args(self.table.config, self.layout, dtype), CONVERTED_ITERATION)

        def read(index: int) -> Data:
            row, layer = order[index]
            progress(1)
            return self._blocks(row, layer)

        return save_streamed(path, build, read)


def _repeated(make: Callable[[], Iterable[torch.Tensor]], count: int) -> list[torch.Tensor]:
    return [row.expand(count, -1) for row in make()]


def _fused_dtype(dtypes: list[torch.dtype]) -> torch.dtype:
    """dtype of parts laid into one tensor: the widest, which holds each of them exactly."""
    result = dtypes[0]
    for dtype in dtypes[1:]:
        result = torch.promote_types(result, dtype)
    return result
