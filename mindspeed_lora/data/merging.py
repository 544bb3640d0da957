"""``preprocess_data.py --merge-group-keys KEY...``: file pairs of one folder joined, for each key those whose names hold it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mindspeed_lora.data.indexed_dataset import IndexedDataset, IndexedDatasetBuilder, bin_path, idx_path
from mindspeed_lora.data.staging import publish, staged
from mindspeed_lora.errors import DataError, UsageError
from mindspeed_lora.log import get_logger

_SEQUENCES = 10_000  # copied at a time


def merge_pairs(folder: Path, prefix: Path, keys: tuple[str, ...]) -> None:
    """Write ``<prefix>_<key>.{bin,idx}`` for each key from the pairs in ``folder``, in the order of their names, and say so.

    Raises:
        UsageError: no such folder, or no pair for a key.
        DataError: half a pair, a damaged index, or pairs of several dtypes.
    """
    if not folder.is_dir():
        raise UsageError(f"--input {folder}: with --merge-group-keys it must be a folder that holds .bin and .idx files")
    groups = {key: _pairs(folder, key) for key in keys}
    with staged(prefix, "--output-prefix") as staging:
        counts = {key: _join(pairs, staging / f"{prefix.name}_{key}") for key, pairs in groups.items()}
        publish(staging, prefix, [path(prefix.with_name(f"{prefix.name}_{key}")).name for key in keys for path in (bin_path, idx_path)])
    for key, pairs in groups.items():
        names = ", ".join(pair.stem.name for pair in pairs)
        get_logger().info(f"wrote {prefix}_{key}.bin and .idx: {counts[key]:,} sequences from {names}")


def _pairs(folder: Path, key: str) -> list[IndexedDataset]:
    names = {file.stem for file in folder.iterdir() if file.suffix in (".bin", ".idx") and key in file.stem}
    if not names:
        raise UsageError(f"--merge-group-keys {key}: no .bin or .idx file in {folder} has it in its name")
    pairs = [IndexedDataset(folder / name) for name in sorted(names)]
    if len({pair.dtype for pair in pairs}) > 1:
        found = ", ".join(f"{pair.stem.name} {np.dtype(pair.dtype)}" for pair in pairs)
        raise DataError(f"--merge-group-keys {key}: the files have several dtypes ({found}); preprocess them alike")
    return pairs


def _join(pairs: list[IndexedDataset], target: Path) -> int:
    """Write all pairs to one, document after document; returns the number of sequences."""
    with IndexedDatasetBuilder(target, pairs[0].dtype) as builder:
        for pair in pairs:
            ends = pair.document_boundaries
            for first in range(0, len(ends) - 1, _SEQUENCES):
                last = min(first + _SEQUENCES, len(ends) - 1)
                sequences = slice(int(ends[first]), int(ends[last]))
                lengths = pair.lengths[sequences]
                start = int(pair.offsets[sequences.start]) // np.dtype(pair.dtype).itemsize if len(lengths) else 0
                ids = pair.ids[start : start + int(lengths.sum(dtype=np.int64))]
                builder.add_documents(ids, lengths, np.diff(ends[first : last + 1]))
        builder.finish()
    return sum(map(len, pairs))
