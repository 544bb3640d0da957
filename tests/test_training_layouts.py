"""Layout independence: losses, gradients and weight changes of 20 steps are those of one process, whatever the layout.

Tolerances are the issue's. A wrong reduction, a lost micro-batch or a doubled gradient is off by per cents.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from layout_cells import LAYOUTS, Cell, Outcome, all_cells, assemble, pairwise, run_cell
from pool import ProcessPool
from training_helpers import make_workspace

from mindspeed_lora.weights.families import model_config_from_hf
from mindspeed_lora.weights.table import WeightTable

LOSS = GRADIENT = CHANGE = 1e-5
CELLS = all_cells()
COVER = pairwise(CELLS)
TIED_HEAD = "output_layer.weight[0]"


@pytest.fixture(scope="module")
def workspaces(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Model and data, by whether the head is tied."""
    return {tied: make_workspace(tmp_path_factory.mktemp("tied" if tied else "untied"), tied=tied) for tied in (False, True)}


@pytest.fixture(scope="module")
def references(pool: ProcessPool, workspaces: dict[bool, Path]) -> dict[str, tuple[WeightTable, Outcome]]:
    """One process, micro-batch 4, by what is trained."""
    found = {}
    for kind in ("lora", "full_untied", "full_tied"):
        mode = "lora_plain" if kind == "lora" else kind
        cell = Cell(LAYOUTS[0], mode, 4, "keep", False)
        workspace = workspaces[kind == "full_tied"]
        table = WeightTable(model_config_from_hf(workspace / "model"))
        found[kind] = (table, pool.run(run_cell, 1, cell.config(workspace))[0])
    return found


def relative(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """L2 of the difference over L2, all tensors together."""
    assert one.keys() == other.keys()
    difference = sum(float((one[name] - other[name]).double().square().sum()) for name in one)
    return (difference / sum(float(value.double().square().sum()) for value in other.values())) ** 0.5


def check(pool: ProcessPool, workspaces: dict[bool, Path], references: dict[str, tuple[WeightTable, Outcome]], cell: Cell) -> None:
    kind = "lora" if cell.mode.startswith("lora") else cell.mode
    table, expected = references[kind]
    outcomes = pool.run(run_cell, cell.layout.world_size, cell.config(workspaces[kind == "full_tied"]))
    for outcome in outcomes:
        assert outcome.losses == pytest.approx(expected.losses, rel=LOSS)
        assert outcome.norms == pytest.approx(expected.norms, rel=10 * LOSS)
    for field, tolerance in (("gradients", GRADIENT), ("changes", CHANGE)):
        found, wanted = assemble(outcomes, table, field), assemble([expected], table, field)
        if cell.mode == "full_tied" and cell.layout.pp > 1:
            assert torch.equal(found.pop(TIED_HEAD), found["embedding.word_embeddings.weight[0]"])
        assert relative(found, wanted) <= tolerance, field


@pytest.mark.parametrize("cell", COVER, ids=lambda cell: cell.name)
def test_cell_equals_one_process(
    pool: ProcessPool, workspaces: dict[bool, Path], references: dict[str, tuple[WeightTable, Outcome]], cell: Cell
) -> None:
    check(pool, workspaces, references, cell)


@pytest.mark.full
@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell not in COVER], ids=lambda cell: cell.name)
def test_every_cell_equals_one_process(
    pool: ProcessPool, workspaces: dict[bool, Path], references: dict[str, tuple[WeightTable, Outcome]], cell: Cell
) -> None:
    check(pool, workspaces, references, cell)


def test_the_cover_holds_every_layout_with_every_mode() -> None:
    assert {(cell.layout, cell.mode) for cell in COVER} == {(cell.layout, cell.mode) for cell in CELLS}
