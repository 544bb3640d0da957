"""What is written here is read by megatron-core's own indexed dataset, where that is installed (pip install --no-deps megatron-core)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import alpaca_records, tiny_tokenizer, write_json

from mindspeed_lora.arguments.configs import PreprocessConfig, TemplateFlags, TokenizerFlags
from mindspeed_lora.data.indexed_dataset import IndexedDataset
from mindspeed_lora.data.merging import merge_pairs
from mindspeed_lora.data.preprocess import write_dataset

MOSS = {"turn_1": {"Human": "one", "MOSS": "1"}, "turn_2": {"Human": "two", "MOSS": "2"}}
CASES: dict[str, tuple[str | None, str | None, list[dict[str, Any]], dict[str, Any], int]] = {
    "instruction, some dropped": ("AlpacaStyleInstructionHandler", "llama2", alpaca_records(40), {"seq_length": 44}, 3),
    "packed": ("AlpacaStyleInstructionHandler", "qwen3", alpaca_records(40), {"seq_length": 256, "pack": True}, 3),
    "pairwise": ("AlpacaStylePairwiseHandler", "qwen3", [{"instruction": "a", "chosen": "b", "rejected": "no"}], {}, 4),
    "plain text, one empty": (None, None, [{"text": "a"}, {"text": ""}, {"text": "b " * 9}], {"append_eod": True}, 1),
    "several sequences a document": ("MOSSInstructionHandler", None, [{"chat": MOSS}, {"chat": MOSS}], {}, 3),
}


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def megatron() -> Any:
    return pytest.importorskip("megatron.core.datasets.indexed_dataset", exc_type=ImportError)


def check_equal(folder: Path, megatron: Any) -> int:
    stems = [path.with_suffix("") for path in folder.glob("*.idx")]
    for stem in stems:
        ours, theirs = IndexedDataset(stem), megatron.IndexedDataset(str(stem))
        assert theirs.index.dtype == np.int32
        assert theirs.document_indices.tolist() == ours.document_boundaries.tolist()
        assert theirs.sequence_lengths.tolist() == ours.lengths.tolist()
        assert [theirs[row].tolist() for row in range(len(theirs))] == [row.tolist() for row in ours]
    return len(stems)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_equal_content(case: str, tokenizer_dir: Path, tmp_path: Path, megatron: Any) -> None:
    handler, prompt_type, records, options, count = CASES[case]
    source = write_json(tmp_path / "in.json", records)
    template = TemplateFlags(prompt_type)
    report = write_dataset(
        PreprocessConfig(source, tmp_path / "out" / "x", TokenizerFlags(tokenizer_dir), template, handler_name=handler, **options)
    )
    assert report.num_written
    assert check_equal(tmp_path / "out", megatron) == count


@pytest.mark.filterwarnings("ignore")
def test_joined_files(tokenizer_dir: Path, tmp_path: Path, megatron: Any) -> None:
    """As megatron-core's own builder joins them."""
    for number in range(2):
        source = write_json(tmp_path / "in.json", [{"text": f"text {number} {'again ' * row}" if row != 2 else ""} for row in range(4)])
        write_dataset(PreprocessConfig(source, tmp_path / "parts" / f"{number}", TokenizerFlags(tokenizer_dir), seq_length=30))
    merge_pairs(tmp_path / "parts", tmp_path / "joined" / "all", ("text_document",))
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.int32)
    for number in range(2):
        builder.add_index(str(tmp_path / "parts" / f"{number}_text_document"))
    builder.finalize(str(tmp_path / "theirs.idx"))
    for end in ("bin", "idx"):
        assert (tmp_path / "joined" / f"all_text_document.{end}").read_bytes() == (tmp_path / f"theirs.{end}").read_bytes()
    assert check_equal(tmp_path / "joined", megatron) == 1
