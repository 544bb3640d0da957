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
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


class IndexedDatasetBuilder:
    """Write ``<stem>.bin`` as sequences come and ``<stem>.idx`` at :meth:`finish`; a context manager that closes the file.

    The caller writes to a temporary place and renames: see ``data/preprocess.py``.
    """

    def __init__(self, stem: Path, dtype: type[np.generic] = np.int32) -> None:
        self.stem = Path(stem)
        self.dtype = dtype
        self._file: BinaryIO = bin_path(self.stem).open("wb")
        self._lengths: list[npt.NDArray[np.int32]] = []
        self._boundaries: list[npt.NDArray[np.int64]] = [np.zeros(1, np.int64)]
        self._num_sequences = 0

    def __enter__(self) -> IndexedDatasetBuilder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

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
        self._file.write(ids.tobytes())
        self._lengths.append(lengths)
        self._boundaries.append(self._num_sequences + np.cumsum(sequences_per_document, dtype=np.int64))
        self._num_sequences += len(lengths)

    def finish(self) -> None:
        """Close the ``.bin`` and write the ``.idx``."""
        self._file.close()
        lengths = np.concatenate(self._lengths) if self._lengths else np.empty(0, np.int32)
        boundaries = np.concatenate(self._boundaries)
        offsets = np.zeros(len(lengths), np.int64)
        np.cumsum(lengths[:-1], dtype=np.int64, out=offsets[1:])
        offsets *= np.dtype(self.dtype).itemsize
        with idx_path(self.stem).open("wb") as file:
            file.write(_HEADER.pack(MAGIC, VERSION, _CODES[self.dtype], len(lengths), len(boundaries)))
            file.write(lengths.tobytes())
            file.write(offsets.tobytes())
            file.write(boundaries.tobytes())


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
