"""Adapters trained elsewhere: parts with their own A, r and alpha, against peft itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conversion_helpers import load_folder, random_lora, run_convert
from helpers import tiny_qwen3
from safetensors.torch import load_file

from mindspeed_lora.errors import CheckpointError
from mindspeed_lora.weights.lora_spec import LoraSpec
from mindspeed_lora.weights.peft_files import write_peft_adapter
from mindspeed_lora.weights.sources import open_adapter, open_base
from mindspeed_lora.weights.table import WeightTable

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES: dict[str, dict[str, Any]] = {
    "every A its own": dict(target_modules=ALL),
    "q and v only": dict(target_modules=["q_proj", "v_proj"]),
    "up only": dict(target_modules=["up_proj"]),
    "per-module r and alpha": dict(
        target_modules=ALL, rank_pattern={"k_proj": 2, r"layers\.1\.mlp\.up_proj": 7}, alpha_pattern={"v_proj": 32, "o_proj": 1}
    ),
    "rank-stabilised": dict(target_modules=ALL, use_rslora=True, rank_pattern={"q_proj": 9}),
    "one layer": dict(target_modules=["q_proj", "down_proj"], layers_to_transform=[2], layers_pattern="layers"),
    "a regular expression": dict(target_modules=r".*layers\.[03]\..*(k_proj|gate_proj)"),
}


def make_adapter(hf: Path, target: Path, **config: Any) -> Any:
    """A random adapter written by peft; returns peft's model."""
    import peft
    import transformers

    torch.manual_seed(1)
    model = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(hf), peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **config)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(target)
    return model


@pytest.mark.parametrize("case", CASES)
def test_merging_gives_what_peft_s_merge_gives(case: str, tmp_path: Path) -> None:
    hf = tiny_qwen3(tmp_path / "hf")
    expected = make_adapter(hf, tmp_path / "peft", **CASES[case]).merge_and_unload().state_dict()
    run_convert("hf", "hf", hf, tmp_path / "merged", lora_load=tmp_path / "peft")
    merged, before = load_folder(tmp_path / "merged"), load_folder(hf)
    assert any(not torch.equal(merged[name], before[name]) for name in merged)
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-5)
    # From a Megatron folder, cut: the same numbers.
    run_convert("hf", "mg", hf, tmp_path / "mg", target_tensor_parallel_size=2)
    run_convert("mg", "hf", tmp_path / "mg", tmp_path / "again", lora_load=tmp_path / "peft")
    assert all(torch.equal(tensor, merged[name]) for name, tensor in load_folder(tmp_path / "again").items())


def test_the_stacked_form_is_exact(tmp_path: Path) -> None:
    hf = tiny_qwen3(tmp_path / "hf")
    model = make_adapter(hf, tmp_path / "peft", **CASES["per-module r and alpha"]).base_model.model
    adapter, table = open_adapter(tmp_path / "peft"), WeightTable(open_base(hf).model_config)
    row, layer = table.parse("decoder.layers.1.self_attention.linear_qkv.weight")
    matrix_a, matrices_b = adapter.lora_parts(row, layer)
    assert matrix_a.shape == (4 + 2 + 4, 64), "the ranks add up"
    assert adapter.lora is not None
    assert adapter.part_scales(row, layer, adapter.lora) == [6 / 4, 6 / 2, 32 / 4]
    for matrix_b, name in zip(matrices_b, ("q_proj", "k_proj", "v_proj"), strict=True):
        linear = getattr(model.model.layers[1].self_attn, name)
        torch.testing.assert_close(matrix_b @ matrix_a, linear.lora_B["default"].weight.detach() @ linear.lora_A["default"].weight.detach())
        assert int((matrix_b != 0).any(dim=0).sum()) == linear.lora_A["default"].weight.shape[0], "zero outside its own columns"


@pytest.mark.parametrize(
    ("case", "reason"),
    [("every A its own", "have different A"), ("q and v only", "k_proj is not"), ("per-module r and alpha", "has r 2 and scale 3")],
)
def test_such_an_adapter_is_merged_and_not_gone_on_with(case: str, reason: str, tmp_path: Path) -> None:
    hf = tiny_qwen3(tmp_path / "hf")
    make_adapter(hf, tmp_path / "peft", **CASES[case])
    with pytest.raises(CheckpointError, match=rf"cannot go on with it: .*{reason}.*merge this adapter into its base"):
        open_adapter(tmp_path / "peft").require_uniform("go on with it")
    with pytest.raises(CheckpointError, match="cannot export it"):
        run_convert("hf", "hf", tmp_path / "peft", tmp_path / "out", save_lora_to_hf=True, hf_cfg_dir=hf)


CUT = dict(target_tensor_parallel_size=2, target_pipeline_parallel_size=2, layers_per_virtual_stage=1)


@pytest.mark.parametrize("layout", [{}, CUT])
def test_a_peft_adapter_becomes_a_megatron_adapter_and_comes_back(layout: dict[str, Any], tmp_path: Path) -> None:
    hf = tiny_qwen3(tmp_path / "hf")
    table, spec = WeightTable(open_base(hf).model_config), LoraSpec(4, 6.0, ("linear_qkv", "linear_proj", "linear_fc1"))
    write_peft_adapter(tmp_path / "peft", table, spec, random_lora(table, spec), hf)
    run_convert("hf", "mg", tmp_path / "peft", tmp_path / "mg", hf_cfg_dir=hf, **layout)
    adapter = open_adapter(tmp_path / "mg")
    assert adapter.lora == spec and adapter.base_reference == {"path": str(hf), "fingerprint": None}
    run_convert("mg", "hf", tmp_path / "mg", tmp_path / "again", save_lora_to_hf=True, hf_cfg_dir=hf)
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "again"))
    assert set(one) == set(two) and all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    make_adapter(hf, tmp_path / "foreign", **CASES["every A its own"])
    with pytest.raises(CheckpointError, match="cannot write it as a Megatron adapter"):
        run_convert("hf", "mg", tmp_path / "foreign", tmp_path / "out", hf_cfg_dir=hf)
