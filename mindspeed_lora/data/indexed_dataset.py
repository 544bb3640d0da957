r"""Megatron's indexed dataset: ``<name>.bin`` holds token ids one after the other, ``<name>.idx`` says where each sequence is.

Index, version 1, little endian::

    "MMIDIDX\0\0" | version uint64 = 1 | dtype code uint8 | sequences S uint64 | document entries D uint64
    | length of each sequence, int32 [S] | byte offset of each sequence, int64 [S] | document boundaries, int64 [D]

``document boundaries`` are sequence numbers: document d holds sequences ``boundaries[d] .. boundaries[d + 1]``. A
document may be empty: a record that preprocessing dropped keeps its number that way.
Source: the file layout of Megatron core r0.12 (``megatron/core/datasets/indexed_dataset.py``).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from mindspeed_lora.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, type[np.generic]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}
_SPOOL_BYTES = 1 << 22  # a multiple of the size of every number in an index
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


class IndexedDatasetBuilder:
    """Write ``<stem>.bin`` as sequences come and ``<stem>.idx`` at :meth:`finish`; a context manager that closes the files.

    Memory does not grow: the lengths and the documents wait in files beside them until :meth:`finish`, which removes those.
    The caller writes to a temporary place and renames: see ``data/staging.py``.
    """

    def __init__(self, stem: Path, dtype: type[np.generic] = np.int32) -> None:
        self.stem = Path(stem)
        self.dtype = dtype
        self._spools = {part: self.stem.with_name(f"{self.stem.name}.{part}.tmp") for part in ("lengths", "documents")}
        self._files: list[BinaryIO] = [path.open("wb") for path in (bin_path(self.stem), *self._spools.values())]
        self._num_sequences = self._num_documents = 0

    def __enter__(self) -> IndexedDatasetBuilder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with ExitStack() as stack:  # closes all, even where flushing one fails on a full disk
            for file in self._files:
                stack.callback(file.close)

    def add_document(self, ids: npt.ArrayLike) -> None:
        """Append one document of one sequence."""
        ids = np.asarray(ids)
        self.add_documents(ids, [len(ids)], [1])

    def add_empty_document(self) -> None:
        """Append a document of no sequence: a dropped record that keeps its number."""
        self.add_documents(np.empty(0, self.dtype), [], [0])

    def add_documents(self, ids: npt.ArrayLike, lengths: npt.ArrayLike, sequences_per_document: npt.ArrayLike) -> None:
        """Append many documents: ``ids`` of all their sequences, the sequences' lengths, the number of sequences in each document."""
        lengths = np.asarray(lengths, np.int32)
        ids = np.ascontiguousarray(ids, self.dtype)
        if int(lengths.sum(dtype=np.int64)) != ids.size:
            raise ValueError(f"lengths sum to {lengths.sum(dtype=np.int64)}, but there are {ids.size} ids")
        ends = self._num_sequences + np.cumsum(sequences_per_document, dtype=np.int64)
        for file, values in zip(self._files, (ids, lengths, ends), strict=True):
            file.write(values.tobytes())
        self._num_sequences += len(lengths)
        self._num_documents += len(ends)

    def finish(self) -> None:
        """Close the ``.bin`` and write the ``.idx``."""
        for file in self._files:
            file.close()
        with idx_path(self.stem).open("wb") as file:
            file.write(_HEADER.pack(MAGIC, VERSION, _CODES[self.dtype], self._num_sequences, self._num_documents + 1))
            for lengths in self._spooled("lengths", np.int32):
                file.write(lengths.tobytes())
            start = 0
            for lengths in self._spooled("lengths", np.int32):
                ends = start + np.cumsum(lengths, dtype=np.int64)
                offsets = np.concatenate([[start], ends[:-1]]) * np.dtype(self.dtype).itemsize
                file.write(offsets.tobytes())
                start = int(ends[-1])
            file.write(np.zeros(1, np.int64).tobytes())
            for documents in self._spooled("documents", np.int64):
                file.write(documents.tobytes())
        for path in self._spools.values():
            path.unlink()

    def _spooled(self, part: str, dtype: type[np.generic]) -> Iterator[npt.NDArray[np.generic]]:
        """What waits in a file, a piece at a time."""
        with self._spools[part].open("rb") as file:
            while piece := file.read(_SPOOL_BYTES):
                yield np.frombuffer(piece, dtype)


class IndexedDataset:
    """A memory-mapped pair of files; ``len`` is the number of sequences, ``[i]`` the ids of sequence i (read-only view).

    Raises:
        DataError: a file is missing, truncated, has another magic or version, or index and data disagree.
    """

    def __init__(self, stem: Path) -> None:
        self.stem = Path(stem)
        index = idx_path(self.stem)
        for path in (index, bin_path(self.stem)):
            if not path.is_file():
                raise DataError(f"{path}: no such file; an indexed dataset is the pair .bin and .idx, written by preprocess_data.py")
        self.dtype, self.lengths, self.offsets, self.document_boundaries = _read_index(index)
        self._check_data(index)
        self._ids = np.memmap(bin_path(self.stem), self.dtype, "r") if self.num_tokens else np.empty(0, self.dtype)
        self._starts = self.offsets // np.dtype(self.dtype).itemsize

    def _check_data(self, index: Path) -> None:
        item = np.dtype(self.dtype).itemsize
        path = bin_path(self.stem)
        expected = int(self.lengths.sum(dtype=np.int64)) * item
        found = path.stat().st_size
        if found != expected:
            raise DataError(f"{path}: {found} bytes, but {index.name} describes {expected}; one of the two is truncated or of another run")
        contiguous = np.zeros(len(self.lengths), np.int64)
        np.cumsum(self.lengths[:-1], dtype=np.int64, out=contiguous[1:])
        if not np.array_equal(contiguous * item, self.offsets):
            raise DataError(
                f"{index}: the sequences' offsets do not follow from their lengths; the index is damaged, run preprocess_data.py again"
            )

    @property
    def num_tokens(self) -> int:
        """Number of ids in the ``.bin``."""
        return int(self.lengths.sum(dtype=np.int64))

    @property
    def ids(self) -> npt.NDArray[np.integer]:
        """All ids, in order of the sequences (read-only)."""
        return self._ids

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> npt.NDArray[np.integer]:
        start = int(self._starts[index])
        return self._ids[start : start + int(self.lengths[index])]


def bin_path(stem: Path) -> Path:
    """The data file of an indexed dataset."""
    return stem.with_name(stem.name + ".bin")


def idx_path(stem: Path) -> Path:
    """The index file of an indexed dataset."""
    return stem.with_name(stem.name + ".idx")


def _read_index(path: Path) -> tuple[type[np.generic], npt.NDArray[np.int32], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    data = path.read_bytes()
    if len(data) < _HEADER.size:
        raise DataError(f"{path}: {len(data)} bytes are too few for an index (header: {_HEADER.size}); the file is truncated")
    magic, version, code, num_sequences, num_boundaries = _HEADER.unpack_from(data)
    if magic != MAGIC:
        raise DataError(f"{path}: starts with {magic!r}, not with {MAGIC!r}; this is no Megatron index")
    if version != VERSION:
        raise DataError(f"{path}: index version {version}; this program reads version {VERSION}")
    if code not in _DTYPES:
        raise DataError(f"{path}: unknown dtype code {code}; known are {sorted(_DTYPES)}; the index is damaged")
    expected = _HEADER.size + num_sequences * 12 + num_boundaries * 8
    if len(data) != expected:
        raise DataError(
            f"{path}: {len(data)} bytes, but {num_sequences} sequences and {num_boundaries} document entries "
            f"make {expected}; the file is truncated or damaged"
        )
    lengths = np.frombuffer(data, np.int32, num_sequences, _HEADER.size)
    offsets = np.frombuffer(data, np.int64, num_sequences, _HEADER.size + num_sequences * 4)
    boundaries = np.frombuffer(data, np.int64, num_boundaries, _HEADER.size + num_sequences * 12)
    if (lengths < 0).any():
        raise DataError(f"{path}: negative sequence length; the index is damaged")
    if num_boundaries == 0 or boundaries[0] != 0 or boundaries[-1] != num_sequences or (np.diff(boundaries) < 0).any():
        raise DataError(f"{path}: document boundaries do not run from 0 to {num_sequences}; the index is damaged")
    return _DTYPES[code], lengths, offsets, boundaries
