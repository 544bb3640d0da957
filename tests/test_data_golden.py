"""Preprocessing equals the peer's files, byte for byte, from the peer's own command lines: every ``data_*`` folder there is."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from helpers import golden

from mindspeed_lora.arguments.parser import parse
from mindspeed_lora.data.indexed_dataset import IndexedDataset
from mindspeed_lora.data.preprocess import write_dataset
from mindspeed_lora.data.sft_dataset import open_sft_dataset

CASES = (
    "data_alpaca_default",
    "data_alpaca_llama2",
    "data_alpaca_llama3",
    "data_alpaca_qwen",
    "data_alpaca_qwen3_parquet",
    "data_alpaca_qwen3_seq128",
    "data_alpaca_qwen3_think_false",
    "data_alpaca_qwen3_think_none",
    "data_alpaca_qwen3_think_true",
    "data_alpaca_qwen_pack512",
    "data_openai_qwen",
    "data_pair_qwen3_think_none",
    "data_pretrain",
    "data_sharegpt_llama3",
    "data_sharegpt_qwen",
)
INSTRUCTION = [name for name in CASES if "pair" not in name and "pretrain" not in name]


def run_case(case: Path, tmp_path: Path, workers: int = 1) -> Path:
    """Run a case's own command line, paths and number of workers aside, and return the folder of its files."""
    words = shlex.split((case / "cmd.txt").read_text())[2:]
    for flag in ("--input", "--tokenizer-name-or-path"):
        words[words.index(flag) + 1] = str(case / words[words.index(flag) + 1])
    words[words.index("--output-prefix") + 1] = str(tmp_path / "new" / "out")
    words[words.index("--workers") + 1] = str(workers)
    config, _ = parse("preprocess_data.py", words)
    write_dataset(config)
    return tmp_path / "new"


def different_files(case: Path, folder: Path) -> list[str]:
    expected = sorted((case / "output").iterdir())
    made = [path for path in folder.iterdir() if path.suffix != ".json"]  # but for the manifest
    assert sorted(path.name for path in made) == [path.name for path in expected]
    return [file.name for file in expected if file.read_bytes() != (folder / file.name).read_bytes()]


def test_no_case_is_forgotten() -> None:
    assert sorted(folder.name for folder in golden().glob("data_*")) == list(CASES)


@pytest.mark.parametrize("name", [name for name in CASES if name != "data_alpaca_qwen_pack512"])
def test_files_are_byte_identical(name: str, tmp_path: Path) -> None:
    case = golden() / name
    assert different_files(case, run_case(case, tmp_path)) == []


def test_packs_are_the_peers_and_those_of_records_that_it_drops(tmp_path: Path) -> None:
    """The peer cuts a record of an old template to 512 tokens and then drops it for having 512; here it is cut to 511."""
    case = golden() / "data_alpaca_qwen_pack512"
    folder = run_case(case, tmp_path)
    for key, expected in json.loads((case / "decoded.json").read_text()).items():
        rows = [row.tolist() for row in IndexedDataset(folder / f"out_{key}")]
        assert rows[4:] == expected["data"]  # 511 tokens fill a pack, so that the others are packed as before
        assert len(rows) == 4 + len(expected["data"])


@pytest.mark.parametrize("name", CASES)
def test_the_peers_files_are_read_as_the_peer_reads_them(name: str) -> None:
    case = golden() / name
    for key, expected in json.loads((case / "decoded.json").read_text()).items():
        dataset = IndexedDataset(case / "output" / f"out_{key}")
        assert [row.tolist() for row in dataset] == expected["data"]
        assert dataset.document_boundaries.tolist() == expected["document_indices"]


def test_two_processes_write_the_same_bytes(tmp_path: Path) -> None:
    case = golden() / "data_alpaca_qwen3_think_none"
    assert different_files(case, run_case(case, tmp_path, workers=2)) == []


@pytest.mark.parametrize("name", INSTRUCTION)
def test_training_opens_the_peers_files(name: str) -> None:
    case = golden() / name
    dataset = open_sft_dataset(case / "output" / "out")
    decoded = json.loads((case / "decoded.json").read_text())
    assert [dataset[i][0].tolist() for i in range(len(dataset))] == decoded["packed_input_ids_document"]["data"]
    assert [dataset[i][1].tolist() for i in range(len(dataset))] == decoded["packed_labels_document"]["data"]
    assert dataset.manifest is None
