"""Training of models with latent attention: 20 steps equal one process at every layout; stopped and continued at another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from layout_cells import LAYOUTS, Cell, Outcome, assemble, run_cell
from pool import ProcessPool
from test_latent_parity import LITE, V2, V3, spec_of
from test_training_layouts import CHANGE, GRADIENT, LOSS, relative
from training_helpers import change, losses, make_config, make_workspace, run_training, saved_parameters

from mindspeed_lora.weights.families import model_config_from_hf
from mindspeed_lora.weights.table import WeightTable

BY_NAME = {layout.name: layout for layout in LAYOUTS}
Workspaces = Callable[[str], Path]


@pytest.fixture(scope="module")
def workspaces(tmp_path_factory: pytest.TempPathFactory) -> Workspaces:
    """A family's model (its first layer dense, experts in the others) and data, made when a test first asks for it."""
    made: dict[str, Path] = {}

    def workspace(family: str) -> Path:
        if family not in made:
            made[family] = make_workspace(tmp_path_factory.mktemp(family), family)
        return made[family]

    return workspace


def _config(cell: Cell, workspace: Path, family: str) -> Any:
    lora = {"lora__targets": spec_of(family).targets} if cell.mode.startswith("lora") else {}
    return cell.config(workspace, **lora)


@pytest.fixture(scope="module")
def reference(pool: ProcessPool, workspaces: Workspaces) -> Callable[[str, str], Outcome]:
    """One process, by family and what is trained."""
    made: dict[tuple[str, str], Outcome] = {}

    def outcome(family: str, mode: str) -> Outcome:
        if (family, mode) not in made:
            cell = Cell(BY_NAME["tp1"], mode, 4, "keep", False)
            made[family, mode] = pool.run(run_cell, 1, _config(cell, workspaces(family), family))[0]
        return made[family, mode]

    return outcome


SLOW = pytest.mark.slow
CELLS = [
    (LITE, "tp2", "lora_fused", "keep", False),
    (V2, "tp2sp", "lora_fused", "recompute", False),
    (V3, "tp2pp2", "lora_fused", "recompute", True),
    pytest.param(V2, "tp2", "full_untied", "keep", False, marks=SLOW),
    pytest.param(V3, "tp2pp2dp2", "lora_fused", "recompute", True, marks=SLOW),
    pytest.param(LITE, "tp2sp", "lora_plain", "keep", True, marks=SLOW),
    pytest.param(LITE, "tp2pp2dp2", "lora_fused", "recompute", True, marks=SLOW),
    pytest.param(LITE, "tp2sp", "full_untied", "recompute", False, marks=SLOW),
    pytest.param(LITE, "tp2", "full_untied", "keep", False, marks=SLOW),
    pytest.param(V2, "pp2vpp2", "lora_plain", "keep", False, marks=SLOW),
    pytest.param(V2, "pp2dp4", "full_untied", "keep", True, marks=SLOW),
    pytest.param(V3, "tp2", "lora_plain", "recompute", False, marks=SLOW),
    pytest.param(V3, "dp2", "lora_fused", "keep", True, marks=SLOW),
    pytest.param(V3, "tp2pp2dp2", "full_untied", "keep", True, marks=SLOW),
]


@pytest.mark.parametrize(("family", "layout", "mode", "recompute", "zero"), CELLS)
def test_twenty_steps_equal_one_process(
    pool: ProcessPool,
    workspaces: Workspaces,
    reference: Callable[[str, str], Outcome],
    family: str,
    layout: str,
    mode: str,
    recompute: str,
    zero: bool,
) -> None:
    workspace, cell = workspaces(family), Cell(BY_NAME[layout], mode, 1, recompute, zero)
    outcomes, expected = pool.run(run_cell, cell.layout.world_size, _config(cell, workspace, family)), reference(family, mode)
    table = WeightTable(model_config_from_hf(workspace / "model"))
    for outcome in outcomes:
        assert outcome.losses == pytest.approx(expected.losses, rel=LOSS)
        assert outcome.norms == pytest.approx(expected.norms, rel=10 * LOSS)
    for field, tolerance in (("gradients", GRADIENT), ("changes", CHANGE)):
        assert relative(assemble(outcomes, table, field), assemble([expected], table, field)) <= tolerance, field


@pytest.mark.parametrize("family", [LITE, pytest.param(V2, marks=SLOW), pytest.param(V3, marks=SLOW)])
def test_a_run_continues_at_another_layout(pool: ProcessPool, workspaces: Workspaces, tmp_path: Path, family: str) -> None:
    def config(save: Path, **changes: Any) -> Any:
        made = make_config(workspaces(family), train_iters=6, **changes)
        return change(made, save__save=save, lora__targets=spec_of(family).targets)

    cut = {"parallel__tensor_parallel_size": 2, "parallel__sequence_parallel": True, "parallel__pipeline_parallel_size": 2}
    pool.run(run_training, 1, config(tmp_path / "whole"))
    pool.run(run_training, 4, change(config(tmp_path / "parted", **cut), train_iters=3))
    pool.run(run_training, 1, change(config(tmp_path / "parted"), load__lora_load=tmp_path / "parted"))
    assert losses(tmp_path / "parted") == pytest.approx(losses(tmp_path / "whole"), rel=LOSS)
    whole, parted = (saved_parameters(tmp_path / name, True) for name in ("whole", "parted"))
    assert whole.keys() == parted.keys()
    for name, value in whole.items():
        assert (value - parted[name]).abs().max() <= CHANGE, name
