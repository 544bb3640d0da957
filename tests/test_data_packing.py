"""Packs: what goes into a bag, how it is written, where its documents end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import alpaca_records, tiny_tokenizer, write_json
from hypothesis import given, settings
from hypothesis import strategies as st

from mindspeed_lora.arguments.configs import PreprocessConfig, TemplateFlags, TokenizerFlags
from mindspeed_lora.data.indexed_dataset import IndexedDataset
from mindspeed_lora.data.packing import IGNORED, ends_after_token, ends_of_segments, fill_bags, packed_samples
from mindspeed_lora.data.preprocess import write_dataset
from mindspeed_lora.data.sft_dataset import KEYS, key_stem, open_sft_dataset
from mindspeed_lora.errors import UsageError

LENGTH = 96


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def written(folder: Path, tokenizer_dir: Path, records: list[dict[str, Any]] | None = None, **flags: Any) -> tuple[Any, Path]:
    source = write_json(folder / "in.json", records or alpaca_records(20))
    config = PreprocessConfig(
        source, folder / "out", TokenizerFlags(tokenizer_dir), TemplateFlags("qwen3"), seq_length=flags.pop("seq_length", LENGTH), **flags
    )
    return write_dataset(config), config.output_prefix


def rows(prefix: Path, key: str) -> list[list[int]]:
    return [row.tolist() for row in IndexedDataset(key_stem(prefix, key))]


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(40, 90))
@settings(max_examples=60, deadline=None)
def test_bags_hold_every_record_once_and_no_more_than_fits(lengths: list[int], capacity: int) -> None:
    bags = fill_bags(lengths, capacity)
    assert sorted(number for bag in bags for number in bag) == list(range(len(lengths)))
    for index, bag in enumerate(bags):
        room = capacity - sum(lengths[number] for number in bag)
        assert room >= 0
        assert all(lengths[number] > room for later in bags[index + 1 :] for number in later)  # none that was left would have fitted


def test_the_longest_that_fits_first_and_the_last_of_equal_ones_first() -> None:
    assert fill_bags([5, 3, 5, 2, 3, 9], 10) == [[5], [2, 0], [4, 1, 3]]
    with pytest.raises(ValueError, match="do not fit"):
        fill_bags([11], 10)


@given(st.lists(st.integers(1, 15), min_size=1, max_size=12))
@settings(max_examples=40, deadline=None)
def test_no_token_is_lost_and_segments_name_the_records(lengths: list[int]) -> None:
    ids = [np.arange(length) + 100 * (number + 1) for number, length in enumerate(lengths)]
    labels = [np.where(row % 2, row, IGNORED) for row in ids]
    bags = fill_bags(lengths, 15)
    for bag, sample in zip(bags, packed_samples(ids, labels, bags, 16, 7, neat=True), strict=True):
        ends = ends_of_segments(sample["attention_mask"])
        assert ends.tolist() == [*np.cumsum([lengths[number] for number in bag]), 16]
        starts = [0, *ends[:-1]]
        for number, start, end in zip(bag, starts, ends, strict=False):
            assert np.array_equal(sample["input_ids"][start:end], ids[number])
            assert np.array_equal(sample["labels"][start:end], labels[number])
        assert set(sample["input_ids"][ends[-2] :]) == {7} and set(sample["labels"][ends[-2] :]) == {IGNORED}


@pytest.mark.parametrize("neat", [False, True])
def test_packed_files_hold_the_records_of_the_unpacked_ones(neat: bool, tokenizer_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "single").mkdir()
    (tmp_path / "packed").mkdir()
    _, single = written(tmp_path / "single", tokenizer_dir)
    report, packed = written(tmp_path / "packed", tokenizer_dir, pack=True, neat_pack=neat)
    lengths = [len(row) for row in rows(single, "input_ids")]
    bags = fill_bags(lengths, LENGTH - 1)
    assert report.num_packs == len(bags) < len(lengths)
    assert any(line.startswith(f"packed into {len(bags)} samples of {LENGTH} tokens") for line in report.lines())
    for key in ("input_ids", "labels"):
        records = rows(single, key)
        for bag, row in zip(bags, rows(packed, key), strict=True):
            together = [value for number in bag for value in records[number]]
            assert len(row) == LENGTH and row[: len(together)] == together
    masks = rows(packed, "attention_mask")
    numbers = [[segment for segment, record in enumerate(bag, 1) for _ in range(lengths[record])] for bag in bags]
    assert masks == ([row + [0] * (LENGTH - len(row)) for row in numbers] if neat else [[1] * LENGTH] * len(bags))
    manifest = open_sft_dataset(packed).manifest
    assert manifest is not None and manifest.data is not None
    assert manifest.data["packing"] == ("neat-pack" if neat else "pack") and manifest.counts["packs"] == len(bags)
    assert sorted(path.name for path in packed.parent.iterdir()) == sorted(
        ["in.json", "out_mindspeed_lora.json", *(f"out_packed_{key}_document.{end}" for key in KEYS for end in ("bin", "idx"))]
    )


def test_neat_pack_cuts_what_pack_drops(tokenizer_dir: Path, tmp_path: Path) -> None:
    """A template that cuts to exactly --seq-length: --pack drops such a record, --neat-pack takes one more token off it."""
    templates = write_json(tmp_path / "templates.json", [{"name": "mine", "format_user": {"slots": ["Q: {{content}}\nA: "]}}])
    source = write_json(tmp_path / "in.json", [{"instruction": "again " * 40, "input": "", "output": "word " * 40}, *alpaca_records(4)])

    def run(name: str, neat: bool) -> tuple[Any, Path]:
        config = PreprocessConfig(
            source,
            tmp_path / name,
            TokenizerFlags(tokenizer_dir),
            TemplateFlags("mine", templates),
            seq_length=64,
            pack=True,
            neat_pack=neat,
        )
        return write_dataset(config), config.output_prefix

    report, prefix = run("pack", False)
    assert report.num_skipped == {"64 tokens or more (--seq-length)": 1}
    report, prefix = run("neat", True)
    assert not report.num_skipped and report.notes["records cut to --seq-length"] == 1
    assert rows(prefix, "attention_mask")[0] == [1] * 63 + [0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [({"pack": True, "seq_length": None}, "--pack needs --seq-length"), ({"neat_pack": True}, "--neat-pack .* needs --pack")],
)
def test_pack_flags_that_lack_another(flags: dict[str, Any], message: str, tokenizer_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        written(tmp_path, tokenizer_dir, **flags)


def test_ends_after_each_eos_token_and_before_the_padding() -> None:
    ids, labels = np.array([5, 2, 6, 2, 2, 0, 0]), np.array([-100, -100, 6, 2, -100, -100, -100])
    assert ends_after_token(ids, labels, 2, 0).tolist() == [2, 4, 5, 7]
    assert ends_after_token(ids, labels, None, 0).tolist() == [5, 7]
    assert ends_after_token(ids[:4], labels[:4], 2, 0).tolist() == [2, 4]
    same = np.array([5, 2, 6, 2, 2, 2, 2])  # padding is eos as well: the trained eos is the last that is meant
    assert ends_after_token(same, labels, 2, 2).tolist() == [2, 4, 7]
