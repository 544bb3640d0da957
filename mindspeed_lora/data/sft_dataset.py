"""Tokenised instruction data as a list of samples, checked against the tokenizer and template it is used with."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mindspeed_lora.arguments.configs import TemplateFlags
from mindspeed_lora.data.chat_template import open_template
from mindspeed_lora.data.indexed_dataset import IndexedDataset, bin_path, idx_path
from mindspeed_lora.data.packing import IGNORED, ends_after_token, ends_of_segments, without_padding
from mindspeed_lora.data.tokenizer import tokenizer_fingerprint
from mindspeed_lora.errors import DataError, UsageError
from mindspeed_lora.manifest import Manifest, read_manifest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KEYS = ("input_ids", "labels", "attention_mask")
PAIR_KEYS = ("chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels")
_LONG_FORM = re.compile(rf"_packed(_({'|'.join(KEYS + PAIR_KEYS)})(_document(\.bin|\.idx)?)?)?_?$")
_SCAN_TOKENS = 1 << 24


def key_stem(prefix: Path, key: str) -> Path:
    """Path without extension of one key's file pair."""
    return prefix.with_name(f"{prefix.name}_packed_{key}_document")


def manifest_name(prefix: Path) -> str:
    """Name of the manifest, which lies beside the data."""
    return f"{prefix.name}_mindspeed_lora.json"


def data_prefix(data_path: str | Path) -> Path:
    """The ``--output-prefix`` value that ``data_path`` belongs to: itself, or a longer form down to a file name."""
    path = Path(data_path)
    name = _LONG_FORM.sub("", path.name) if not has_pair(path) else path.name
    return path.with_name(name) if name else path


def has_pair(prefix: Path) -> bool:
    """Whether preprocessed data lies at ``prefix``, single records or preference pairs."""
    return bool(prefix.name) and (idx_path(key_stem(prefix, "input_ids")).exists() or holds_pairs(prefix))


def holds_pairs(prefix: Path) -> bool:
    """Whether preprocessed preference pairs lie at ``prefix``."""
    return bool(prefix.name) and idx_path(key_stem(prefix, "chosen_input_ids")).exists()


class SFTDataset:
    """Samples in the order of the records; ``[i]`` gives (input_ids, labels), int64 ``[length]``, labels not shifted.

    ``lengths`` int32 ``[len(self)]``: tokens of each sample. ``manifest``: of the data, None for data of other programs.
    ``attention_mask[i]``: ones, or after --neat-pack the number of the record in its sample (from 1, padding 0).
    """

    def __init__(
        self, prefix: Path, input_ids: IndexedDataset, labels: IndexedDataset, attention_mask: IndexedDataset, manifest: Manifest | None
    ) -> None:
        self.prefix = prefix
        self.input_ids = input_ids
        self.labels = labels
        self.attention_mask = attention_mask
        self.manifest = manifest
        self.lengths = input_ids.lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        return self.input_ids[index].astype(np.int64), self.labels[index].astype(np.int64)

    @property
    def packing(self) -> str | None:
        """How the manifest says that records share a sample: :data:`PACK`, :data:`NEAT_PACK`, or None (not, or not known)."""
        return (self.manifest.data or {}).get("packing") if self.manifest is not None else None

    def has_segments(self) -> bool:
        """Whether the attention mask numbers records (some value is not 1). Reads it until the first such value."""
        values = self.attention_mask.ids
        return any(bool((values[start : start + _SCAN_TOKENS] != 1).any()) for start in range(0, len(values), _SCAN_TOKENS))

    def check_token_ids(self, vocab_size: int) -> None:
        """Read all ids once and compare them with the vocabulary.

        Raises:
            DataError: an id is negative or not below ``vocab_size``.
        """
        for key, dataset in (("input_ids", self.input_ids), ("labels", self.labels)):
            check_token_range(dataset, key, vocab_size)


def check_token_range(dataset: IndexedDataset, key: str, vocab_size: int) -> None:
    """Read all ids of one file; Raises DataError where one is not in the vocabulary (labels may be -100)."""
    ids, lowest = dataset.ids, IGNORED if key.endswith("labels") else 0
    for start in range(0, len(ids), _SCAN_TOKENS):
        piece = ids[start : start + _SCAN_TOKENS]
        wrong = np.flatnonzero((piece >= vocab_size) | ((piece < 0) & (piece != lowest)))
        if len(wrong):
            position = start + int(wrong[0])
            sample = int(np.searchsorted(np.cumsum(dataset.lengths, dtype=np.int64), position, "right"))
            raise DataError(
                f"{bin_path(dataset.stem)}: sample {sample} has the {key} value {int(ids[position])}, but the model's "
                f"vocabulary has {vocab_size} tokens; preprocess the data with this model's tokenizer"
            )


def open_sft_dataset(data_path: str | Path) -> SFTDataset:
    """Open ``<prefix>_packed_{input_ids,labels,attention_mask}_document``, memory-mapped.

    Raises:
        UsageError: nothing is at the prefix, or preference pairs.
        DataError: a file is damaged, or the files do not belong together.
        CheckpointError: the manifest beside the data is not readable.
    """
    if not str(data_path).strip():
        raise UsageError("--data-path is missing; give the value that --output-prefix had in preprocess_data.py")
    prefix = data_prefix(data_path)
    if holds_pairs(prefix) and not idx_path(key_stem(prefix, "input_ids")).exists():
        raise UsageError(
            f"--data-path {data_path} holds preference pairs, and this run trains on single records; add --stage dpo, "
            "or give instruction data"
        )
    if not has_pair(prefix):
        raise UsageError(
            f"--data-path {data_path}: {idx_path(key_stem(prefix, 'input_ids'))} does not exist; "
            "give the value that --output-prefix had in preprocess_data.py, or a longer form of it"
        )
    parts = {key: IndexedDataset(key_stem(prefix, key)) for key in KEYS}
    ids = parts["input_ids"]
    for part in parts.values():
        if not np.array_equal(part.lengths, ids.lengths):
            raise DataError(
                f"{idx_path(part.stem)}: {len(part)} sequences, {part.num_tokens} tokens, unlike those of input_ids "
                f"({len(ids)}, {ids.num_tokens}); the files are of different runs, preprocess again"
            )
    if not len(ids):
        raise DataError(f"{idx_path(ids.stem)}: the dataset is empty; see the report of preprocess_data.py for what was dropped")
    return SFTDataset(prefix, ids, parts["labels"], parts["attention_mask"], read_manifest(prefix.parent, manifest_name(prefix)))


@dataclass(frozen=True)
class DocumentRule:
    """Where the documents of a sample end (--reset-attention-mask).

    ``by_segments``: where the number in the attention mask changes; else after each eos token, as the peer does.
    """

    by_segments: bool
    eos_token_id: int | None
    pad_token_id: int

    def ends(self, dataset: SFTDataset, sample: int, length: int) -> npt.NDArray[np.int32]:
        """Cumulative ends of the documents in the first ``length`` tokens of a sample, padding left out, so that the last
        one is the number of tokens that mean something (empty: none does).
        """
        ids, labels = dataset.input_ids[sample][:length], dataset.labels[sample][:length]
        if self.by_segments:
            segments = dataset.attention_mask[sample][:length]
            ends = ends_of_segments(segments)
            return ends[:-1] if segments[-1] == 0 else ends
        ends = ends_after_token(ids, labels, self.eos_token_id, self.pad_token_id)
        return ends[ends <= without_padding(ids, labels, self.pad_token_id)]


def check_data_manifest(manifest: Manifest | None, tokenizer: PreTrainedTokenizerBase, flags: TemplateFlags) -> None:
    """Compare what the data was made with and what this run uses; nothing to compare where there is no manifest.

    Raises:
        UsageError: another tokenizer, prompt type (by content, not by name) or thinking mode.
    """
    if manifest is None:
        return
    made_with = manifest.tokenizer or {}
    found = tokenizer_fingerprint(tokenizer)
    if made_with.get("fingerprint", found) != found:
        raise UsageError(
            f"the data was made with the tokenizer {made_with.get('path')} (fingerprint {made_with['fingerprint'][:12]}), "
            f"but this run uses {tokenizer.name_or_path} ({found[:12]}); pass the same --tokenizer-name-or-path, or preprocess again"
        )
    template = manifest.template or {}
    asked = "--hf-chat-template" if flags.hf_chat_template else f"--prompt-type {flags.prompt_type}" if flags.prompt_type else ""
    made = template.get("fingerprint")
    if asked and made is not None and open_template(flags, tokenizer).fingerprint() != made:
        raise UsageError(
            f"{asked} is not what the data was made with: {template.get('name')} (content differs); leave the flag out, or preprocess again"
        )
    mode = template.get("enable_thinking")
    if flags.enable_thinking is not None and mode is not None and flags.enable_thinking != mode:
        raise UsageError(
            f"--enable-thinking {flags.enable_thinking}, but the data was made with --enable-thinking {mode}; "
            "leave the flag out, or preprocess again"
        )


def split_ranges(num_samples: int, shares: tuple[float, float, float]) -> tuple[range, range, range]:
    """Consecutive ranges of sample numbers for training, validation and test; shares of any scale, rounded as Megatron does.

    Raises:
        UsageError: a negative share, all zero, or a training range without a sample (an empty validation range is fine).
    """
    text = ",".join(f"{share:g}" for share in shares)
    total = float(sum(shares))
    if len(shares) != 3 or min(shares) < 0 or total <= 0:
        raise UsageError(f"--split {text}: give three shares that are not negative, for training, validation and test, such as 969,30,1")
    ends = [0]
    for share in shares:
        ends.append(ends[-1] + round(share / total * num_samples))
    surplus = ends[-1] - num_samples
    ends = [0, *(min(max(end - surplus, 0), num_samples) for end in ends[1:])]
    train, valid, test = (range(start, end) for start, end in itertools.pairwise(ends))
    if not train:
        raise UsageError(f"--split {text} leaves none of the {num_samples} samples for training; use --split 100,0,0 or give more data")
    return train, valid, test
