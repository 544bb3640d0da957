"""Training of models with experts: 20 steps equal one process at every layout; stopped and continued at another."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from layout_cells import LAYOUTS, Cell, Outcome, assemble, run_cell
from pool import ProcessPool
from test_training_layouts import CHANGE, GRADIENT, LOSS, relative
from training_helpers import change, losses, make_config, make_workspace, run_training, saved_parameters

from mindspeed_lora.weights.families import model_config_from_hf
from mindspeed_lora.weights.table import WeightTable

MODES = ("lora_fused", "full_untied")
BY_NAME = {layout.name: layout for layout in LAYOUTS}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2-MoE (experts, shared expert with gate), and data."""
    return make_workspace(tmp_path_factory.mktemp("experts"), "qwen2_moe")


@pytest.fixture(scope="module")
def references(pool: ProcessPool, workspace: Path) -> dict[str, Outcome]:
    """One process, by what is trained."""
    return {mode: pool.run(run_cell, 1, Cell(BY_NAME["tp1"], mode, 4, "keep", False).config(workspace))[0] for mode in MODES}


@pytest.mark.parametrize(
    ("layout", "mode", "recompute", "zero"),
    [
        ("tp2sp", "lora_fused", "keep", False),
        ("tp2", "full_untied", "recompute", False),
        ("tp2pp2dp2", "lora_fused", "recompute", True),
        ("pp2vpp2", "full_untied", "keep", False),
        ("pp2dp4", "full_untied", "keep", True),
    ],
)
def test_twenty_steps_equal_one_process(
    pool: ProcessPool, workspace: Path, references: dict[str, Outcome], layout: str, mode: str, recompute: str, zero: bool
) -> None:
    cell = Cell(BY_NAME[layout], mode, 1, recompute, zero)
    outcomes, expected = pool.run(run_cell, cell.layout.world_size, cell.config(workspace)), references[mode]
    table = WeightTable(model_config_from_hf(workspace / "model"))
    for outcome in outcomes:
        assert outcome.losses == pytest.approx(expected.losses, rel=LOSS)
        assert outcome.norms == pytest.approx(expected.norms, rel=10 * LOSS)
    for field, tolerance in (("gradients", GRADIENT), ("changes", CHANGE)):
        assert relative(assemble(outcomes, table, field), assemble([expected], table, field)) <= tolerance, field


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_a_run_continues_at_another_layout(pool: ProcessPool, workspace: Path, tmp_path: Path, lora: bool) -> None:
    def config(save: Path, **changes: Any) -> Any:
        made = make_config(workspace, train_iters=6, **changes)
        return change(made if lora else dataclasses.replace(made, lora=None), save__save=save)

    cut = {"parallel__tensor_parallel_size": 2, "parallel__sequence_parallel": True, "parallel__pipeline_parallel_size": 2}
    pool.run(run_training, 1, config(tmp_path / "whole"))
    pool.run(run_training, 4, change(config(tmp_path / "parted", **cut), train_iters=3))
    source = {"load__lora_load" if lora else "load__load": tmp_path / "parted"}
    pool.run(run_training, 1, change(config(tmp_path / "parted"), **source))
    assert losses(tmp_path / "parted") == pytest.approx(losses(tmp_path / "whole"), rel=LOSS)
    whole, parted = (saved_parameters(tmp_path / name, lora) for name in ("whole", "parted"))
    assert whole.keys() == parted.keys()
    for name, value in whole.items():
        assert (value - parted[name]).abs().max() <= CHANGE, name
