"""The tensors that a conversion writes, a few megabytes at a time: neither a model's size nor a tensor's decides how much memory it takes.

A block is rows of one HF part; piece by piece they are read from where they lie, merged and cast, and looked through for NaN, all while
they are in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate

import torch

from mindspeed_lora.conversion.merge import Change, RoundingReport, Workspace
from mindspeed_lora.errors import CheckpointError
from mindspeed_lora.weights.block_writer import Block
from mindspeed_lora.weights.lora_blocks import module_of, part_scales
from mindspeed_lora.weights.lora_spec import LoraSpec
from mindspeed_lora.weights.sources import Adapter, Base
from mindspeed_lora.weights.table import Row, rows_of

BLOCK_BYTES = 1 << 22
PIECE_BYTES = 1 << 20  # of the source: they stay in a core's second-level cache
WINDOW_BYTES = 1 << 26  # read before the files are mapped anew: pages that were read count as memory while their mapping lives
Rows = tuple[int, int, int]
"""(HF part, first row, behind the last row)."""
ALL_COLUMNS = slice(None)


class WeightStream:
    """Hands out the tensors to write in the target's dtype."""

    verb = "writing"

    def __init__(self, base: Base, adapter: Adapter | None, lora: LoraSpec | None, dtype: torch.dtype | None) -> None:
        self.base, self.adapter, self.lora, self.dtype = base, adapter, lora, dtype
        self.report = RoundingReport()
        self._workspace = Workspace()

    def part_dtypes(self, row: Row, layer: int | None) -> list[torch.dtype]:
        """dtype that each HF part will have."""
        return [self.dtype or dtype for dtype in self.base.part_dtypes(row, layer)]

    def blocks(self, row: Row, layer: int | None, ranges: Sequence[Rows], columns: slice = ALL_COLUMNS) -> Iterator[Block]:
        """Rows of a row's HF parts one after the other, merged where the adapter adapts them, each element cast once.

        Making one raises CheckpointError where it holds NaN or infinity.
        """
        names, dtypes = row.hf_names(layer), self.part_dtypes(row, layer)
        changes = self._changes(row, layer, columns, {part for part, _, _ in ranges})
        pieces, left = self.base.pieces(row, layer), WINDOW_BYTES
        for part, first, last in ranges:
            width = row.part_shapes[part][1:]
            shape = (len(range(*columns.indices(width[0]))),) if width else ()
            for start, stop in _row_blocks(pieces[part], row.axis, first, last):
                if left <= 0:
                    pieces, left = self.base.pieces(row, layer), WINDOW_BYTES
                stored = partial(rows_of, pieces[part], row.axis, columns)
                make = partial(self._made, stored, row, names[part], (start, stop, columns.start), changes[part], dtypes[part])
                block = Block((stop - start, *shape), dtypes[part], make)
                left -= block.num_bytes
                yield block

    def _made(
        self,
        stored: Callable[[int, int], torch.Tensor],
        row: Row,
        name: str,
        place: tuple[int, int, int | None],
        change: Change | None,
        dtype: torch.dtype,
    ) -> Iterator[torch.Tensor]:
        """One block's pieces as they are to be written; several threads are here. ``place``: first row, behind the last, first column."""
        first, last, _ = place
        if change is None:
            for rows in _pieces(stored(first, last)):
                piece = rows.to(dtype).contiguous()
                self._check_finite(name, piece)
                yield piece
            return
        lost = 0.0
        for piece, taken in change.added_to(stored(first, last), first, dtype, self._workspace):
            if not math.isfinite(taken):  # else: a finite difference from what is finite, nothing to look for
                self._check_finite(name, piece)
            lost += taken
            yield piece
        self.report.add((name, *place), row, change.squared_norm(first, last), lost)

    def _changes(self, row: Row, layer: int | None, columns: slice, wanted: set[int]) -> list[Change | None]:
        """What the adapter adds to each of the ``wanted`` HF parts; None: nothing."""
        module = module_of(self.lora, row, layer) if self.lora is not None else None
        if self.adapter is None or self.lora is None or module is None:
            return [None] * len(row.hf)
        scaled = enumerate(zip(self.adapter.pairs(row, layer), part_scales(self.lora, module, len(row.hf)), strict=True))
        return [
            None if pair is None or part not in wanted else Change.of(pair[0][:, columns], pair[1], scale) for part, (pair, scale) in scaled
        ]

    def _check_finite(self, name: str, block: torch.Tensor) -> None:
        smallest, largest = torch.aminmax(block)  # both are NaN where any element is
        if not (math.isfinite(smallest) and math.isfinite(largest)):
            cause = ", or does after the merge or the cast" if self.adapter is not None or self.dtype is not None else ""
            raise CheckpointError(f"{self.base.path}: tensor {name} holds NaN or infinity{cause}; nothing is written")


def _pieces(block: torch.Tensor) -> Sequence[torch.Tensor]:
    return block.split(max(PIECE_BYTES // block[0].nbytes, 1))


def _row_blocks(pieces: Sequence[torch.Tensor], axis: int | None, first: int, last: int) -> Iterator[tuple[int, int]]:
    """Row ranges of at most a block's size that cover ``[first, last)``, none across two pieces that lie below each other."""
    width = pieces[0][0].nbytes * (len(pieces) if axis == 1 else 1)
    step = max(BLOCK_BYTES // width, 1)
    ends = [] if axis == 1 else [end for end in accumulate(len(piece) for piece in pieces) if first < end < last]
    for end in [*ends, last]:
        yield from ((start, min(start + step, end)) for start in range(first, end, step))
        first = end
