"""Models with latent attention (DeepSeek V2-Lite, V2, V3) against transformers: logits and gradients at every small layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_helpers import TARGETS, batch, build_engine
from experts_helpers import expected_lora_gradients, merged_folder, reference, reference_gradients
from helpers import ModelFolders
from test_experts_parity import LAYOUTS, _parts

from mindspeed_lora.arguments.configs import RecomputeFlags
from mindspeed_lora.errors import UsageError
from mindspeed_lora.parallel.collectives import all_reduce
from mindspeed_lora.parallel.context import build_context
from mindspeed_lora.parallel.pipeline import PipelineRunner
from mindspeed_lora.weights.families import model_config_from_hf
from mindspeed_lora.weights.lora_spec import LoraSpec
from mindspeed_lora.weights.table import WeightTable, named_slices

LITE, V2, V3 = FAMILIES = ("deepseek_v2_lite", "deepseek_v2", "deepseek_v3")
UP = ("linear_q_up_proj", "linear_kv_up_proj")


def spec_of(family: str) -> LoraSpec:
    """Every linear that the family has."""
    return LoraSpec(4, 8.0, (*TARGETS, *(UP[1:] if family == LITE else UP)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return ModelFolders(tmp_path_factory.mktemp("latent"), num_hidden_layers=2)


def _gradient_cell(folder: Path, layout: tuple[int, int, bool], lora: LoraSpec | None, fusion: bool) -> dict[str, Any]:
    """Loss and this rank's gradients by the table's names, summed over tp where the table says that they are partial.

    Without fusion, attention is computed again in backward.
    """
    context = build_context(torch.device("cpu"), *layout)
    engine = build_engine(folder, context, lora, fusion, recompute=RecomputeFlags(None if fusion else "selective"))
    loss = PipelineRunner(engine.stages, context).forward_backward(*batch(), micro_batch_size=1)
    gradients = {}
    for stage in engine.stages:
        named = [(name, parameter.grad) for name, parameter in stage.named_parameters() if parameter.requires_grad]
        assert all(gradient is not None for _, gradient in named), [name for name, gradient in named if gradient is None]
        for name, gradient in named_slices(named, stage.experts):
            row = engine.table.lora_row(name) if lora else engine.table.row(name)
            if row.grad_sum == "always" or (row.grad_sum == "sp" and context.sequence_parallel):
                all_reduce(gradient, context.tp_group)
            gradients[name] = (gradient.clone(), context.tp_rank)
    return {"loss": loss.sum().item(), "gradients": gradients}


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(folders: dict[str, Path], family: str) -> None:
    ids = batch()[0]
    expected = reference(folders[family])(input_ids=ids).logits
    torch.testing.assert_close(build_engine(folders[family]).stages[0](ids), expected, rtol=1e-5, atol=1e-5)


def test_a_target_that_the_family_lacks_is_refused_with_those_that_it_has(folders: dict[str, Path]) -> None:
    lite = WeightTable(model_config_from_hf(folders[LITE]))
    has = "it has linear_fc1, linear_fc2, linear_kv_up_proj, linear_proj, linear_qkv$"
    with pytest.raises(UsageError, match=f"--lora-target-modules linear_q_up_proj matches nothing in a deepseek_v2 model; {has}"):
        lite.lora_rows(("linear_qkv", "linear_q_up_proj"))
    with pytest.raises(UsageError, match="linear_q_up_proj matches no module of the model"):
        build_engine(folders[LITE], lora=LoraSpec(4, 8.0, ("linear_q_up_proj",)))


@torch.no_grad()
def test_documents_of_a_row_do_not_see_each_other(folders: dict[str, Path]) -> None:
    stage = build_engine(folders[V2]).stages[0]
    ids, labels, _ = batch(rows=1)
    packed = stage(ids, labels, document_ends=torch.tensor([[7, 16]], dtype=torch.int32))
    apart = sum(stage(ids[:, part], labels[:, part]) for part in (slice(7), slice(7, 16)))
    torch.testing.assert_close(packed, apart, rtol=1e-5, atol=1e-5)
    assert (packed - stage(ids, labels)).abs() > 1e-2


@pytest.mark.parametrize(
    ("family", "layout", "fusion"),
    [
        *((family, "TP1", True) for family in FAMILIES),
        *((family, layout, layout.endswith("SP")) for family in (LITE, V2) for layout in ("TP2", "TP2-SP", "TP2-PP2")),
        (V3, "TP2-SP", False),
        (V3, "TP2", True),
        (V3, "PP2", True),
    ],
)
def test_lora_gradients_equal_those_of_merged_weights(
    pool: Any, folders: dict[str, Path], tmp_path: Path, family: str, layout: str, fusion: bool
) -> None:
    folder, lora = folders[family], spec_of(family)
    table = WeightTable(model_config_from_hf(folder))
    loss, expected = expected_lora_gradients(merged_folder(folder, tmp_path, lora), table, lora)
    tp_size, pp_size, _ = LAYOUTS[layout]
    results = pool.run(_gradient_cell, tp_size * pp_size, folder, LAYOUTS[layout], lora, fusion)
    assert results[-1]["loss"] == pytest.approx(loss, rel=1e-5)
    got = _parts(results, table)
    assert got.keys() == expected.keys()
    for target in lora.targets:
        assert all(value.abs().max() > 1e-3 for name, value in expected.items() if f".self_attention.{target}." in name), target
    for name, value in expected.items():
        torch.testing.assert_close(torch.cat(got[name]), value, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(("family", "layout"), [(LITE, "TP2"), (LITE, "TP2-SP"), (V2, "TP2-SP"), (V3, "TP2-PP2")])
def test_full_gradients_equal_transformers(pool: Any, folders: dict[str, Path], family: str, layout: str) -> None:
    table = WeightTable(model_config_from_hf(folders[family]))
    loss, expected = reference_gradients(folders[family])
    tp_size, pp_size, _ = LAYOUTS[layout]
    results = pool.run(_gradient_cell, tp_size * pp_size, folders[family], LAYOUTS[layout], None, False)
    assert results[-1]["loss"] == pytest.approx(loss, rel=1e-5)
    for name, parts in _parts(results, table).items():
        row, layer = table.parse(name)
        for hf_name, part in zip(row.hf_names(layer), parts, strict=True):
            torch.testing.assert_close(part, expected[hf_name], rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
