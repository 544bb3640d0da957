"""convert_ckpt.py --dry-run: the sizes are the real run's, nothing is written, and the refusals are the same."""

from __future__ import annotations

import logging
import re
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from conversion_helpers import TARGETS, random_lora, run_convert, write_megatron_adapter
from helpers import tiny_qwen3

from mindspeed_lora.arguments.flag import CONVERT
from mindspeed_lora.arguments.parser import parse
from mindspeed_lora.conversion import dry_run
from mindspeed_lora.errors import CheckpointError, UsageError
from mindspeed_lora.manifest import MANIFEST_NAME
from mindspeed_lora.weights.config import Layout
from mindspeed_lora.weights.lora_spec import LoraSpec
from mindspeed_lora.weights.sources import open_base
from mindspeed_lora.weights.table import WeightTable

SIZES = dict(target_tensor_parallel_size=2, target_pipeline_parallel_size=2, layers_per_virtual_stage=1)


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen3(tmp_path_factory.mktemp("dry") / "hf", tied=True)


@pytest.fixture(scope="module")
def lora(hf: Path) -> Path:
    spec, table = LoraSpec(4, 8.0, TARGETS), WeightTable(open_base(hf).model_config)
    return write_megatron_adapter(hf.parent / "lora", table, spec, random_lora(table, spec), Layout(2, 1))


def announced(messages: list[str]) -> dict[str, int]:
    lines = [re.match(r"  (\S+) +([\d,]+) bytes", message) for message in messages]
    return {line[1]: int(line[2].replace(",", "")) for line in lines if line}


@pytest.mark.parametrize(
    ("kinds", "options"),
    [
        (("hf", "mg"), dict(SIZES, make_vocab_size_divisible_by=128)),
        (("hf", "hf"), dict(params_dtype="bf16")),
        (("hf", "mg"), dict(lora=True)),
        (("hf", "hf"), dict(lora=True, save_lora_to_hf=True)),
    ],
)
def test_the_files_and_sizes_are_those_of_the_real_run(
    kinds: tuple[str, str], options: dict[str, Any], hf: Path, lora: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"lora_load" if key == "lora" else key: lora if key == "lora" else value for key, value in options.items()}
    target = tmp_path / "out"
    with caplog.at_level(logging.INFO, logger="mindspeed_lora"):
        assert run_convert(*kinds, hf, target, dry_run=True, **options) == 0
    assert not target.exists() and not any(tmp_path.iterdir()), "nothing was written"
    found, last = announced(caplog.messages), caplog.messages[-1]
    run_convert(*kinds, hf, target, **options)
    files = {str(file.relative_to(target)): file.stat().st_size for file in target.rglob("*") if file.is_file()}
    assert files.pop(MANIFEST_NAME) < 8192
    assert found == files
    assert f"in all {sum(files.values()):,} bytes" in last and "peak memory about" in last and "nothing was written" in last


def test_the_refusals_are_the_same(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="tensor parallel size 3"):
        run_convert("hf", "mg", hf, tmp_path / "out", target_tensor_parallel_size=3, dry_run=True)
    with pytest.raises(CheckpointError, match="nothing is overwritten"):
        run_convert("hf", "mg", hf, hf, dry_run=True)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(dry_run.shutil, "disk_usage", lambda place: usage(9, 1, 1000))
    with pytest.raises(CheckpointError, match="its disk has 1,000 bytes left"):
        run_convert("hf", "mg", hf, tmp_path / "out", dry_run=True)


def test_the_flag_reaches_the_config(hf: Path) -> None:
    line = ["--load-model-type", "hf", "--save-model-type", "mg", "--load-dir", str(hf), "--save-dir", "out"]
    assert parse(CONVERT, [*line, "--dry-run"])[0].dry_run and not parse(CONVERT, line)[0].dry_run


def test_importing_an_adapter_writes_nothing_either(hf: Path, lora: Path, tmp_path: Path) -> None:
    run_convert("hf", "hf", hf, tmp_path / "peft", lora_load=lora, save_lora_to_hf=True)
    assert run_convert("hf", "mg", tmp_path / "peft", tmp_path / "out", hf_cfg_dir=hf, dry_run=True) == 0
    assert not (tmp_path / "out").exists()
