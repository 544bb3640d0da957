"""Adapters on experts in PEFT's format: peft loads all of them over whatever transformers holds experts in, and we read them back."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from engine_helpers import SPEC
from experts_helpers import adapter_parts, merged_folder, reference
from helpers import make_model
from peft_helpers import load_peft

from mindspeed_lora.weights.families import model_config_from_hf
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
