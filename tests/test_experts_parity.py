"""Models with experts against transformers: logits, LoRA gradients and full gradients, at every small layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_helpers import SPEC, batch, build_engine
from experts_helpers import FAMILIES, expected_lora_gradients, merged_folder, reference, reference_gradients, usual_name
from helpers import make_model

from mindspeed_lora.errors import UsageError
from mindspeed_lora.parallel.collectives import all_reduce
from mindspeed_lora.parallel.context import build_context, single_process_context
from mindspeed_lora.parallel.pipeline import PipelineRunner
from mindspeed_lora.weights.families import model_config_from_hf
from mindspeed_lora.weights.table import WeightTable, named_slices

LAYOUTS = {"TP1": (1, 1, False), "TP2": (2, 1, False), "TP2-SP": (2, 1, True), "PP2": (1, 2, False), "TP2-PP2": (2, 2, True)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("experts")
    return {family: make_model(root / family, family, num_hidden_layers=2) for family in FAMILIES}


def _gradient_cell(folder: Path, tp_size: int, pp_size: int, sequence_parallel: bool, lora: bool, fusion: bool) -> dict[str, Any]:
    """Loss and this rank's gradients by the table's names, summed over tp where the table says that they are partial."""
    context = build_context(torch.device("cpu"), tp_size, pp_size, sequence_parallel)
    engine = build_engine(folder, context, SPEC if lora else None, fusion)
    loss = PipelineRunner(engine.stages, context).forward_backward(*batch(), micro_batch_size=1)
    gradients = {}
    for stage in engine.stages:
        named = [(name, parameter.grad) for name, parameter in stage.named_parameters() if parameter.requires_grad]
        assert all(gradient is not None for _, gradient in named), [name for name, gradient in named if gradient is None]
        for name, gradient in named_slices(named, stage.experts):
            row = engine.table.lora_row(name) if lora else engine.table.row(name)
            if row.grad_sum == "always" or (row.grad_sum == "sp" and sequence_parallel):
                all_reduce(gradient, context.tp_group)
            gradients[name] = (gradient.clone(), context.tp_rank)
    return {"loss": loss.sum().item(), "gradients": gradients}


def _parts(results: list[dict[str, Any]], table: WeightTable) -> dict[str, list[torch.Tensor]]:
    shards: dict[str, dict[int, torch.Tensor]] = {}
    for result in results:
        for name, (gradient, tp_rank) in result["gradients"].items():
            shards.setdefault(name, {})[tp_rank] = gradient
    whole = {}
    for name, by_rank in shards.items():
        row = table.lora_row(name) if ".lora_" in name else table.row(name)
        ordered = [by_rank[rank] for rank in sorted(by_rank)]
        if row.axis is None:
            assert all(torch.equal(part, ordered[0]) for part in ordered), f"{name} differs between tp ranks"
        whole[name] = table.unshard(row, ordered)
    return whole


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(folders: dict[str, Path], family: str) -> None:
    ids = batch()[0]
    expected = reference(folders[family])(input_ids=ids).logits
    torch.testing.assert_close(build_engine(folders[family]).stages[0](ids), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "layout"), [*((family, "TP1") for family in FAMILIES), *(("qwen2_moe", layout) for layout in list(LAYOUTS)[1:])]
)
def test_lora_gradients_equal_those_of_merged_weights(
    pool: Any, folders: dict[str, Path], tmp_path: Path, family: str, layout: str
) -> None:
    tp_size, pp_size, sequence_parallel = LAYOUTS[layout]
    table = WeightTable(model_config_from_hf(folders[family]))
    loss, expected = expected_lora_gradients(merged_folder(folders[family], tmp_path), table)
    fusion = layout != "TP2"
    results = pool.run(_gradient_cell, tp_size * pp_size, folders[family], tp_size, pp_size, sequence_parallel, True, fusion)
    assert results[-1]["loss"] == pytest.approx(loss, rel=1e-5)
    got = _parts(results, table)
    assert got.keys() == expected.keys()
    assert any(".local_experts." in name and value.abs().max() > 1e-3 for name, value in expected.items())
    for name, value in expected.items():
        torch.testing.assert_close(torch.cat(got[name]), value, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_the_reference_of_preference_training_is_the_base(folders: dict[str, Path]) -> None:
    from mindspeed_lora.lora.layers import as_reference

    ids = batch()[0]
    adapted, base = build_engine(folders["qwen2_moe"], lora=SPEC), build_engine(folders["qwen2_moe"])
    assert not torch.allclose(adapted.stages[0](ids), base.stages[0](ids), atol=1e-3)
    with as_reference(adapted.stages):
        assert torch.equal(adapted.stages[0](ids), base.stages[0](ids))


def test_an_expert_without_tokens_gets_a_zero_gradient(folders: dict[str, Path]) -> None:
    engine = build_engine(folders["qwen3_moe"], lora=SPEC)
    PipelineRunner(engine.stages, engine.context).forward_backward(torch.tensor([[4, 9]]), torch.tensor([[9, 7]]), torch.ones(1), 1)
    named = dict(engine.stages[0].named_parameters())
    gradient = named["decoder.layers.0.mlp.experts.linear_fc1.lora_B.default.weight"].grad
    assert gradient is not None
    used = gradient.flatten(1).abs().amax(1) > 0
    assert 2 <= int(used.sum()) <= 4  # two tokens, two experts each


def test_what_is_not_there_for_experts_is_refused(folders: dict[str, Path]) -> None:
    from dataclasses import replace

    from mindspeed_lora.parallel.on_demand import BaseStorage, Plain
    from mindspeed_lora.weights.lora_spec import ModuleLora

    two_replicas = replace(single_process_context(), dp_size=2)
    with pytest.raises(UsageError, match="--fsdp-base does not cut experts over data parallelism; use --expert-model-parallel-size"):
        build_engine(folders["mixtral"], two_replicas, make_storage=lambda: BaseStorage(two_replicas, Plain(), True))
    own = {"decoder.layers.0.mlp.experts.local_experts.0.linear_fc1": ModuleLora((4, 4), (8.0, 8.0))}
    with pytest.raises(UsageError, match=r"experts in decoder\.layers\.0\.mlp\.experts\.linear_fc1 differ in their r or alpha"):
        build_engine(folders["mixtral"], lora=replace(SPEC, modules=own))


@pytest.mark.parametrize(("family", "layout"), [("mixtral", "TP1"), ("qwen2_moe", "TP2-SP"), ("qwen3_moe", "TP2-PP2")])
def test_full_gradients_equal_transformers(pool: Any, folders: dict[str, Path], family: str, layout: str) -> None:
    tp_size, pp_size, sequence_parallel = LAYOUTS[layout]
    table = WeightTable(model_config_from_hf(folders[family]))
    loss, expected = reference_gradients(folders[family])
    results = pool.run(_gradient_cell, tp_size * pp_size, folders[family], tp_size, pp_size, sequence_parallel, False, False)
    assert results[-1]["loss"] == pytest.approx(loss, rel=1e-5)
    for name, parts in _parts(results, table).items():
        row, layer = table.parse(name)
        for hf_name, part in zip(row.hf_names(layer), parts, strict=True):
            torch.testing.assert_close(
                part, expected[usual_name(hf_name)], rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_logits_of_a_bf16_router_are_fp32(folders: dict[str, Path]) -> None:
    """What bf16 holds is multiplied and summed in fp32: rounded logits would differ by 1 in 256."""
    from mindspeed_lora.model.router import Router

    config = model_config_from_hf(folders["qwen2_moe"])
    assert config.experts is not None
    router = Router(config, config.experts, single_process_context(), torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    torch.nn.init.normal_(router.weight, std=0.5, generator=generator)
    tokens = torch.randn(16, config.hidden_size, generator=generator).bfloat16()
    expected = (tokens.double() @ router.weight.double().t()).softmax(-1).topk(config.experts.routing.top_k)
    weights, experts = router(tokens)
    assert torch.equal(experts, expected.indices)
    torch.testing.assert_close(weights.double(), expected.values, rtol=1e-5, atol=0)
