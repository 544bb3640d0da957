"""Checkpoints whose experts lie on several ranks: what is missing or mixed is named."""

from __future__ import annotations

import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conversion_helpers import run_convert
from helpers import make_model

from mindspeed_lora.checkpoint.resolve import router_notes
from mindspeed_lora.errors import CheckpointError
from mindspeed_lora.weights.sources import open_base
from mindspeed_lora.weights.table import WeightTable

ITERATION = "iter_0000001"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Qwen3-MoE of eight experts, four on each of two expert ranks: one by one, and grouped."""
    root = tmp_path_factory.mktemp("files")
    make_model(root / "hf", "qwen3_moe", num_hidden_layers=2)
    for name, grouped in (("single", False), ("grouped", True)):
        run_convert("hf", "mg", root / "hf", root / name, target_expert_parallel_size=2, moe_grouped_gemm=grouped)
    return {name: root / name for name in ("hf", "single", "grouped")}


def rank_file(folder: Path, ep_rank: int) -> Path:
    return folder / ITERATION / f"mp_rank_00_{ep_rank:03d}" / "model_optim_rng.pt"


def loaded(path: Path) -> dict[str, Any]:
    with torch.serialization.safe_globals([Namespace]):
        return torch.load(path)


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = loaded(path)
    change(content["model"])
    torch.save(content, path)


def refusal(folder: Path) -> str:
    base = open_base(folder)
    with pytest.raises(CheckpointError) as caught:
        base.check_coverage(WeightTable(base.model_config))
    return str(caught.value)


def test_an_expert_that_one_rank_lacks_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["single"], tmp_path / "mg")

    def drop(model: dict[str, Any]) -> None:
        for name in [name for name in model if ".local_experts.3.linear_fc2" in name]:
            del model[name]

    edit(rank_file(tmp_path / "mg", 1), drop)
    text = refusal(tmp_path / "mg")
    assert "mp_rank_00_001" in text and "decoder.layers.0.mlp.experts.local_experts.3.linear_fc2.weight" in text
    edit(rank_file(tmp_path / "mg", 0), drop)
    text = refusal(tmp_path / "mg")
    assert "tensors are missing" in text and "local_experts.3.linear_fc2" in text and "local_experts.7.linear_fc2" in text


def test_an_expert_that_a_hugging_face_folder_lacks_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(folders["hf"], tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(path).items() if ".experts.5." not in name}
    save_file(tensors, path, metadata={"format": "pt"})
    assert "3 of 47 tensors are missing: model.layers.0.mlp.experts.5.down_proj.weight" in refusal(tmp_path / "hf")


@pytest.mark.parametrize("ep_rank", [0, 1])
def test_ranks_of_two_forms_are_refused(folders: dict[str, Path], tmp_path: Path, ep_rank: int) -> None:
    shutil.copytree(folders["single"], tmp_path / "mg")
    shutil.copy(rank_file(folders["grouped"], ep_rank), rank_file(tmp_path / "mg", ep_rank))
    text = refusal(tmp_path / "mg")
    assert "local_experts.0.linear_fc1.weight) and grouped (decoder.layers.0.mlp.experts.weight1" in text and "are mixed" in text


def test_files_with_both_forms_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["single"], tmp_path / "mg")
    for ep_rank in range(2):
        grouped = loaded(rank_file(folders["grouped"], ep_rank))["model"]
        extra = {name: value for name, value in grouped.items() if ".experts.weight" in name}
        edit(rank_file(tmp_path / "mg", ep_rank), lambda model, extra=extra: model.update(extra))
    assert "experts one by one (decoder.layers.0.mlp.experts.local_experts.0.linear_fc1.weight) and grouped" in refusal(tmp_path / "mg")


def test_routers_of_two_dtypes_are_refused_and_rounding_is_said(folders: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    def notes(folder: Path, dtype: torch.dtype) -> list[str]:
        base = open_base(folder)
        return router_notes(base, WeightTable(base.model_config), dtype)

    make_model(tmp_path / "hf", "qwen3_moe", "bfloat16", mlp_only_layers=[], num_hidden_layers=2)
    path = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(path)
    routers = [name for name in tensors if name.endswith("mlp.gate.weight")]
    assert notes(tmp_path / "hf", torch.bfloat16) == []
    save_file(tensors | {name: tensors[name].float() for name in routers}, path, metadata={"format": "pt"})
    (note,) = notes(tmp_path / "hf", torch.bfloat16)
    assert "are float32 in" in note and "rounded to bfloat16" in note
    assert notes(tmp_path / "hf", torch.float32) == []
    save_file(tensors | {routers[1]: tensors[routers[1]].float()}, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers.0.mlp.gate.weight is bfloat16 and model.layers.1.mlp.gate.weight is float32"):
        notes(tmp_path / "hf", torch.bfloat16)
    shutil.copytree(folders["single"], tmp_path / "mg")
    assert len(notes(tmp_path / "mg", torch.bfloat16)) == 1
