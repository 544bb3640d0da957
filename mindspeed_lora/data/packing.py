"""Several records in one sample: which records share a bag, how a bag is written, and where its records end.

The rules are the peer's (formats.md 3.5): the longest record that still fits is taken until none fits, in bags of
``seq_length - 1`` tokens, padded to ``seq_length``. ``--neat-pack`` writes the number of the record in its bag (from 1,
padding 0) as the attention mask, where ``--pack`` writes ones.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

IGNORED = -100  # the label of a position that is not trained
PACK, NEAT_PACK = "pack", "neat-pack"
"""Values of the manifest's ``data.packing``; absent or None: one record a sample."""

Ids = npt.NDArray[np.integer]


class Rows(Protocol):
    """Token ids by record number: an indexed dataset, or a list."""

    def __getitem__(self, index: int, /) -> Ids: ...


def fill_bags(lengths: Sequence[int] | npt.NDArray[np.integer], capacity: int) -> list[list[int]]:
    """Bags of record numbers: each takes the longest record that still fits, of equal ones the last, until none fits.

    Args:
        lengths: tokens of each record, 1 to ``capacity``.
        capacity: tokens of a bag.

    Raises:
        ValueError: a record does not fit into any bag.
    """
    waiting: dict[int, list[int]] = defaultdict(list)
    for number, length in enumerate(lengths):
        waiting[int(length)].append(number)
    sizes = sorted(waiting)
    if sizes and (sizes[0] < 1 or sizes[-1] > capacity):
        raise ValueError(f"lengths from {sizes[0]} to {sizes[-1]} do not fit into bags of {capacity}")
    bags: list[list[int]] = []
    while sizes:
        bag, room = [], capacity
        while place := bisect_right(sizes, room):
            size = sizes[place - 1]
            room -= size
            bag.append(waiting[size].pop())
            if not waiting[size]:
                del sizes[place - 1]
        bags.append(bag)
    return bags


def packed_samples(
    ids: Rows, labels: Rows, bags: Sequence[Sequence[int]], length: int, pad_token_id: int, neat: bool
) -> Iterator[dict[str, npt.NDArray[np.int32]]]:
    """``input_ids``, ``labels`` and ``attention_mask`` of each bag, int32 ``[length]``."""
    for bag in bags:
        sample = {
            "input_ids": np.full(length, pad_token_id, np.int32),
            "labels": np.full(length, IGNORED, np.int32),
            "attention_mask": np.full(length, 0 if neat else 1, np.int32),
        }
        start = 0
        for segment, number in enumerate(bag, 1):
            end = start + len(ids[number])
            sample["input_ids"][start:end] = ids[number]
            sample["labels"][start:end] = labels[number]
            if neat:
                sample["attention_mask"][start:end] = segment
            start = end
        yield sample


def ends_of_segments(segments: Ids) -> npt.NDArray[np.int32]:
    """Cumulative ends of the runs of equal segment numbers, int32; the last one is ``len(segments)``. Padding (0) is a run as well."""
    return np.append(np.flatnonzero(np.diff(segments)) + 1, len(segments)).astype(np.int32)


def without_padding(ids: Ids, labels: Ids, pad_token_id: int) -> int:
    """Length of a sample without the untrained pad tokens at its end."""
    meant = np.flatnonzero((ids != pad_token_id) | (labels != IGNORED))
    return int(meant[-1]) + 1 if len(meant) else 0


def ends_after_token(ids: Ids, labels: Ids, eos_token_id: int | None, pad_token_id: int) -> npt.NDArray[np.int32]:
    """Cumulative ends of what ends in an eos token, int32; the last one is ``len(ids)``. Padding at the end is one document.

    The peer's rule for packs without segment numbers: an eos token inside a record ends a document as well.
    """
    tail = without_padding(ids, labels, pad_token_id)
    ends = np.flatnonzero(ids[:tail] == eos_token_id) + 1 if eos_token_id is not None else np.empty(0, np.int64)
    return np.unique(np.concatenate([ends, [tail] if tail else [], [len(ids)]])).astype(np.int32)
