"""Adapters on experts in PEFT's format: peft loads all of them over whatever transformers holds experts in, and we read them back."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from conversion_helpers import run_convert
from engine_helpers import SPEC, batch, build_engine
from experts_helpers import adapter_parts, merged_folder, reference
from helpers import make_model
from peft_helpers import load_peft, make_adapter
from safetensors.torch import load_file, save_file
from test_engine_adapters import _cell

from mindspeed_lora.errors import CheckpointError
from mindspeed_lora.parallel.pipeline import PipelineRunner
from mindspeed_lora.weights.families import model_config_from_hf
from mindspeed_lora.weights.lora_blocks import join_pairs
from mindspeed_lora.weights.lora_spec import LoraSpec, ModuleLora
from mindspeed_lora.weights.peft_files import peft_gap, write_peft_adapter
from mindspeed_lora.weights.sources import open_adapter
from mindspeed_lora.weights.table import WeightTable

EVERY = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2_lite", "deepseek_v3")
ATTENTION = ("linear_qkv", "linear_proj")
KINDS: dict[str, LoraSpec] = {
    "all": SPEC,
    "rank-stabilised": replace(SPEC, rslora=True),
    "fc2 alone": replace(SPEC, targets=("linear_fc2",)),
    "attention": replace(SPEC, targets=ATTENTION),
}
IDS = torch.randint(3, 312, (2, 12), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A model by its family; the test is skipped where transformers lacks it."""
    root = tmp_path_factory.mktemp("peft-experts")
    return functools.cache(lambda family: make_model(root / family, family, num_hidden_layers=2))


def export(hf: Path, target: Path, spec: LoraSpec) -> Path:
    table = WeightTable(model_config_from_hf(hf))
    tensors = {(row, layer): adapter_parts(row, layer, spec.r) for row, layer in table.target_entries(spec.targets)}
    write_peft_adapter(target, table, spec, tensors, hf)
    return target


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")  # peft looks for them among modules only, then uses them
@pytest.mark.parametrize(
    ("family", "kind"),
    [*((family, "all") for family in EVERY), *(("qwen2_moe", kind) for kind in list(KINDS)[1:]), ("deepseek_v3", "rank-stabilised")],
)
def test_peft_computes_what_the_merged_model_does(folder_of: Callable[[str], Path], tmp_path: Path, family: str, kind: str) -> None:
    hf, spec = folder_of(family), KINDS[kind]
    gap = peft_gap(WeightTable(model_config_from_hf(hf)), spec)
    if gap is not None and tuple(map(int, version("peft").split(".")[:2])) < (0, 17):
        assert "peft 0.17 or newer" in gap
        pytest.skip(gap)
    merged = reference(merged_folder(hf, tmp_path / "merged", spec))(input_ids=IDS).logits
    assert (reference(hf)(input_ids=IDS).logits - merged).abs().max() > 0.1, "the adapter changes too little to prove anything"
    by_peft = load_peft(hf, export(hf, tmp_path / "peft", spec))(input_ids=IDS).logits
    torch.testing.assert_close(by_peft, merged, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", EVERY)
def test_we_read_back_what_we_wrote(folder_of: Callable[[str], Path], tmp_path: Path, family: str) -> None:
    table = WeightTable(model_config_from_hf(folder_of(family)))
    adapter = open_adapter(export(folder_of(family), tmp_path / "peft", SPEC))
    adapter.check_coverage(table)
    assert adapter.spec(table) == SPEC
    for row, layer in table.target_entries(SPEC.targets):
        (a, parts), (expected_a, expected_parts) = adapter.lora_parts(row, layer), adapter_parts(row, layer, SPEC.r)
        assert torch.equal(a, expected_a) and all(map(torch.equal, parts, expected_parts)), row.name(layer)


def test_what_peft_cannot_load_is_said(folder_of: Callable[[str], Path]) -> None:
    tables = {family: WeightTable(model_config_from_hf(folder_of(family))) for family in ("mixtral", "deepseek_v3")}
    own = replace(SPEC, modules={"decoder.layers.0.mlp.experts.local_experts.0.linear_fc1": ModuleLora((4, 2), (8.0, 8.0))})
    for spec, expected in ((own, "one r and alpha for all experts"), (replace(SPEC, targets=("linear_fc1",)), "linear_fc1 alone")):
        gap = peft_gap(tables["mixtral"], spec)
        assert gap is not None and expected in gap and "convert_ckpt.py --lora-load" in gap
    assert "peft 0.17 or newer" in str(peft_gap(tables["deepseek_v3"], SPEC))
    assert peft_gap(tables["deepseek_v3"], KINDS["attention"]) is None and peft_gap(tables["mixtral"], SPEC) is None


STACKED: dict[str, dict[str, Any]] = {
    "two parameters": dict(target_modules=["o_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
    "gate_up alone": dict(target_modules=["o_proj"], target_parameters=["mlp.experts.gate_up_proj"]),
    "down alone": dict(target_modules=["o_proj"], target_parameters=["mlp.experts.down_proj"], use_rslora=True),
    "twice the rank": dict(
        target_modules=["o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        rank_pattern={r".*\.gate_up_proj": 6},
        alpha_pattern={r".*\.gate_up_proj": 5},
    ),
}
OWN = "an A for gate and one for up"


def adapter_of_experts(hf: Path, target: Path, kind: str) -> Path:
    """An adapter whose experts peft over transformers 5 holds in two parameters: written by peft, or (``OWN``) expert by expert."""
    if kind != OWN:
        make_adapter(hf, target, size=0.1, **STACKED[kind])
        return target
    table, generator = WeightTable(model_config_from_hf(hf)), torch.Generator().manual_seed(2)
    spec, tensors = LoraSpec(4, 6.0, ("linear_proj", "linear_fc1", "linear_fc2")), {}
    modules = {row.name(layer).removesuffix(".weight"): (row, layer) for row, layer in table.target_entries(spec.targets)}
    own = {name: ModuleLora((4, 4), (6.0, 6.0)) if name.endswith("fc1") else ModuleLora((4,), (6.0,)) for name in modules}
    for name, (row, layer) in modules.items():
        pairs = [
            tuple(0.1 * torch.randn(size, generator=generator) for size in ((4, shape[1]), (shape[0], 4))) for shape in row.part_shapes
        ]
        tensors[row, layer] = join_pairs(row, own[name], pairs)  # type: ignore[arg-type]
    write_peft_adapter(target, table, replace(spec, modules=own), tensors, hf)
    return target


@pytest.mark.skipif(tuple(map(int, version("peft").split(".")[:2])) < (0, 19), reason="peft over transformers 5")
@pytest.mark.parametrize(
    ("family", "kind", "tp_size"),
    [("mixtral", "two parameters", 1), ("deepseek_v3", "twice the rank", 2), ("mixtral", "gate_up alone", 1), ("mixtral", OWN, 1)]
    + [pytest.param("mixtral", kind, 2, marks=pytest.mark.slow) for kind in (*STACKED, OWN)]
    + [pytest.param("deepseek_v3", kind, 1, marks=pytest.mark.slow) for kind in STACKED],
)
def test_adapters_of_stacked_experts_run_and_train_as_in_peft(
    pool: Any, folder_of: Callable[[str], Path], tmp_path: Path, family: str, kind: str, tp_size: int
) -> None:
    hf = folder_of(family)
    folder = adapter_of_experts(hf, tmp_path / "adapter", kind)
    twin = load_peft(hf, folder, trainable=True)
    ids, labels, weights = batch()
    expected = twin(input_ids=ids).logits
    assert (reference(hf)(input_ids=ids).logits - expected).abs().max() > 0.05, "the adapter changes too little to prove anything"
    results = pool.run(_cell, tp_size, hf, folder, tp_size, 1, False, True)
    torch.testing.assert_close(results[0]["logits"], expected, rtol=1e-5, atol=1e-5)
    assert run_convert("hf", "hf", hf, tmp_path / "merged", lora_load=folder) == 0
    torch.testing.assert_close(reference(tmp_path / "merged")(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
    loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), labels.flatten(), reduction="sum") * weights[0]
    assert results[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    loss.backward()
    engine = build_engine(hf, adapter=folder)
    PipelineRunner(engine.stages, engine.context).forward_backward(ids, labels, weights, micro_batch_size=1)
    compared = 0
    named = dict(engine.stages[0].named_parameters())
    for name, parameter in twin.named_parameters():
        if ".experts." not in name or "lora_" not in name:
            continue
        linear = "linear_fc1" if ".base_layer." in name or kind == "gate_up alone" else "linear_fc2"
        half, layer = name.partition(".lora_")[2][0], name.partition(".layers.")[2].partition(".")[0]
        ours = named[f"decoder.layers.{layer}.mlp.experts.{linear}.lora_{half}.default.weight"]
        count, wanted = len(ours), parameter.grad
        wanted = wanted.unflatten(0, (count, -1)) if half == "A" else wanted.unflatten(1, (-1, count)).permute(2, 0, 1)
        if kind == OWN and half == "B" and linear == "linear_fc1":
            wanted = wanted * (ours.detach().abs().sum(0) > 0)  # B's blocks
        torch.testing.assert_close(ours.grad, wanted, rtol=1e-5, atol=1e-5)
        compared += 1
    assert compared


def test_a_stack_that_does_not_fit_is_refused(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    if int(version("transformers").split(".")[0]) < 5:
        pytest.skip("experts are parameters in transformers 5")
    hf, table = folder_of("mixtral"), WeightTable(model_config_from_hf(folder_of("mixtral")))
    folder = adapter_of_experts(hf, tmp_path / "adapter", "gate_up alone")
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for changes, expected in (
        ({"rank_pattern": {r".*\.gate_up_proj": 3}}, "which do not hold r 3 of each expert"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "which do not hold r 4"),
        ({"target_parameters": []}, "names neither gate_up_proj nor down_proj"),
    ):
        path.write_text(json.dumps({**config, **changes}), encoding="utf-8")
        with pytest.raises(CheckpointError, match=expected):
            open_adapter(folder).check_coverage(table)


def as_before_the_exchange(folder: Path, target: Path, written: str | None) -> Path:
    """The adapter as peft up to 0.19.0 stored it: A and B of experts' parameters exchanged and transposed, expert by expert."""
    tensors = load_file(folder / "adapter_model.safetensors")
    for name in [name for name in tensors if ".experts." in name and ".lora_A." in name]:
        other = name.replace(".lora_A.", ".lora_B.")
        a, b = tensors[name].unflatten(0, (4, -1)), tensors[other].unflatten(1, (-1, 4))  # [E, r, in], [out, r, E]
        tensors[name], tensors[other] = b.permute(2, 1, 0).flatten(0, 1).clone(), a.permute(2, 1, 0).flatten(1).clone()
    target.mkdir()
    save_file(tensors, target / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    (target / "adapter_config.json").write_text(json.dumps({**config, "peft_version": written}), encoding="utf-8")
    return target


@pytest.mark.skipif(tuple(map(int, version("peft").split(".")[:2])) < (0, 20), reason="writes the newer layout")
def test_a_stack_from_before_peft_exchanged_a_and_b_is_read_rightly(tmp_path: Path) -> None:
    """down_proj is square here, as hidden and intermediate size are one: the version tells; gate_up_proj tells by its shape."""
    hf = make_model(tmp_path / "square", "mixtral", num_hidden_layers=1, hidden_size=64, intermediate_size=64)
    table = WeightTable(model_config_from_hf(hf))
    folder = adapter_of_experts(hf, tmp_path / "adapter", "twice the rank")
    new, old = open_adapter(folder), open_adapter(as_before_the_exchange(folder, tmp_path / "old", "0.18.1"))
    old.check_coverage(table)
    for row, layer in table.target_entries(new.found_targets):
        for (a, b), (expected_a, expected_b) in zip(old.pairs(row, layer), new.pairs(row, layer), strict=True):  # type: ignore[misc]
            assert torch.equal(a, expected_a) and torch.equal(b, expected_b), row.name(layer)
    with pytest.raises(CheckpointError, match=r"down_proj is square, so only the version of peft .* peft_version .* is None"):
        open_adapter(as_before_the_exchange(folder, tmp_path / "none", None)).check_coverage(table)
