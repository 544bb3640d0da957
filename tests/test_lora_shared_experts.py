"""One A and B for all experts of a layer: gradients, layouts, files, continued runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_helpers import SPEC, batch, build_engine
from layout_cells import Cell, Layout, assemble, run_cell
from pool import ProcessPool
from test_training_layouts import CHANGE, GRADIENT, LOSS, relative
from training_helpers import TARGETS, change, losses, make_config, make_workspace, run_training, saved_parameters

from mindspeed_lora.arguments.configs import LoraFlags
from mindspeed_lora.checkpoint.resolve import resolve_lora
from mindspeed_lora.errors import UsageError
from mindspeed_lora.training.preflight import plan_model
from mindspeed_lora.training.sizes import stage_parameters
from mindspeed_lora.weights.families import model_config_from_hf
from mindspeed_lora.weights.sources import open_adapter
from mindspeed_lora.weights.table import WeightTable

SHARED = dataclasses.replace(SPEC, shared_experts=True)
STACKS = ".mlp.experts.linear_"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2-MoE (experts, shared expert with gate), and data."""
    return make_workspace(tmp_path_factory.mktemp("shared"), "qwen2_moe")


def shared_run(workspace: Path, **changes: Any) -> Any:
    return change(make_config(workspace, **changes), lora__shared_experts=True)


def test_the_gradient_is_the_sum_of_the_experts_gradients(workspace: Path) -> None:
    """At a point where all experts' own matrices are equal."""
    own, shared = (build_engine(workspace / "model", lora=spec).stages[0] for spec in (SPEC, SHARED))
    stacks = dict(own.named_parameters())
    with torch.no_grad():
        for name, parameter in shared.named_parameters():
            if STACKS in name and ".lora_" in name:
                assert stacks[name].dim() == 3 and parameter.shape == stacks[name].shape[1:]
                stacks[name].copy_(parameter.expand_as(stacks[name]))
    ids, labels, weights = batch()
    results = [stage(ids, labels=labels, row_weights=weights).sum() for stage in (own, shared)]
    assert results[1].item() == pytest.approx(results[0].item(), rel=1e-6)
    for result in results:
        result.backward()
    seen = 0
    for name, parameter in shared.named_parameters():
        if parameter.requires_grad:
            expected = stacks[name].grad.sum(0) if STACKS in name else stacks[name].grad
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-7)
            seen += STACKS in name and bool(expected.abs().max() > 0)
    assert seen == 4 * 4  # A and B of both linears in four layers


@pytest.mark.parametrize(
    "layout",
    [
        Layout("tp2sp", tp=2, sp=True),
        Layout("ep2", dp=2, ep=2),
        Layout("tp2etp1", tp=2, etp=1),
        pytest.param(Layout("tp2ep2etp1", tp=2, dp=2, ep=2, etp=1, sp=True), marks=pytest.mark.slow),
        pytest.param(Layout("tp2ep4etp1", tp=2, dp=2, ep=4, etp=1), marks=pytest.mark.slow),
        pytest.param(Layout("tp2pp2ep2", tp=2, pp=2, dp=2, ep=2, sp=True), marks=pytest.mark.full),
    ],
    ids=lambda layout: layout.name,
)
def test_steps_equal_one_process(pool: ProcessPool, workspace: Path, layout: Layout) -> None:
    cells = [Cell(each, "lora_fused", 2, "keep", each.ep > 1) for each in (Layout("tp1"), layout)]
    (expected,), outcomes = (
        pool.run(run_cell, c.layout.world_size, change(c.config(workspace), lora__shared_experts=True), 5) for c in cells
    )
    table = WeightTable(model_config_from_hf(workspace / "model"))
    for found in outcomes:
        assert found.losses == pytest.approx(expected.losses, rel=LOSS)
        assert found.norms == pytest.approx(expected.norms, rel=10 * LOSS)
    for field, tolerance in (("gradients", GRADIENT), ("changes", CHANGE)):
        assert relative(assemble(outcomes, table, field), assemble([expected], table, field)) <= tolerance, field


def test_saved_for_each_expert_and_continued_at_another_layout(pool: ProcessPool, workspace: Path, tmp_path: Path) -> None:
    cut = {"parallel__tensor_parallel_size": 2, "parallel__expert_parallel_size": 2, "parallel__expert_tensor_parallel_size": 1}
    lines = pool.run(run_training, 1, shared_run(workspace, save__save=tmp_path / "whole"))[0]
    assert "one A and B for all experts of a layer, written once for each" in lines
    pool.run(run_training, 2, change(shared_run(workspace, save__save=tmp_path / "parted", **cut), train_iters=2))
    again = make_config(workspace, save__save=tmp_path / "parted", load__lora_load=tmp_path / "parted", lora=None)
    pool.run(run_training, 1, again)  # the adapter itself says that it is shared
    assert losses(tmp_path / "parted") == pytest.approx(losses(tmp_path / "whole"), rel=LOSS)
    whole, parted = (saved_parameters(tmp_path / name) for name in ("whole", "parted"))
    for name, value in whole.items():
        assert (value - parted[name]).abs().max() <= CHANGE, name
        if ".local_experts." in name:
            first = name.replace(f"local_experts.{name.split('local_experts.')[1].split('.')[0]}", "local_experts.0")
            assert torch.equal(value, whole[first])
    peft = saved_peft(tmp_path / "whole")
    for name, value in whole.items():  # PEFT's folder holds the same
        if " A" in name:
            assert any(torch.equal(value, other) for other in peft.values()), name


def saved_peft(save: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    (folder,) = save.glob("iter_*/peft")
    return load_file(folder / "adapter_model.safetensors")


def test_the_estimate_counts_what_is_there(workspace: Path) -> None:
    engine = build_engine(workspace / "model", lora=SHARED)
    plan = plan_model(shared_run(workspace), 1)
    adapter = sum(parameter.numel() for stage in engine.stages for parameter in stage.parameters() if parameter.requires_grad)
    assert stage_parameters(plan.sizes, 0).adapter == pytest.approx(adapter, rel=0.01)
    parted = dataclasses.replace(plan.sizes, ep_size=2, dp_size=2)
    assert stage_parameters(parted, 0).adapter == stage_parameters(plan.sizes, 0).adapter


def test_refusals(workspace: Path, tmp_path: Path, pool: ProcessPool) -> None:
    table = WeightTable(model_config_from_hf(workspace / "model"))
    with pytest.raises(UsageError, match="--lora-shared-experts: no expert would get an adapter"):
        resolve_lora(LoraFlags(targets=("linear_qkv",), shared_experts=True), None, table)
    pool.run(run_training, 1, make_config(workspace, train_iters=1, save__save=tmp_path))
    with pytest.raises(UsageError, match="--lora-shared-experts contradicts --lora-load"):
        resolve_lora(LoraFlags(targets=TARGETS, shared_experts=True), open_adapter(tmp_path), table)
