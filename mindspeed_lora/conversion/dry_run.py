"""``--dry-run``: the real writers on tensors without data, so that names, shapes and sizes are those of the real run.

The files are laid out in the temporary folder, empty where the data would lie (sparse), measured, and removed;
nothing appears in ``--save-dir``.
"""

from __future__ import annotations

import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from mindspeed_lora.conversion.inspect import human_bytes
from mindspeed_lora.conversion.merge import WeightStream
from mindspeed_lora.errors import CheckpointError
from mindspeed_lora.log import get_logger
from mindspeed_lora.manifest import MANIFEST_NAME
from mindspeed_lora.weights.megatron_folder import MegatronFolder, mapped_bytes_limit
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

    def parts(self, row: Row, layer: int | None) -> list[torch.Tensor]:
        """See the base class."""
        dtypes = self.part_dtypes(row, layer)
        return [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in zip(row.part_shapes, dtypes, strict=True)]

    def vocabulary_blocks(self, row: Row, start: int, stop: int) -> Iterator[torch.Tensor]:
        """See the base class."""
        if stop > start:
            yield self.parts(row, None)[0][start:stop]


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


def peak_memory(stream: WeightStream, table: WeightTable) -> int:
    """About how many bytes the conversion will hold at most: what the process holds now, and the largest row's tensors.

    Embedding and head pass in blocks, and so does a merge's fp32. Another row is held as it lies in the source (mapped), and once more
    where it is joined, cut or cast; a Megatron source also keeps up to :func:`mapped_bytes_limit` of pages that were read before.
    """
    largest = max(_row_bytes(stream, row, layer) for row, layer in table.entries() if not row.padded)
    return resident_bytes() + largest + _mapped_bytes(stream.base, stream.adapter)


def _row_bytes(stream: WeightStream, row: Row, layer: int | None) -> int:
    sizes = [prod(shape) for shape in row.part_shapes]
    source = sum(size * dtype.itemsize for size, dtype in zip(sizes, stream.base.part_dtypes(row, layer), strict=True))
    target = sum(size * dtype.itemsize for size, dtype in zip(sizes, stream.part_dtypes(row, layer), strict=True))
    return source + target


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
