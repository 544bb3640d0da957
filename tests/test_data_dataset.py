"""Indexed datasets on disk: reading, damage, the forms of --data-path, splits, and checks against the run."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from mindspeed_lora.arguments.configs import TemplateFlags, TokenizerFlags
from mindspeed_lora.data.indexed_dataset import IndexedDataset, IndexedDatasetBuilder, bin_path, idx_path
from mindspeed_lora.data.sft_dataset import KEYS, check_data_manifest, key_stem, open_sft_dataset, split_ranges
from mindspeed_lora.data.templates import load_template
from mindspeed_lora.data.tokenizer import load_tokenizer, tokenizer_fingerprint
from mindspeed_lora.errors import DataError, UsageError
from mindspeed_lora.manifest import Manifest

ROWS = ([1, 2, 3], [4], [5, 6, 7, 8])


def write(prefix: Path, rows: Any = ROWS, keys: tuple[str, ...] = KEYS) -> Path:
    prefix.parent.mkdir(parents=True, exist_ok=True)
    for key in keys:
        with IndexedDatasetBuilder(key_stem(prefix, key)) as builder:
            for row in rows:
                builder.add_document(row)
            builder.finish()
    return prefix


def test_index_layout(tmp_path: Path) -> None:
    with IndexedDatasetBuilder(tmp_path / "a") as builder:
        builder.add_document([1, -100])
        builder.add_empty_document()
        builder.add_documents([3, 4, 5], [1, 2], [0, 2, 0])
        builder.finish()
    data = (tmp_path / "a.idx").read_bytes()
    assert data[:34] == b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 4, 3, 6)
    assert data[34:] == (
        np.array([2, 1, 2], np.int32).tobytes()
        + np.array([0, 8, 12], np.int64).tobytes()
        + np.array([0, 1, 1, 1, 3, 3], np.int64).tobytes()
    )
    assert (tmp_path / "a.bin").read_bytes() == np.array([1, -100, 3, 4, 5], np.int32).tobytes()
    read = IndexedDataset(tmp_path / "a")
    assert [row.tolist() for row in read] == [[1, -100], [3], [4, 5]]
    assert read.document_boundaries.tolist() == [0, 1, 1, 1, 3, 3]


@given(st.lists(st.lists(st.integers(-100, 2**31 - 1), max_size=9), max_size=9))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, rows: list[list[int]]) -> None:
    stem = tmp_path_factory.mktemp("round") / "x"
    with IndexedDatasetBuilder(stem) as builder:
        for row in rows:
            builder.add_document(row)
        builder.finish()
    assert [row.tolist() for row in IndexedDataset(stem)] == rows


@pytest.mark.parametrize(
    "form",
    [
        "",
        "_packed",
        "_packed_",
        "_packed_input_ids",
        "_packed_labels_document",
        "_packed_input_ids_document.bin",
        "_packed_labels_document.idx",
    ],
)
@pytest.mark.parametrize("name", ["alpaca", "my_packed", "v1.5"])
def test_data_path_takes_the_prefix_or_a_longer_form(tmp_path: Path, form: str, name: str) -> None:
    prefix = write(tmp_path / "data" / name)
    dataset = open_sft_dataset(f"{prefix}{form}")
    assert [dataset[i][0].tolist() for i in range(3)] == list(ROWS)
    assert dataset[0][0].dtype == dataset[0][1].dtype == np.int64


def corrupt(prefix: Path, damage: str) -> None:
    index, data = idx_path(key_stem(prefix, "labels")), bin_path(key_stem(prefix, "labels"))
    raw = bytearray(index.read_bytes())
    if damage == "truncated index":
        index.write_bytes(raw[:-5])
    elif damage == "tiny index":
        index.write_bytes(raw[:10])
    elif damage == "magic":
        index.write_bytes(b"X" + raw[1:])
    elif damage == "version":
        index.write_bytes(raw[:9] + struct.pack("<Q", 2) + raw[17:])
    elif damage == "dtype":
        index.write_bytes(raw[:17] + b"\x63" + raw[18:])
    elif damage == "length":
        index.write_bytes(raw[:34] + struct.pack("<i", -3) + raw[38:])
    elif damage == "offsets":
        index.write_bytes(raw[:46] + struct.pack("<q", 4) + raw[54:])
    elif damage == "documents":
        index.write_bytes(raw[:-8] + struct.pack("<q", 9))
    elif damage == "truncated data":
        data.write_bytes(data.read_bytes()[:-4])
    elif damage == "missing data":
        data.unlink()
    elif damage == "other run":
        write(prefix, ([1], [2]), ("labels",))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("truncated index", "_packed_labels_document.idx: 97 bytes, but 3 sequences and 4 document entries make 102"),
        ("tiny index", "10 bytes are too few"),
        ("magic", "this is no Megatron index"),
        ("version", "index version 2; this program reads version 1"),
        ("dtype", "unknown dtype code 99"),
        ("length", "negative sequence length"),
        ("offsets", "offsets do not follow from their lengths"),
        ("documents", "document boundaries do not run from 0 to 3"),
        ("truncated data", "_packed_labels_document.bin: 28 bytes, but .*labels_document.idx describes 32"),
        ("missing data", "_packed_labels_document.bin: no such file"),
        ("other run", "2 sequences, 2 tokens, unlike those of input_ids"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, damage: str, message: str) -> None:
    prefix = write(tmp_path / "p")
    corrupt(prefix, damage)
    with pytest.raises(DataError, match=message) as error:
        open_sft_dataset(prefix)
    assert error.value.exit_code == 1


def test_missing_and_empty_data(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--data-path .*nothing.*output-prefix"):
        open_sft_dataset(tmp_path / "nothing")
    with pytest.raises(UsageError, match=r"--data-path is missing"):
        open_sft_dataset("")
    with pytest.raises(DataError, match="the dataset is empty"):
        open_sft_dataset(write(tmp_path / "empty", ()))


def test_token_ids_are_compared_with_the_vocabulary(tmp_path: Path) -> None:
    dataset = open_sft_dataset(write(tmp_path / "p"))
    dataset.check_token_ids(9)
    with pytest.raises(DataError, match="sample 2 has the input_ids value 8, but the model's vocabulary has 8 tokens"):
        dataset.check_token_ids(8)
    write(tmp_path / "p", ([1, 2, 3], [-100], [5, 6, 7, 8]), ("labels",))
    open_sft_dataset(tmp_path / "p").check_token_ids(9)
    write(tmp_path / "p", ([1, 2, 3], [-100], [5, 6, 7, 8]), ("input_ids",))
    with pytest.raises(DataError, match="sample 1 has the input_ids value -100"):
        open_sft_dataset(tmp_path / "p").check_token_ids(9)


@pytest.mark.parametrize(
    ("size", "shares", "ends"),
    [
        (52002, (969, 30, 1), (50390, 51950, 52002)),
        (20, (969, 30, 1), (19, 20, 20)),
        (10, (100, 0, 0), (10, 10, 10)),
        (3, (0.5, 0.5, 0), (1, 3, 3)),  # both round to 2; Megatron shifts every boundary by the surplus
        (1, (969, 30, 1), (1, 1, 1)),
    ],
)
def test_split_by_rounded_shares(size: int, shares: tuple[float, float, float], ends: tuple[int, ...]) -> None:
    ranges = split_ranges(size, shares)
    assert tuple(part.stop for part in ranges) == ends
    assert [index for part in ranges for index in part] == list(range(size))


@pytest.mark.parametrize("shares", [(0, 1, 0), (-1, 1, 1), (0, 0, 0)])
def test_bad_splits(shares: tuple[float, float, float]) -> None:
    with pytest.raises(UsageError, match="--split"):
        split_ranges(100, shares)


def manifest(tokenizer: Any, mode: str = "none") -> Manifest:
    template = {"name": "qwen3", "fingerprint": load_template("qwen3").fingerprint(), "enable_thinking": mode}
    return Manifest("data", tokenizer={"path": "/made/with", "fingerprint": tokenizer_fingerprint(tokenizer)}, template=template)


def test_manifest_is_compared_with_the_run(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(TokenizerFlags(tiny_tokenizer(tmp_path)))
    for flags in (TemplateFlags(), TemplateFlags("qwen3"), TemplateFlags("qwen3", None, "none")):
        check_data_manifest(manifest(tokenizer), tokenizer, flags)
    check_data_manifest(None, tokenizer, TemplateFlags("llama2"))
    with pytest.raises(UsageError, match="--prompt-type llama2 is not what the data was made with: qwen3"):
        check_data_manifest(manifest(tokenizer), tokenizer, TemplateFlags("llama2"))
    with pytest.raises(UsageError, match="--enable-thinking true, but the data was made with --enable-thinking false"):
        check_data_manifest(manifest(tokenizer, "false"), tokenizer, TemplateFlags("qwen3", None, "true"))
    made = manifest(tokenizer)
    tokenizer.add_tokens(["one more"])
    with pytest.raises(UsageError, match=f"made with the tokenizer /made/with .*but this run uses {tmp_path}"):
        check_data_manifest(made, tokenizer, TemplateFlags())


@pytest.mark.parametrize(("content", "message"), [(None, "is not a folder"), ("", "holds no tokenizer"), ("{", "cannot load a tokenizer")])
def test_bad_tokenizer_folders(tmp_path: Path, content: str | None, message: str) -> None:
    folder = tmp_path / "tokenizer"
    if content is not None:
        folder.mkdir()
    if content:
        (folder / "tokenizer.json").write_text(content)
    with pytest.raises(UsageError, match=f"--tokenizer-name-or-path.*{message}"):
        load_tokenizer(TokenizerFlags(folder))
    with pytest.raises(UsageError, match="beside --load"):
        load_tokenizer(TokenizerFlags(), folder)
    with pytest.raises(UsageError, match="--tokenizer-name-or-path is missing"):
        load_tokenizer(TokenizerFlags(), None)


def test_fingerprint_sees_vocabulary_and_eos(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(TokenizerFlags(tiny_tokenizer(tmp_path)))
    first = tokenizer_fingerprint(tokenizer)
    assert first == tokenizer_fingerprint(load_tokenizer(TokenizerFlags(), tmp_path))
    tokenizer.eos_token = "<|endoftext|>"
    assert tokenizer_fingerprint(tokenizer) != first
