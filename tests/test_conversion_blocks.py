"""Tensors pass in blocks, written a few behind: many small blocks write the same bytes as one, padding included."""

from __future__ import annotations

import itertools
import os
import random
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conversion_helpers import TARGETS, assert_same_tensors, random_lora, run_convert, write_megatron_adapter
from helpers import tiny_qwen3

from mindspeed_lora.conversion import merge, stream
from mindspeed_lora.errors import CheckpointError
from mindspeed_lora.files import crc32_joined, crc32_of
from mindspeed_lora.manifest import read_manifest
from mindspeed_lora.weights import block_writer, megatron_folder, torch_stream
from mindspeed_lora.weights.block_writer import Block, BlockWriter
from mindspeed_lora.weights.config import Layout
from mindspeed_lora.weights.lora_spec import LoraSpec
from mindspeed_lora.weights.sources import open_base
from mindspeed_lora.weights.table import WeightTable


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
        monkeypatch.setattr(stream, "BLOCK_BYTES", block)
        monkeypatch.setattr(stream, "WINDOW_BYTES", block)
        monkeypatch.setattr(stream, "PIECE_BYTES", block * 3 // 7)
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


def test_blocks_merge_as_one_piece_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf = tiny_qwen3(tmp_path / "hf", num_hidden_layers=2, dtype="bfloat16")
    table, spec = WeightTable(open_base(hf).model_config), LoraSpec(4, 8.0, TARGETS)
    adapter = write_megatron_adapter(tmp_path / "lora", table, spec, random_lora(table, spec), Layout(2, 1))
    run_convert("hf", "mg", hf, tmp_path / "mg", target_tensor_parallel_size=2)
    found = []
    for block in (1 << 22, 7 * 64 * 2):  # 7 rows of bf16
        monkeypatch.setattr(stream, "BLOCK_BYTES", block)
        monkeypatch.setattr(stream, "WINDOW_BYTES", block)
        monkeypatch.setattr(merge, "_CACHED_BYTES", block)  # of fp32: pieces of 3 rows
        for kind, source in (("hf", hf), ("mg", tmp_path / "mg")):
            run_convert(kind, "hf", source, tmp_path / f"{kind}{block}", lora_load=adapter)
            found.append(checksums(tmp_path / f"{kind}{block}"))
    assert all(each == found[0] for each in found)


def torch_files_model(path: Path) -> dict[str, Any]:
    from mindspeed_lora.weights.torch_files import load_torch_file

    model: dict[str, Any] = load_torch_file(path)["model"]
    return model


def rows_of(tensor: torch.Tensor) -> Block:
    return Block(tuple(tensor.shape), tensor.dtype, lambda: [tensor])


def test_blocks_of_another_total_are_refused(tmp_path: Path) -> None:
    with BlockWriter(tmp_path / "file") as out:
        for rows in (2, 4):
            blocks = [rows_of(torch.zeros(1, 5))] * rows
            with pytest.raises(CheckpointError, match=rf"x is torch.float32 \[{rows}, 5\], laid out as torch.float32 \[3, 5\]"):
                torch_stream.write_data(out, 0, blocks, (3, 5), torch.float32, "x")
        with pytest.raises(CheckpointError, match=r"laid out as torch\.float32"):
            torch_stream.write_data(out, 0, [rows_of(torch.zeros(3, 5).half())], (3, 5), torch.float32, "x")


def test_the_manifest_holds_the_checksums_of_the_files_though_it_does_not_read_them(tmp_path: Path) -> None:
    hf = tiny_qwen3(tmp_path / "hf", num_hidden_layers=2)
    run_convert("hf", "mg", hf, tmp_path / "mg", target_tensor_parallel_size=2, target_pipeline_parallel_size=2)
    run_convert("mg", "hf", tmp_path / "mg", tmp_path / "back")
    for folder, count in ((tmp_path / "mg", 4), (tmp_path / "back", 1)):
        found = checksums(folder)
        assert len(found) == count and found == {name: crc32_of(folder / name) for name in found}


def test_checksums_of_pieces_are_joined() -> None:
    data = random.Random(3).randbytes(100_000)
    for ends in ([0, 100_000], [0, 1, 1, 65_537, 99_999, 100_000]):
        pieces = [data[start:stop] for start, stop in itertools.pairwise(ends)]
        assert crc32_joined((zlib.crc32(piece), len(piece)) for piece in pieces) == zlib.crc32(data)


def test_blocks_lie_where_they_belong_and_what_lies_between_counts(tmp_path: Path) -> None:
    blocks = [torch.full((1000,), number, dtype=torch.uint8) for number in range(1, 20)]
    with BlockWriter(tmp_path / "file") as out:
        for number in reversed(range(len(blocks))):
            out.write(50 + 1100 * number, rows_of(blocks[number]))
        out.settle()
        content = (tmp_path / "file").read_bytes()
        assert content == b"".join(bytes(50 if number == 0 else 100) + bytes(block.tolist()) for number, block in enumerate(blocks))
        for start, stop in ((0, len(content)), (50, 1050), (1050, 1150), (2, 2250)):
            assert out.checksum(start, stop) == zlib.crc32(content[start:stop])


def test_the_disk_begins_before_all_is_made_and_may_refuse_the_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    advised: list[tuple[int, int]] = []

    def refused(descriptor: int, start: int, length: int, advice: int) -> None:
        advised.append((start, length))
        raise OSError("unknown here")

    monkeypatch.setattr(block_writer, "FLUSH_BYTES", 2000)
    monkeypatch.setattr(os, "posix_fadvise", refused, raising=False)
    with BlockWriter(tmp_path / "file") as out:
        for number in reversed(range(5)):
            out.write(1000 * number, rows_of(torch.full((1000,), number, dtype=torch.uint8)))
        out.settle()
    assert advised == [(3000, 2000), (1000, 2000)]  # the last block is left to the fsync
    assert (tmp_path / "file").read_bytes() == b"".join(bytes([number]) * 1000 for number in range(5))
    monkeypatch.delattr(os, "posix_fadvise")
    block_writer.begin_writeback(0, 0, 1)


def test_an_error_in_a_thread_reaches_the_caller_and_no_thread_stays(tmp_path: Path) -> None:
    def broken() -> Iterator[torch.Tensor]:
        yield torch.zeros(1, dtype=torch.uint8)
        raise CheckpointError("NaN")

    with BlockWriter(tmp_path / "file") as out:
        out.write(0, Block((1,), torch.uint8, broken))
        with pytest.raises(CheckpointError, match="NaN"):
            out.settle()
        out.write(0, Block((2,), torch.uint8, lambda: [torch.zeros(1, dtype=torch.uint8)]))
        with pytest.raises(ValueError, match=r"uint8 \[2\] came as 1 bytes"):
            out.settle()
    with BlockWriter(tmp_path / "file") as out:
        os.close(out.descriptor)
        out.descriptor = os.open(tmp_path / "file", os.O_RDONLY)
        with pytest.raises(OSError, match="Bad file descriptor"):
            for _ in range(10):
                out.write(0, rows_of(torch.zeros(1)))
    assert not any(thread.name.startswith("block-writer") for thread in threading.enumerate())
