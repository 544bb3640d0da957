"""Adapters of models with experts, in the peer's names (formats.md 2.1), merged and exported; flags that repeat a source's layout."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conversion_helpers import assert_same_tensors, load_folder, run_convert
from safetensors.torch import load_file, save_file

from mindspeed_lora.errors import CheckpointError, UsageError
from mindspeed_lora.weights.families import model_config_from_dict
from mindspeed_lora.weights.sources import open_adapter
from mindspeed_lora.weights.table import WeightTable
from mindspeed_lora.weights.torch_files import load_torch_file

R, ALPHA = 3, 6
CONFIG: dict[str, Any] = dict(
    model_type="qwen3_moe",
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    vocab_size=20,
    num_experts=4,
    moe_intermediate_size=6,
    dtype="float32",
)


def write_model(folder: Path) -> dict[str, torch.Tensor]:
    table = WeightTable(model_config_from_dict(CONFIG))
    tensors = {name: torch.randn(shape) for name, shape in table.hf_keys().items()}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return tensors


def write_adapter(folder: Path, grouped: bool) -> dict[str, torch.Tensor]:
    """Save random A and B of fc1 and fc2 as training at TP2 EP2 does; returns B A of every HF expert linear."""
    deltas: dict[str, torch.Tensor] = {}
    pairs = {}
    for expert in range(4):
        a1, b_gate, b_up = torch.randn(R, 8), torch.randn(6, R), torch.randn(6, R)
        a2, b2 = torch.randn(R, 6), torch.randn(8, R)
        pairs[expert] = (a1, b_gate, b_up, a2, b2)
        stem = f"model.layers.0.mlp.experts.{expert}."
        deltas |= {f"{stem}gate_proj.weight": b_gate @ a1, f"{stem}up_proj.weight": b_up @ a1, f"{stem}down_proj.weight": b2 @ a2}
    args = dict(
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=1,
        expert_model_parallel_size=2,
        num_experts=4,
        moe_grouped_gemm=grouped,
        lora_target_modules=["linear_fc1", "linear_fc2"],
        lora_r=R,
        lora_alpha=ALPHA,
    )
    for tp_rank in range(2):
        cut = slice(3 * tp_rank, 3 * tp_rank + 3)
        for ep_rank in range(2):
            prefix, model = "decoder.layers.0.mlp.experts.", {}
            own = [pairs[2 * ep_rank + local] for local in range(2)]
            for local, (a1, b_gate, b_up, a2, b2) in enumerate(own):
                stem = f"{prefix}local_experts.{local}."
                model |= {
                    f"{stem}linear_fc1.lora_A.default.weight": a1,
                    f"{stem}linear_fc1.lora_B.default.weight": torch.cat([b_gate[cut], b_up[cut]]),
                    f"{stem}linear_fc2.lora_A.default.weight": a2[:, cut].contiguous(),
                    f"{stem}linear_fc2.lora_B.default.weight": b2,
                }
            if grouped:
                names = ("linear_fc1.lora_A", "linear_fc1.lora_B", "linear_fc2.lora_A", "linear_fc2.lora_B")
                stacks = [torch.stack([model[f"{prefix}local_experts.{i}.{name}.default.weight"].T for i in range(2)]) for name in names]
                model = {
                    f"{prefix}weight1_lora_a": stacks[0].reshape(8, -1),
                    f"{prefix}weight1_lora_b": stacks[1].reshape(R, -1),
                    f"{prefix}weight2_lora_a": stacks[2].reshape(-1, R),
                    f"{prefix}weight2_lora_b": stacks[3].reshape(-1, 8),
                }
            rank = folder / f"iter_0000005/mp_rank_{tp_rank:02d}_{ep_rank:03d}"
            rank.mkdir(parents=True)
            torch.save({"args": argparse.Namespace(**args), "iteration": 5, "model": model}, rank / "model_optim_rng.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("5")
    return deltas


@pytest.mark.parametrize("grouped", [False, True])
def test_an_adapter_of_experts_is_merged_and_exported(grouped: bool, tmp_path: Path) -> None:
    before = write_model(tmp_path / "hf")
    deltas = write_adapter(tmp_path / "lora", grouped)
    assert open_adapter(tmp_path / "lora").lora is not None
    layout = dict(target_tensor_parallel_size=2, target_expert_parallel_size=4, expert_tensor_parallel_size=1)
    run_convert("hf", "mg", tmp_path / "hf", tmp_path / "merged_mg", lora_load=tmp_path / "lora", moe_grouped_gemm=not grouped, **layout)
    run_convert("mg", "hf", tmp_path / "merged_mg", tmp_path / "merged")
    for name, tensor in load_folder(tmp_path / "merged").items():
        expected = before[name] + ALPHA / R * deltas[name] if name in deltas else before[name]
        torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-6)
    run_convert("mg", "hf", tmp_path / "lora", tmp_path / "peft", save_lora_to_hf=True, hf_cfg_dir=tmp_path / "hf")
    exported = load_file(tmp_path / "peft/adapter_model.safetensors")
    for name, delta in deltas.items():
        stem = "base_model.model." + name.removesuffix("weight")
        torch.testing.assert_close(exported[f"{stem}lora_B.weight"] @ exported[f"{stem}lora_A.weight"], delta)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
def test_a_peft_adapter_of_experts_becomes_a_megatron_adapter_and_comes_back(grouped: bool, own: bool, tmp_path: Path) -> None:
    """``own``: gate and up of each expert have an A each."""
    write_model(tmp_path / "hf")
    write_adapter(tmp_path / "lora", grouped=False)
    run_convert("mg", "hf", tmp_path / "lora", tmp_path / "peft", save_lora_to_hf=True, hf_cfg_dir=tmp_path / "hf")
    file = tmp_path / "peft/adapter_model.safetensors"
    if own:
        save_file(
            {name: tensor + 1 if name.endswith("up_proj.lora_A.weight") else tensor for name, tensor in load_file(file).items()}, file
        )
    layout = dict(target_tensor_parallel_size=2, target_expert_parallel_size=2, moe_grouped_gemm=grouped)
    run_convert("hf", "mg", tmp_path / "peft", tmp_path / "mg", hf_cfg_dir=tmp_path / "hf", **layout)
    assert len(list((tmp_path / "mg").rglob("*.pt"))) == 4
    names = {key for key in load_torch_file(next((tmp_path / "mg").rglob("*.pt")))["model"] if "experts" in key}
    assert any("weight1_lora_a" in name for name in names) == grouped
    run_convert("mg", "hf", tmp_path / "mg", tmp_path / "again", save_lora_to_hf=True, hf_cfg_dir=tmp_path / "hf")
    one, two = load_file(file), load_file(tmp_path / "again/adapter_model.safetensors")
    assert set(one) == set(two) and all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_an_export_says_what_peft_leaves_out_of_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_model(tmp_path / "hf")
    write_adapter(tmp_path / "lora", grouped=False)
    export = dict(save_lora_to_hf=True, hf_cfg_dir=tmp_path / "hf")
    said = "leaves out expert adapters on linear_fc1 alone; serve the merged model there"
    with caplog.at_level("WARNING", logger="mindspeed_lora"):
        run_convert("mg", "hf", tmp_path / "lora", tmp_path / "peft", **export)
        assert said not in caplog.text
        for path in (tmp_path / "lora").rglob("*.pt"):
            saved = load_torch_file(path)
            args = argparse.Namespace(**{**vars(saved["args"]), "lora_target_modules": ["linear_fc1"]})
            model = {name: tensor.clone() for name, tensor in saved["model"].items() if "linear_fc1" in name}
            torch.save({**saved, "args": args, "model": model}, path)
        run_convert("mg", "hf", tmp_path / "lora", tmp_path / "fc1", **export)
    assert said in caplog.text


def test_experts_of_different_ranks_do_not_fit_one_tensor(tmp_path: Path) -> None:
    write_model(tmp_path / "hf")
    write_adapter(tmp_path / "lora", grouped=False)
    run_convert("mg", "hf", tmp_path / "lora", tmp_path / "peft", save_lora_to_hf=True, hf_cfg_dir=tmp_path / "hf")
    file, odd = tmp_path / "peft/adapter_model.safetensors", "base_model.model.model.layers.0.mlp.experts.1.up_proj.lora_A.weight"
    tensors = load_file(file)
    save_file({**tensors, odd: tensors[odd] + 1}, file)
    with pytest.raises(UsageError, match="--moe-grouped-gemm: the experts of layer 0 differ in their ranks"):
        run_convert("hf", "mg", tmp_path / "peft", tmp_path / "mg", hf_cfg_dir=tmp_path / "hf", moe_grouped_gemm=True)
    assert not (tmp_path / "mg").exists()
    run_convert("hf", "mg", tmp_path / "peft", tmp_path / "mg", hf_cfg_dir=tmp_path / "hf")


def test_flags_that_repeat_a_source_s_layout_must_agree_with_it(tmp_path: Path) -> None:
    write_model(tmp_path / "hf")
    run_convert("hf", "mg", tmp_path / "hf", tmp_path / "mg", moe_grouped_gemm=True, noop_layers=(0,), target_expert_parallel_size=2)
    run_convert("mg", "hf", tmp_path / "mg", tmp_path / "back", moe_grouped_gemm=True, noop_layers=(0,), first_k_dense_replace=0)
    assert_same_tensors(tmp_path / "back", tmp_path / "hf")
    for flags, message in (
        (dict(noop_layers=(1,)), "--noop-layers with --save-model-type hf"),
        (dict(moe_tp_extend_ep=True), "--moe-tp-extend-ep with --save-model-type hf"),
        (dict(first_k_dense_replace=1), "config.json makes the first 0 layers dense"),
        (dict(target_expert_parallel_size=2), "--target-expert-parallel-size 2 with --save-model-type hf"),
    ):
        with pytest.raises(UsageError, match=message):
            run_convert("mg", "hf", tmp_path / "mg", tmp_path / "out", **flags)


def test_a_missing_expert_rank_is_named(tmp_path: Path) -> None:
    write_model(tmp_path / "hf")
    run_convert("hf", "mg", tmp_path / "hf", tmp_path / "mg", target_tensor_parallel_size=2, target_expert_parallel_size=2)
    (tmp_path / "mg/iter_0000001/mp_rank_01_001/model_optim_rng.pt").unlink()
    with pytest.raises(CheckpointError, match="tensor rank 1, pipeline rank 0 of 2 x 1, expert rank 1 of 2 is missing"):
        run_convert("mg", "hf", tmp_path / "mg", tmp_path / "out")
