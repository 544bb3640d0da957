"""``--dry-run``: the real writers on blocks without data, so that names, shapes and sizes are those of the real run.

The files are laid out in the temporary folder, empty where the data would lie (sparse), measured, and removed;
nothing appears in ``--save-dir``.
"""

from __future__ import annotations

import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from mindspeed_lora.conversion.inspect import human_bytes
from mindspeed_lora.conversion.stream import ALL_COLUMNS, BLOCK_BYTES, WINDOW_BYTES, Rows, WeightStream
from mindspeed_lora.errors import CheckpointError
from mindspeed_lora.log import get_logger
from mindspeed_lora.manifest import MANIFEST_NAME
from mindspeed_lora.weights.block_writer import THREADS, Block
from mindspeed_lora.weights.config import Layout
from mindspeed_lora.weights.megatron_folder import MegatronFolder, mapped_bytes_limit
from mindspeed_lora.weights.placement import expert_blocks
from mindspeed_lora.weights.sources import Adapter, Base
from mindspeed_lora.weights.table import Row, WeightTable


@dataclass(frozen=True)
class Forecast:
    """What a conversion would leave: (path below the target, bytes) of every file except the manifest."""

    target: Path
    files: tuple[tuple[str, int], ...]
    peak_bytes: int

    @property
    def total_bytes(self) -> int:
        """Bytes of all files."""
        return sum(size for _, size in self.files)


class ShapeStream(WeightStream):
    """Hands out tensors of the right shape and dtype that hold no data."""

    verb = "measuring"

    def blocks(self, row: Row, layer: int | None, ranges: Sequence[Rows], columns: slice = ALL_COLUMNS) -> Iterator[Block]:
        """See the base class."""
        dtypes = self.part_dtypes(row, layer)
        for part, start, stop in ranges:
            width = [len(range(*columns.indices(size))) for size in row.part_shapes[part][1:]]
            yield Block((stop - start, *width), dtypes[part], None)


def forecast(target: Path, write: Callable[[Path], object], peak_bytes: int) -> Forecast:
    """Run ``write`` into a temporary folder and measure what it leaves there.

    Raises:
        CheckpointError: the target's disk has too little room.
    """
    with tempfile.TemporaryDirectory(prefix="mindspeed-lora-dry-run-") as name:
        folder = Path(name)
        write(folder)
        files = tuple((str(file.relative_to(folder)), file.stat().st_size) for file in sorted(folder.rglob("*")) if file.is_file())
    found = Forecast(target, files, peak_bytes)
    free = shutil.disk_usage(next(place for place in (target, *target.absolute().parents) if place.exists())).free
    if found.total_bytes > free:
        raise CheckpointError(
            f"--save-dir {target}: {human_bytes(found.total_bytes)} would be written, but its disk has {human_bytes(free)} left; "
            "make room or choose another folder"
        )
    return found


def report(found: Forecast) -> int:
    """Print a forecast and return the exit code 0."""
    logger = get_logger()
    logger.info("dry run: %s would get", found.target)
    for name, size in found.files:
        logger.info("  %-60s %s", name, human_bytes(size))
    logger.info("  %-60s a few KiB", MANIFEST_NAME)
    logger.info("in all %s; peak memory about %.1f GiB; nothing was written", human_bytes(found.total_bytes), found.peak_bytes / 2**30)
    return 0


def peak_memory(stream: WeightStream, table: WeightTable, layout: Layout) -> int:
    """About how many bytes the conversion will hold at most: what the process holds now, and what passes through it.

    Tensors pass in blocks: pages of the source up to a window's size (a Megatron source keeps as many of its own), and blocks on their way.
    Only a tensor that groups experts is put together whole, by each thread one.
    """
    grouped = 0
    if layout.grouped_gemm and table.config.experts is not None:
        per_rank = table.config.experts.count // expert_blocks(layout)
        grouped = THREADS * per_rank * max(_row_bytes(stream, row, layer) for row, layer in table.entries() if row.expert is not None)
    window = min(WINDOW_BYTES, sum(_row_bytes(stream, row, layer) for row, layer in table.entries()))
    return resident_bytes() + window + 2 * THREADS * BLOCK_BYTES + grouped + _mapped_bytes(stream.base, stream.adapter)


def _row_bytes(stream: WeightStream, row: Row, layer: int | None) -> int:
    sizes = zip(row.part_shapes, stream.part_dtypes(row, layer), strict=True)
    return sum(prod(shape) * dtype.itemsize for shape, dtype in sizes)


def _mapped_bytes(base: Base, adapter: Adapter | None) -> int:
    folders = [getattr(source, "folder", None) for source in (base, adapter)]
    sizes = [_files_bytes(folder.iteration_dir.rglob("*.pt")) for folder in folders if isinstance(folder, MegatronFolder)]
    return sum(min(size, mapped_bytes_limit()) for size in sizes)


def _files_bytes(files: Iterable[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def resident_bytes() -> int:
    """The largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
