"""Merging and exporting adapters: arithmetic, agreement of values, PEFT."""

from __future__ import annotations

import json
import logging
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conversion_helpers import TARGETS, load_folder, random_lora, run_convert, write_megatron_adapter
from helpers import tiny_llama, tiny_qwen3
from safetensors.torch import load_file, save_file

from mindspeed_lora.arguments.configs import LoraFlags
from mindspeed_lora.conversion import merge
from mindspeed_lora.conversion.merge import Change, Workspace
from mindspeed_lora.errors import CheckpointError, MindSpeedLoraError, UsageError
from mindspeed_lora.manifest import read_manifest
from mindspeed_lora.ops.products import product
from mindspeed_lora.weights.config import Layout
from mindspeed_lora.weights.lora_spec import LoraSpec
from mindspeed_lora.weights.peft_files import write_peft_adapter
from mindspeed_lora.weights.sources import open_adapter, open_base
from mindspeed_lora.weights.table import WeightTable

SPEC = LoraSpec(4, 8.0, TARGETS)


def table_of(folder: Path) -> WeightTable:
    return WeightTable(open_base(folder).model_config)


def logits(folder: Path, adapter: Path | None = None) -> torch.Tensor:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    if adapter is not None:
        import peft

        model = peft.PeftModel.from_pretrained(model, str(adapter))
    with torch.no_grad():
        return model(torch.arange(5, 25).view(2, 10)).logits


@pytest.mark.parametrize("family", ["qwen3", "llama-tied"])
def test_export_and_merge_compute_what_peft_computes(family: str, tmp_path: Path) -> None:
    hf = tiny_qwen3(tmp_path / "hf") if family == "qwen3" else tiny_llama(tmp_path / "hf", tied=True)
    table = table_of(hf)
    adapter = write_megatron_adapter(tmp_path / "lora", table, SPEC, random_lora(table, SPEC), Layout(2, 2, 1))
    run_convert("mg", "hf", adapter, tmp_path / "peft", save_lora_to_hf=True, hf_cfg_dir=hf)
    run_convert("hf", "hf", hf, tmp_path / "merged", lora_load=adapter)
    through_peft = logits(hf, tmp_path / "peft")
    assert float((through_peft - logits(hf)).abs().max()) > 0.1, "the adapter does something"
    torch.testing.assert_close(logits(tmp_path / "merged"), through_peft, rtol=1e-4, atol=1e-4)
    run_convert("hf", "hf", hf, tmp_path / "merged_from_peft", lora_load=tmp_path / "peft")
    one, two = load_folder(tmp_path / "merged"), load_folder(tmp_path / "merged_from_peft")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_merging_while_recutting(tmp_path: Path) -> None:
    hf = tiny_qwen3(tmp_path / "hf")
    table = table_of(hf)
    adapter = write_megatron_adapter(tmp_path / "lora", table, SPEC, random_lora(table, SPEC), Layout(4, 1))
    run_convert("hf", "mg", hf, tmp_path / "mg", target_tensor_parallel_size=2)
    run_convert("mg", "mg", tmp_path / "mg", tmp_path / "merged_mg", lora_load=adapter, target_pipeline_parallel_size=4)
    run_convert("mg", "hf", tmp_path / "merged_mg", tmp_path / "one")
    run_convert("mg", "hf", tmp_path / "mg", tmp_path / "two", lora_load=adapter)
    one, two = load_folder(tmp_path / "one"), load_folder(tmp_path / "two")
    assert all(torch.equal(one[name], two[name]) for name in one)
    manifest = read_manifest(tmp_path / "merged_mg")
    assert manifest is not None and manifest.kind == "merged" and manifest.lora == {"r": 4, "alpha": 8.0, "targets": list(TARGETS)}
    assert manifest.base is not None and manifest.base["fingerprint"] == open_base(hf).fingerprint()


def test_the_report_says_what_the_cast_rounded_away(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hf = tiny_qwen3(tmp_path / "hf", dtype="bfloat16")
    table = table_of(hf)
    tensors = {key: (a * 1e-3, b) for key, (a, b) in random_lora(table, SPEC).items()}
    adapter = write_megatron_adapter(tmp_path / "lora", table, SPEC, tensors, Layout())
    with caplog.at_level(logging.INFO, logger="mindspeed_lora"):
        run_convert("hf", "hf", hf, tmp_path / "merged", lora_load=adapter)
    shares = {line.split(":")[0].strip(): float(line.split("away")[1].split("%")[0]) for line in caplog.messages if "rounded away" in line}
    assert set(shares) == {*TARGETS, "total"}
    base, merged, lost, whole = load_folder(hf), load_folder(tmp_path / "merged"), 0.0, 0.0
    for (row, layer), (matrix_a, matrices_b) in tensors.items():
        for name, matrix_b in zip(row.hf_names(layer), matrices_b, strict=True):
            delta = 2.0 * matrix_b @ matrix_a
            lost += float((merged[name].float() - base[name].float() - delta).double().square().sum())
            whole += float(delta.double().square().sum())
    assert shares["total"] == pytest.approx(100 * (lost / whole) ** 0.5, rel=1e-2)
    assert shares["total"] > 10, "a small adapter on bf16 weights loses much"
    assert all(tensor.dtype == torch.bfloat16 for tensor in merged.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [2.0, 0.25, 1.0, 3.0, 16 / 8**0.5, -0.7])
def test_the_sum_is_fp32_arithmetic_cast_once_at_any_scale(scale: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(2)
    weight, matrix_a, matrix_b = (torch.randn(shape, generator=generator) for shape in ((48, 33), (4, 33), (48, 4)))
    of = Change.of(matrix_a, matrix_b, scale)
    monkeypatch.setattr(merge, "_CACHED_BYTES", 20 * 33 * 4)  # pieces of 20, 20 and 8 rows
    pieces = [(piece.clone(), taken) for piece, taken in of.added_to(weight.to(dtype), 0, dtype, Workspace())]
    result, lost = torch.cat([piece for piece, _ in pieces]), sum(taken for _, taken in pieces)
    assert len(pieces) == 3 and next(of.added_to(weight[20:40].to(dtype), 20, dtype, Workspace()))[0].equal(result[20:40])
    change = matrix_b @ matrix_a * scale
    total = weight.to(dtype).float() + change
    assert torch.equal(result, total.to(dtype))
    assert of.squared_norm(0, 48) == pytest.approx(float(change.square().sum()), rel=1e-4)
    assert lost == pytest.approx(float((total - total.to(dtype).float()).square().sum()), rel=1e-4)


@pytest.mark.parametrize("r", [1, 2, 3, 8, 16, 17, 64, 128, 200])
def test_a_product_added_in_place_is_rounded_before_it_is_added(r: int) -> None:
    """Bit for bit as in two calls, whatever library multiplies."""
    generator = torch.Generator().manual_seed(r)
    for rows, width in ((1, 64), (5, 100), (12, 7), (16, 16), (17, 33), (64, 100), (85, 3072), (341, 257)):
        weight, matrix_a, matrix_b = (torch.randn(shape, generator=generator) for shape in ((rows, width), (r, width), (rows, r)))
        ((result, _),) = Change.of(matrix_a, matrix_b, 0.5).added_to(weight, 0, torch.float32, Workspace())
        assert torch.equal(result, weight + 0.5 * product(matrix_b, matrix_a)), (rows, width)


def test_threads_have_buffers_of_their_own() -> None:
    workspace, found = Workspace(), []
    threads = [threading.Thread(target=lambda: found.append(workspace.rows("sums", 2, 3, torch.float32))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    mine = workspace.rows("sums", 2, 3, torch.float32)
    assert len({tensor.data_ptr() for tensor in (*found, mine)}) == 3
    assert workspace.rows("sums", 3, 2, torch.float32).data_ptr() == mine.data_ptr()
    assert workspace.rows("sums", 2, 3, torch.bfloat16).dtype == torch.bfloat16


def test_each_tensor_keeps_its_own_dtype(tmp_path: Path) -> None:
    hf = tiny_qwen3(tmp_path / "hf", dtype="bfloat16")
    tensors = load_file(hf / "model.safetensors")
    odd = "model.layers.1.mlp.down_proj.weight"
    save_file({**tensors, odd: tensors[odd].float()}, hf / "model.safetensors")
    table = table_of(hf)
    adapter = write_megatron_adapter(tmp_path / "lora", table, SPEC, random_lora(table, SPEC), Layout())
    run_convert("hf", "mg", hf, tmp_path / "mg", target_tensor_parallel_size=2)
    run_convert("mg", "hf", tmp_path / "mg", tmp_path / "merged", lora_load=adapter)
    merged = load_folder(tmp_path / "merged")
    assert {name for name, tensor in merged.items() if tensor.dtype == torch.float32} == {odd}


def test_an_adapter_that_changes_nothing_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hf = tiny_qwen3(tmp_path / "hf")
    table = table_of(hf)
    zero = {key: (a, [0 * part for part in b]) for key, (a, b) in random_lora(table, SPEC).items()}
    adapter = write_megatron_adapter(tmp_path / "lora", table, SPEC, zero, Layout())
    run_convert("hf", "hf", hf, tmp_path / "merged", lora_load=adapter)
    assert any("changes nothing" in line for line in caplog.messages)


def test_passed_values_must_agree_with_the_adapter(tmp_path: Path) -> None:
    hf = tiny_qwen3(tmp_path / "hf")
    table = table_of(hf)
    adapter = write_megatron_adapter(tmp_path / "lora", table, SPEC, random_lora(table, SPEC), Layout(2, 1))
    wrong = [
        (LoraFlags(r=8), ["--lora-r 8", "r 4"]),
        (LoraFlags(alpha=16.0), ["--lora-alpha 16", "alpha 8"]),
        (LoraFlags(targets=("linear_qkv",)), ["--lora-target-modules linear_qkv", "linear_fc2"]),
    ]
    for flags, words in wrong:
        with pytest.raises(UsageError) as error:
            run_convert("hf", "hf", hf, tmp_path / "merged", lora_load=adapter, lora=flags)
        assert all(word in str(error.value) for word in [*words, str(adapter)]), str(error.value)
        assert not (tmp_path / "merged").exists()
    run_convert("hf", "hf", hf, tmp_path / "merged", lora_load=adapter, lora=LoraFlags(4, 8.0, TARGETS[::-1]))


def test_an_adapter_without_values_needs_all_three(tmp_path: Path) -> None:
    hf = tiny_qwen3(tmp_path / "hf")
    table = table_of(hf)
    adapter = write_megatron_adapter(tmp_path / "lora", table, SPEC, random_lora(table, SPEC), Layout(2, 1), args=False)
    with pytest.raises(UsageError, match="--lora-alpha"):
        run_convert("hf", "hf", hf, tmp_path / "merged", lora_load=adapter, lora=LoraFlags(r=4))
    with pytest.raises(UsageError, match="have r 4"):
        run_convert("hf", "hf", hf, tmp_path / "merged", lora_load=adapter, lora=LoraFlags(8, 8.0, TARGETS))
    with pytest.raises(UsageError, match="tensors of"):
        run_convert("hf", "hf", hf, tmp_path / "merged", lora_load=adapter, lora=LoraFlags(4, 8.0, ("linear_qkv",)))
    run_convert("hf", "hf", hf, tmp_path / "merged", lora_load=adapter, lora=LoraFlags(4, 8.0, TARGETS))


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    hf, other = tiny_qwen3(tmp_path / "hf"), tiny_qwen3(tmp_path / "other", seed=1)
    table = table_of(hf)
    base = {"path": str(hf), "fingerprint": open_base(hf).fingerprint()}
    adapter = write_megatron_adapter(tmp_path / "lora", table, SPEC, random_lora(table, SPEC), Layout(2, 1), base=base)
    assert open_adapter(adapter).base_reference == base
    with pytest.raises(MindSpeedLoraError, match="fingerprint") as error:
        run_convert("hf", "hf", other, tmp_path / "merged", lora_load=adapter)
    assert str(hf) in str(error.value) and str(other) in str(error.value) and not (tmp_path / "merged").exists()
    run_convert("hf", "hf", hf, tmp_path / "merged", lora_load=adapter)
    run_convert("mg", "hf", adapter, tmp_path / "peft", save_lora_to_hf=True, hf_cfg_dir=hf)
    assert open_adapter(tmp_path / "peft").base_reference == base


def test_an_adapter_of_another_shape_is_refused(tmp_path: Path) -> None:
    hf, deep = tiny_qwen3(tmp_path / "hf"), tiny_qwen3(tmp_path / "deep", num_hidden_layers=2)
    wide = tiny_qwen3(tmp_path / "wide", hidden_size=32)
    table = table_of(hf)
    adapter = write_megatron_adapter(tmp_path / "lora", table, SPEC, random_lora(table, SPEC), Layout(2, 1))
    for folder, message in ((deep, "4 layers, the base model 2"), (wide, "ask for")):
        with pytest.raises(CheckpointError, match=message):
            run_convert("hf", "hf", folder, tmp_path / "merged", lora_load=adapter)


def peft_folder(tmp_path: Path, hf: Path, **config: Any) -> Path:
    table = table_of(hf)
    spec = replace(SPEC, targets=("linear_qkv", "linear_fc2"))
    write_peft_adapter(tmp_path / "peft", table, spec, random_lora(table, spec), hf)
    path = tmp_path / "peft/adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return tmp_path / "peft"


def test_rank_stabilised_scale_is_honoured(tmp_path: Path) -> None:
    hf = tiny_qwen3(tmp_path / "hf")
    adapter = peft_folder(tmp_path, hf, use_rslora=True)
    spec = open_adapter(adapter).lora
    assert spec is not None and spec.scale == pytest.approx(8.0 / 4**0.5)
    run_convert("hf", "hf", hf, tmp_path / "merged", lora_load=adapter)
    torch.testing.assert_close(logits(tmp_path / "merged"), logits(hf, adapter), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"bias": "all"},
        {"rank_pattern": {"q_proj": "two"}},
        {"peft_type": "IA3"},
        {"r": "x"},
    ],
)
def test_peft_features_that_are_not_computed_are_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    adapter = peft_folder(tmp_path, tiny_qwen3(tmp_path / "hf"), **config)
    with pytest.raises(CheckpointError, match=next(iter(config))):
        open_adapter(adapter)


def test_peft_folders_whose_parts_differ_or_are_missing(tmp_path: Path) -> None:
    hf = tiny_qwen3(tmp_path / "hf")
    file = peft_folder(tmp_path, hf) / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.model.layers.2.self_attn.k_proj.lora_A.weight"

    def message(changed: dict[str, torch.Tensor]) -> str:
        save_file(changed, file)
        with pytest.raises(CheckpointError) as error:
            run_convert("hf", "hf", hf, tmp_path / "merged", lora_load=tmp_path / "peft")
        assert not (tmp_path / "merged").exists()
        return str(error.value)

    short = key.removeprefix("base_model.model.")
    assert f"{short} is missing beside its other half" in message({name: tensor for name, tensor in tensors.items() if name != key})
    other = {name: tensor for name, tensor in tensors.items() if ".layers.2.self_attn.k_proj." not in name}
    assert "1 modules that target_modules names have no adapter tensors: model.layers.2.self_attn.k_proj" in message(other)
    assert "r and the base model ask for" in message({**tensors, key: tensors[key][:2].clone()})
    assert "no module that can be adapted" in message({**tensors, "base_model.model.lm_head.lora_A.weight": torch.ones(4, 4)})
    data = file.read_bytes()
    file.write_bytes(data[: len(data) - 8])
    with pytest.raises(CheckpointError, match="truncated"):
        open_adapter(tmp_path / "peft")
