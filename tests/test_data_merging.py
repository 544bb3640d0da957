"""``--merge-group-keys``: file pairs joined to one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mindspeed_lora.arguments.cli import main
from mindspeed_lora.data.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from mindspeed_lora.data.merging import merge_pairs
from mindspeed_lora.errors import DataError, UsageError


def write(stem: Path, documents: list[list[list[int]]], dtype: type[np.generic] = np.int32) -> None:
    with IndexedDatasetBuilder(stem, dtype) as builder:
        for document in documents:
            builder.add_documents([index for ids in document for index in ids], list(map(len, document)), [len(document)])
        builder.finish()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "parts").mkdir()
    write(tmp_path / "parts" / "b_text_document", [[[5]], [], [[6, 7], [8]]])
    write(tmp_path / "parts" / "a_text_document", [[[1, 2]], [[3]], []])
    write(tmp_path / "parts" / "a_labels_document", [[[9]]])
    return tmp_path / "parts"


def test_in_order_of_names_with_their_documents(folder: Path, tmp_path: Path) -> None:
    words = [
        "--input",
        str(folder),
        "--output-prefix",
        str(tmp_path / "new" / "all"),
        "--merge-group-keys",
        "text_document",
        "labels_document",
    ]
    assert main("preprocess_data.py", words) == 0
    joined = IndexedDataset(tmp_path / "new" / "all_text_document")
    assert [row.tolist() for row in joined] == [[1, 2], [3], [5], [6, 7], [8]]
    assert joined.document_boundaries.tolist() == [0, 1, 2, 2, 3, 3, 5]
    assert [row.tolist() for row in IndexedDataset(tmp_path / "new" / "all_labels_document")] == [[9]]
    assert len(list((tmp_path / "new").iterdir())) == 4


def test_refusals_leave_nothing(folder: Path, tmp_path: Path) -> None:
    prefix = tmp_path / "new" / "all"
    with pytest.raises(UsageError, match=r"--input .*nothing: with --merge-group-keys it must be a folder"):
        merge_pairs(tmp_path / "nothing", prefix, ("text",))
    with pytest.raises(UsageError, match=r"--merge-group-keys words: no .bin or .idx file in .* has it in its name"):
        merge_pairs(folder, prefix, ("text", "words"))
    write(folder / "c_text_document", [[[1]]], np.uint16)
    with pytest.raises(DataError, match=r"several dtypes \(a_text_document int32, b_text_document int32, c_text_document uint16\)"):
        merge_pairs(folder, prefix, ("text",))
    (folder / "c_text_document.bin").unlink()
    with pytest.raises(DataError, match=r"c_text_document.bin: no such file"):
        merge_pairs(folder, prefix, ("text",))
    assert not prefix.parent.exists()
