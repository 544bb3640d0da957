"""Adapters trained elsewhere: parts with their own A, r and alpha, against peft itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conversion_helpers import assert_same_tensors, load_folder, random_lora, run_convert
from helpers import tiny_qwen3
from peft_helpers import CASES, load_peft, make_adapter
from safetensors.torch import load_file

from mindspeed_lora.arguments.configs import LoraFlags
from mindspeed_lora.errors import CheckpointError, UsageError
from mindspeed_lora.manifest import MANIFEST_NAME
from mindspeed_lora.weights.lora_blocks import is_block_sparse, part_scales, trained_elements
from mindspeed_lora.weights.lora_spec import LoraSpec, ModuleLora
from mindspeed_lora.weights.peft_files import write_peft_adapter
from mindspeed_lora.weights.sources import open_adapter, open_base
from mindspeed_lora.weights.table import WeightTable

CUT = dict(target_tensor_parallel_size=2, target_pipeline_parallel_size=2, layers_per_virtual_stage=1)


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
    spec = adapter.spec(table)
    assert spec is not None and (module := spec.module(row.name(layer))) is not None
    assert module == ModuleLora((4, 2, 4), (6.0, 6.0, 32.0)) and part_scales(spec, module, 3) == [6 / 4, 6 / 2, 32 / 4]
    assert is_block_sparse(row, module, matrices_b)
    assert not is_block_sparse(row, module, [matrices_b[0].flip(1), *matrices_b[1:]])
    assert trained_elements(row, module) == 10 * 64 + 4 * 128 + 2 * 64 + 4 * 64
    for matrix_b, name in zip(matrices_b, ("q_proj", "k_proj", "v_proj"), strict=True):
        linear = getattr(model.model.layers[1].self_attn, name)
        torch.testing.assert_close(matrix_b @ matrix_a, linear.lora_B["default"].weight.detach() @ linear.lora_A["default"].weight.detach())
        assert int((matrix_b != 0).any(dim=0).sum()) == linear.lora_A["default"].weight.shape[0], "zero outside its own columns"


@pytest.mark.parametrize("layout", ["whole", "cut"])
@pytest.mark.parametrize("case", CASES)
def test_such_an_adapter_becomes_a_megatron_adapter_and_comes_back_at_its_own_ranks(case: str, layout: str, tmp_path: Path) -> None:
    hf = tiny_qwen3(tmp_path / "hf")
    model = make_adapter(hf, tmp_path / "peft", **CASES[case])
    run_convert("hf", "mg", tmp_path / "peft", tmp_path / "mg", hf_cfg_dir=hf, **(CUT if layout == "cut" else {}))
    run_convert("mg", "hf", tmp_path / "mg", tmp_path / "again", save_lora_to_hf=True, hf_cfg_dir=hf)
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "again"))
    assert set(one) == set(two) and all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    # peft gives it the same scales, from adapter_config.json alone.
    again = load_peft(hf, tmp_path / "again")
    modules = {name: module for name, module in model.named_modules() if hasattr(module, "scaling")}
    found = {name: module for name, module in again.named_modules() if hasattr(module, "scaling")}
    assert set(found) == set(modules)
    assert all(found[name].scaling == pytest.approx(module.scaling) for name, module in modules.items())
    # Merging the Megatron form is merging the PEFT form.
    for adapter in ("peft", "mg"):
        run_convert("hf", "hf", hf, tmp_path / f"merged_{adapter}", lora_load=tmp_path / adapter)
    assert_same_tensors(tmp_path / "merged_peft", tmp_path / "merged_mg")


def test_without_its_manifest_a_megatron_adapter_of_several_ranks_is_refused(tmp_path: Path) -> None:
    hf = tiny_qwen3(tmp_path / "hf")
    make_adapter(hf, tmp_path / "peft", **CASES["every A its own"])
    run_convert("hf", "mg", tmp_path / "peft", tmp_path / "mg", hf_cfg_dir=hf)
    manifest = tmp_path / "mg/iter_0000001" / MANIFEST_NAME
    written = json.loads(manifest.read_text())
    assert written["lora"]["per_module"]["decoder.layers.0.mlp.linear_fc1"] == {"r": [4, 4], "alpha": [6.0, 6.0]}
    manifest.rename(tmp_path / "kept")
    with pytest.raises(CheckpointError, match=r"the stored args say LoRA r 4, but the tensors have r 12 \(decoder.layers.0.self_attention"):
        open_adapter(tmp_path / "mg")
    written["lora"]["per_module"]["decoder.layers.0.mlp.linear_fc1"]["r"] = [4, 3]
    manifest.write_text(json.dumps(written))
    with pytest.raises(CheckpointError, match=r"mindspeed_lora.json say LoRA r 4 \+ 3, but the tensors have r 8"):
        open_adapter(tmp_path / "mg")
    del written["lora"]["per_module"]["decoder.layers.0.mlp.linear_fc1"]
    manifest.write_text(json.dumps(written))
    with pytest.raises(CheckpointError, match="say nothing of this linear, but the tensors have r 8"):
        open_adapter(tmp_path / "mg")
    written["lora"]["per_module"] |= {"decoder.layers.0.mlp.linear_fc1": {"r": [3, 5], "alpha": [6, 6]}}
    manifest.write_text(json.dumps(written))
    with pytest.raises(CheckpointError, match=r"linear_fc1.lora_B.default.weight is not zero outside the blocks"):
        run_convert("mg", "hf", tmp_path / "mg", tmp_path / "again", save_lora_to_hf=True, hf_cfg_dir=hf)
    written["lora"]["per_module"] |= {"decoder.layers.9.mlp.linear_fc1": {"r": [4, 4], "alpha": [6, 6]}}
    manifest.write_text(json.dumps(written))
    with pytest.raises(CheckpointError, match=r"name 1 linears without adapter tensors: decoder.layers.9"):
        open_adapter(tmp_path / "mg")


def test_flags_that_disagree_with_such_an_adapter_name_both(tmp_path: Path) -> None:
    hf = tiny_qwen3(tmp_path / "hf")
    make_adapter(hf, tmp_path / "peft", **CASES["per-module r and alpha"])
    for flags, message in (
        (LoraFlags(8), r"--lora-r 8 contradicts --lora-load .*peft, which says r 4 \(and others in some of its linears\)"),
        (LoraFlags(alpha=5.0), r"--lora-alpha 5.0 contradicts .*which says alpha 6 \(and others in some of its linears\)"),
        (
            LoraFlags(targets=("linear_qkv",)),
            r"--lora-target-modules linear_qkv contradicts .*linear_qkv linear_proj linear_fc1",
        ),
    ):
        with pytest.raises(UsageError, match=message):
            run_convert("hf", "hf", hf, tmp_path / "out", lora_load=tmp_path / "peft", lora=flags)
    run_convert("hf", "hf", hf, tmp_path / "out", lora_load=tmp_path / "peft", lora=LoraFlags(4, 6.0))


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
