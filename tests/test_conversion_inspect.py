"""convert_ckpt.py --inspect: what each kind of folder says about itself, and what damage it names."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conversion_helpers import TARGETS, random_lora, run_convert, write_megatron_adapter
from helpers import ROOT, golden, tiny_qwen3

from mindspeed_lora.arguments.configs import InspectConfig
from mindspeed_lora.arguments.flag import CONVERT
from mindspeed_lora.arguments.parser import parse
from mindspeed_lora.conversion.inspect import describe, human_bytes
from mindspeed_lora.errors import CheckpointError, UsageError
from mindspeed_lora.manifest import Manifest, part_of, write_manifest
from mindspeed_lora.weights.config import Layout
from mindspeed_lora.weights.lora_spec import LoraSpec
from mindspeed_lora.weights.peft_files import write_peft_adapter
from mindspeed_lora.weights.sources import open_base
from mindspeed_lora.weights.table import WeightTable

SPEC = LoraSpec(4, 8.0, TARGETS)


def said(folder: Path, verify: bool = False) -> dict[str, str]:
    return dict(describe(folder, verify))


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen3(tmp_path_factory.mktemp("inspect") / "hf", dtype="bfloat16")


@pytest.fixture(scope="module")
def mg(hf: Path) -> Path:
    sizes = dict(target_tensor_parallel_size=2, target_pipeline_parallel_size=2, layers_per_virtual_stage=1)
    run_convert("hf", "mg", hf, hf.parent / "mg", **sizes)
    return hf.parent / "mg"


def test_a_hugging_face_folder(hf: Path) -> None:
    found = said(hf)
    size = sum(file.stat().st_size for file in hf.iterdir())
    assert found["format"].startswith("Hugging Face") and found["dtype"] == "bfloat16" and f"{size:,} bytes" in found["size"]
    assert found["family"].startswith("qwen3 ") and "4 layers, hidden 64" in found["model"] and "untied" in found["model"]
    assert found["tensors"] == str(3 + 4 * 11) and found["manifest"].startswith("none")
    assert found[""].strip() == WeightTable(open_base(hf).model_config).describe()


def test_a_megatron_folder_of_ours(hf: Path, mg: Path) -> None:
    found = said(mg, verify=True)
    assert found["format"] == "Megatron V1, a base model"
    assert found["layout"].startswith("tensor parallel 2, pipeline parallel 2, virtual stages 2, expert parallel 1")
    assert found["layout"].endswith("2, 2") and found["iteration"] == "1 (iter_0000001)"
    assert found["manifest"].startswith("base, written by mindspeed-lora ") and "4 files have the checksum" in found["files"]
    assert found["fingerprint"] == open_base(hf).fingerprint() and found["dtype"] == "bfloat16"


def test_adapters_of_both_formats(hf: Path, tmp_path: Path) -> None:
    table = WeightTable(open_base(hf).model_config)
    tensors = random_lora(table, SPEC)
    reference = {"path": str(hf), "fingerprint": open_base(hf).fingerprint()}
    found = said(write_megatron_adapter(tmp_path / "lora", table, SPEC, tensors, Layout(2, 1), base=reference))
    assert found["format"] == "Megatron V1, LoRA tensors only" and found["iteration"].startswith("7 ") and found["dtype"] == "float32"
    assert found["lora"] == f"r 4, alpha 8 on {' '.join(TARGETS)}" and found["tensors"].startswith("32 ")
    assert found["base"] == f"{hf} (is there), {reference['fingerprint']}" and "coverage" in found
    write_peft_adapter(tmp_path / "peft", table, SPEC, tensors, "/nowhere/base")
    found = said(tmp_path / "peft")
    assert found["format"] == "PEFT adapter" and found["lora"].startswith("r 4, alpha 8") and found["tensors"] == str(4 * 7 * 2)
    assert "no such folder here" in found["base"] and "no weight table" in found["weights"]


@pytest.mark.parametrize(("case", "words"), [("v1lora_qwen3_tp1pp1_unified", "base and adapter"), ("v1lora_qwen3_tp2pp2_filter", "LoRA")])
def test_the_peer_s_adapters(case: str, words: str) -> None:
    found = said(golden() / case / "input/lora")
    assert words in found["format"] and found["manifest"].startswith("none")


def test_preprocessed_data(tmp_path: Path) -> None:
    for suffix in (".bin", ".idx"):
        (tmp_path / f"a_packed_input_ids_document{suffix}").write_bytes(b"1234")
    files = [part_of(tmp_path, file) for file in sorted(tmp_path.glob("a_*"))]
    write_manifest(tmp_path, Manifest("data", data={"handler": "Alpaca"}, counts={"records": 3}, parts=files), "a_mindspeed_lora.json")
    found = said(tmp_path)
    assert "data" in found["format"] and found["counts"] == "records 3" and found["data"] == "handler Alpaca"
    (tmp_path / files[0].file).write_bytes(b"1")
    with pytest.raises(CheckpointError, match=f"{files[0].file}: 1 bytes, but .* says 4 bytes"):
        said(tmp_path)


def test_damage_is_named(mg: Path, hf: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(mg, tmp_path / "mg"))
    file = broken / "iter_0000001/mp_rank_01_001/model_optim_rng.pt"
    data = file.read_bytes()
    file.write_bytes(data[:-100])
    with pytest.raises(CheckpointError, match=r"mp_rank_01_001/model_optim_rng\.pt"):
        said(broken)
    content = torch.load(mg / "iter_0000001/mp_rank_01_001/model_optim_rng.pt", weights_only=False)
    first = next(name for name, tensor in content["model0"].items() if tensor is not None)
    content["model0"][first] += 1
    torch.save(content, file)
    with pytest.raises(CheckpointError, match=r"mindspeed_lora\.json"):
        said(broken, verify=True)
    file.unlink()
    with pytest.raises(CheckpointError, match="tensor rank 1, pipeline rank 1"):
        said(broken)
    with pytest.raises(CheckpointError, match="neither a Hugging Face folder"):
        said(tmp_path)


def test_the_command_line(hf: Path, tmp_path: Path) -> None:
    config, notes = parse(CONVERT, ["--inspect", str(hf), "--verify"])
    assert config == InspectConfig(hf, verify=True) and notes == []
    with pytest.raises(UsageError, match="leave out --load-dir --lora-r"):
        parse(CONVERT, ["--load-dir", str(hf), "--inspect", str(hf), "--lora-r", "4", "--lora-r", "4"])
    command = [sys.executable, "convert_ckpt.py", "--inspect"]
    done = subprocess.run([*command, str(hf)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "format:       Hugging Face safetensors" in done.stdout and "linear_fc1" in done.stdout
    done = subprocess.run([*command, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "error: " in done.stderr and "Traceback" not in done.stderr


def test_sizes_for_people() -> None:
    assert [human_bytes(n) for n in (9, 2048, 3 * 2**30)] == ["9 bytes", "2,048 bytes (2.00 KiB)", "3,221,225,472 bytes (3.00 GiB)"]
