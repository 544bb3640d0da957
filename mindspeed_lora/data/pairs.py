"""Preference pairs: one prompt with a chosen and a rejected answer, as training reads and batches them.

::

    pair i  ->  row 2i    prompt + chosen answer     labels: -100 on the prompt
                row 2i+1  prompt + rejected answer

A micro-batch of M pairs is 2M rows, M chosen and then their M rejected ones. A pair longer than ``--seq-length`` is cut by
MindSpeed-LLM's rule: prompt and the longer answer share the room (:func:`mindspeed_lora.data.cutting.shared_room`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from mindspeed_lora.data.batches import BatchShape, StepBatch, make_batch
from mindspeed_lora.data.cutting import shared_room
from mindspeed_lora.data.indexed_dataset import IndexedDataset, idx_path
from mindspeed_lora.data.packing import IGNORED
from mindspeed_lora.data.sft_dataset import PAIR_KEYS, check_token_range, data_prefix, holds_pairs, key_stem, manifest_name
from mindspeed_lora.errors import DataError, UsageError
from mindspeed_lora.manifest import Manifest, read_manifest

SIDES = ("chosen", "rejected")
Cut = tuple[slice, slice]  # of the prompt, of the answer


class Column(Protocol):
    """Ids by row number."""

    def __getitem__(self, row: int, /) -> npt.NDArray[np.integer]:
        """Ids of a row."""
        ...


@dataclass(frozen=True)
class _CutColumn:
    """Chosen at even rows, rejected at odd ones, cut where ``cuts`` says so."""

    sides: tuple[IndexedDataset, IndexedDataset]
    cuts: dict[int, Cut]

    def __getitem__(self, row: int) -> npt.NDArray[np.integer]:
        pair, side = divmod(row, 2)
        ids, cut = self.sides[side][pair], self.cuts.get(row)
        return ids if cut is None else np.concatenate([ids[part] for part in cut])


@dataclass(frozen=True)
class PairRows:
    """The rows of all pairs, two a pair, no longer than ``--seq-length``."""

    input_ids: Column
    labels: Column
    lengths: npt.NDArray[np.int32]


class PairDataset:
    """Pairs in the order of the records. ``len`` counts pairs; ``rows`` has two of them each.

    ``usable`` bool ``[pairs]``: both answers have a token to train. ``num_cut``, ``num_equal``: pairs that were cut; pairs
    whose two answers are the same, which train nothing.
    """

    packing = None  # as an SFTDataset's: one record a row

    def __init__(self, prefix: Path, parts: dict[str, IndexedDataset], manifest: Manifest | None, seq_length: int) -> None:
        self.prefix, self.manifest, self._parts = prefix, manifest, parts
        ids = (parts["chosen_input_ids"], parts["rejected_input_ids"])
        labels = (parts["chosen_labels"], parts["rejected_labels"])
        lengths = np.stack([side.lengths for side in ids], axis=1).reshape(-1)
        cuts: dict[int, Cut] = {}
        for pair in np.flatnonzero(lengths.reshape(-1, 2).max(1) > seq_length).tolist():
            for side, cut in enumerate(_cuts([side[pair] for side in labels], seq_length)):
                row = 2 * pair + side
                cuts[row] = cut
                lengths[row] = sum(part.stop - (part.start or 0) for part in cut)
        self.rows = PairRows(_CutColumn(ids, cuts), _CutColumn(labels, cuts), lengths)
        self.num_cut = len(cuts) // 2
        self.usable, self.num_equal = _look_at(self.rows)

    def __len__(self) -> int:
        return len(self.rows.lengths) // 2

    def check_token_ids(self, vocab_size: int) -> None:
        """As :meth:`mindspeed_lora.data.sft_dataset.SFTDataset.check_token_ids`, of all four files."""
        for key, part in self._parts.items():
            check_token_range(part, key, vocab_size)

    def notes(self) -> list[str]:
        """What a reader of the start report should know of the pairs."""
        found = [
            (self.num_cut, "longer than --seq-length: prompt and answers are cut"),
            (int((~self.usable).sum()), "with an answer that has no trained token: skipped"),
            (self.num_equal, "whose chosen and rejected answers are the same: they train nothing"),
        ]
        return [f"{count} of {len(self)} pairs {what}" for count, what in found if count]


def _cuts(labels: Sequence[npt.NDArray[np.integer]], seq_length: int) -> list[Cut]:
    """What of each side is kept: the prompt ends where the first trained label is."""
    prompts = [_prompt_length(side) for side in labels]
    answers = [len(side) - prompt for side, prompt in zip(labels, prompts, strict=True)]
    max_prompt, max_answer = shared_room(max(prompts), max(answers), seq_length)
    return [
        (slice(0, min(prompt, max_prompt)), slice(prompt, prompt + min(answer, max_answer)))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def _prompt_length(labels: npt.NDArray[np.integer]) -> int:
    trained = labels != IGNORED
    return int(trained.argmax()) if trained.any() else len(labels)


def _look_at(rows: PairRows) -> tuple[npt.NDArray[np.bool_], int]:
    """Which pairs can be trained, and how many of them have two equal answers."""
    usable, equal = np.zeros(len(rows.lengths) // 2, np.bool_), 0
    for pair in range(len(usable)):
        chosen, rejected = rows.labels[2 * pair], rows.labels[2 * pair + 1]
        usable[pair] = bool((chosen[1:] != IGNORED).any() and (rejected[1:] != IGNORED).any())
        equal += bool(usable[pair] and np.array_equal(chosen, rejected))
    return usable, equal


def open_pair_dataset(data_path: str | Path, seq_length: int) -> PairDataset:
    """Open ``<prefix>_packed_{chosen,rejected}_{input_ids,labels}_document``, memory-mapped.

    Raises:
        UsageError: nothing is at the prefix, or instruction data, not pairs.
        DataError: a file is missing or damaged, or the files do not belong together; no pair can be trained.
    """
    prefix = data_prefix(data_path)
    if not holds_pairs(prefix):
        if idx_path(key_stem(prefix, "input_ids")).exists():
            raise UsageError(
                f"--stage dpo, but --data-path {data_path} holds instruction data; preprocess preference data with "
                "--handler-name AlpacaStylePairwiseHandler or SharegptStylePairwiseHandler, or use --stage sft"
            )
        raise UsageError(
            f"--data-path {data_path}: {idx_path(key_stem(prefix, 'chosen_input_ids'))} does not exist; "
            "give the value that --output-prefix had in preprocess_data.py"
        )
    parts = {key: IndexedDataset(key_stem(prefix, key)) for key in PAIR_KEYS}
    for side in SIDES:
        ids, labels = parts[f"{side}_input_ids"], parts[f"{side}_labels"]
        if len(ids) != len(parts["chosen_input_ids"]) or not np.array_equal(ids.lengths, labels.lengths):
            raise DataError(
                f"{idx_path(labels.stem)}: {len(labels)} sequences, {labels.num_tokens} tokens, unlike those of the other files of "
                f"{prefix.name}; they are of different runs, preprocess again"
            )
    if not len(parts["chosen_input_ids"]):
        raise DataError(f"{prefix}: the dataset is empty; see the report of preprocess_data.py for what was dropped")
    dataset = PairDataset(prefix, parts, read_manifest(prefix.parent, manifest_name(prefix)), seq_length)
    if not dataset.usable.any():
        raise DataError(f"{prefix}: every pair has an answer without a trained token; preprocess again")
    return dataset


def make_pair_batch(dataset: PairDataset, pairs: npt.NDArray[np.int64], shape: BatchShape) -> StepBatch:
    """The rows of this rank in the global batch ``pairs`` [G] (-1: none); ``shape`` counts in pairs.

    A pair that cannot be trained, and one that is none, are two rows of padding.
    """
    real = pairs >= 0
    usable = real & dataset.usable[pairs]
    blocks = np.where(usable, 2 * pairs, -1).reshape(-1, shape.micro_batch_size)
    rows = np.concatenate([blocks, np.where(blocks >= 0, blocks + 1, -1)], axis=1).reshape(-1)
    doubled = replace(shape, micro_batch_size=2 * shape.micro_batch_size, global_batch_size=2 * shape.global_batch_size)
    batch = make_batch(dataset.rows, rows, doubled)
    return replace(
        batch,
        sample_ids=tuple(int(pair) for pair in pairs),
        skipped_samples=int((real & ~usable).sum()),
        num_pairs=int(usable.sum()),
    )
