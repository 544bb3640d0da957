"""Preprocessing equals the peer's files, byte for byte."""

from __future__ import annotations

import itertools
import json
import shlex
from pathlib import Path

import pytest
from helpers import golden

from mindspeed_lora.arguments.configs import PreprocessConfig, TemplateFlags, TokenizerFlags
from mindspeed_lora.data.preprocess import write_dataset
from mindspeed_lora.data.sft_dataset import open_sft_dataset

CASES = (
    "data_alpaca_qwen3_think_true",
    "data_alpaca_qwen3_think_false",
    "data_alpaca_qwen3_think_none",
    "data_alpaca_qwen3_seq128",
    "data_alpaca_qwen3_parquet",
    "data_alpaca_llama2",
    "data_alpaca_default",
    "data_alpaca_qwen",
    "data_alpaca_llama3",
    "data_sharegpt_qwen",  # with a call of a tool
    "data_sharegpt_llama3",
    "data_openai_qwen",
)


def run_case(case: Path, tmp_path: Path, workers: int = 1) -> Path:
    """Run a golden case's own command line and return the prefix."""
    words = shlex.split((case / "cmd.txt").read_text())
    value = {word: following for word, following in itertools.pairwise([*words, ""]) if word.startswith("--")}
    config = PreprocessConfig(
        input=case / value["--input"],
        output_prefix=tmp_path / "new" / "out",
        tokenizer=TokenizerFlags(case / value["--tokenizer-name-or-path"]),
        template=TemplateFlags(value["--prompt-type"], None, value.get("--enable-thinking")),
        handler_name=value["--handler-name"],
        map_keys=json.loads(value.get("--map-keys", "null")),
        seq_length=int(value["--seq-length"]) if "--seq-length" in value else None,
        workers=workers,
        pack="--pack" in words,
        neat_pack="--neat-pack" in words,
    )
    write_dataset(config)
    return config.output_prefix


def different_files(case: Path, prefix: Path) -> list[str]:
    expected = sorted((case / "output").iterdir())
    assert expected
    return [file.name for file in expected if file.read_bytes() != (prefix.parent / file.name).read_bytes()]


@pytest.mark.parametrize("name", [*CASES, "data_alpaca_qwen_pack512"])
def test_files_are_byte_identical(name: str, tmp_path: Path) -> None:
    case = golden() / name
    assert different_files(case, run_case(case, tmp_path)) == []


def test_pairwise_files_are_byte_identical(tmp_path: Path) -> None:
    case = golden() / "data_pair_qwen3_think_none"
    assert different_files(case, run_case(case, tmp_path, workers=1)) == []
    assert len(list((tmp_path / "new").iterdir())) == 9  # four pairs and the manifest


def test_two_processes_write_the_same_bytes(tmp_path: Path) -> None:
    case = golden() / "data_alpaca_qwen3_think_none"
    assert different_files(case, run_case(case, tmp_path, workers=2)) == []


@pytest.mark.parametrize("name", CASES)
def test_the_peers_files_can_be_read(name: str) -> None:
    case = golden() / name
    dataset = open_sft_dataset(case / "output" / "out")
    decoded = json.loads((case / "decoded.json").read_text())
    assert [dataset[i][0].tolist() for i in range(len(dataset))] == decoded["packed_input_ids_document"]["data"]
    assert [dataset[i][1].tolist() for i in range(len(dataset))] == decoded["packed_labels_document"]["data"]
    assert dataset.manifest is None
