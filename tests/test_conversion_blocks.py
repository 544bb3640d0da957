"""Embedding and head pass in blocks: many small blocks write the same bytes as one, padding included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conversion_helpers import assert_same_tensors, run_convert
from helpers import tiny_qwen3

from mindspeed_lora.conversion import merge
from mindspeed_lora.errors import CheckpointError
from mindspeed_lora.manifest import read_manifest
from mindspeed_lora.weights import megatron_folder, torch_stream


def checksums(folder: Path) -> dict[str, str]:
    manifest = read_manifest(folder)
    assert manifest is not None
    return {part.file: part.crc32 for part in manifest.parts}


@pytest.mark.parametrize("tied", [False, True])
def test_blocks_write_what_one_piece_writes(tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf = tiny_qwen3(tmp_path / "hf", tied=tied, num_hidden_layers=2)
    sizes: dict[str, Any] = dict(target_tensor_parallel_size=4, target_pipeline_parallel_size=2, make_vocab_size_divisible_by=96)
    results = []
    for block in (1 << 25, 7 * 64 * 4):  # 7 rows of fp32
        monkeypatch.setattr(merge, "_BLOCK_BYTES", block)
        monkeypatch.setattr(megatron_folder, "_REOPEN_AFTER_BYTES", block)
        place = tmp_path / str(block)
        run_convert("hf", "mg", hf, place / "mg", **sizes)
        run_convert("mg", "mg", place / "mg", place / "mg2", target_tensor_parallel_size=1, params_dtype="bf16")
        run_convert("mg", "hf", place / "mg", place / "hf")
        results.append([checksums(place / name) for name in ("mg", "mg2", "hf")])
    assert results[0][2] == results[1][2] and len(results[0][0]) == 8
    assert_same_tensors(tmp_path / str(block) / "hf", hf)
    for whole, pieces in zip(*results, strict=True):
        assert set(whole) == set(pieces)
    for name in ("mg", "mg2"):  # torch writes its temporary name into the file, so contents are compared
        for file in (tmp_path / str(1 << 25) / name).rglob("*.pt"):
            other = tmp_path / str(block) / file.relative_to(tmp_path / str(1 << 25))
            first, second = (torch_files_model(path) for path in (file, other))
            assert all(value.equal(second[key]) for key, value in first.items() if value is not None) and list(first) == list(second)


def torch_files_model(path: Path) -> dict[str, Any]:
    from mindspeed_lora.weights.torch_files import load_torch_file

    model: dict[str, Any] = load_torch_file(path)["model"]
    return model


def test_blocks_of_another_total_are_refused(tmp_path: Path) -> None:
    import torch

    with (tmp_path / "file").open("wb") as file:
        for rows in (2, 4):
            blocks = [torch.zeros(1, 5)] * rows
            with pytest.raises(CheckpointError, match=rf"x is torch.float32 \[{rows}, 5\], laid out as torch.float32 \[3, 5\]"):
                torch_stream.write_data(file.fileno(), 0, blocks, (3, 5), torch.float32, "x")
        with pytest.raises(CheckpointError, match=r"laid out as torch\.float32"):
            torch_stream.write_data(file.fileno(), 0, torch.zeros(3, 5).half(), (3, 5), torch.float32, "x")
