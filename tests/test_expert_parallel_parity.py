"""Experts dealt out over processes against transformers: LoRA and full gradients, and results that no layout changes.

Each data-parallel rank has its own rows (and its own padded length), so that rows do travel; the oracle sees the whole batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_helpers import SPEC, batch, build_engine
from experts_helpers import FAMILIES, expected_lora_gradients, merged_folder, reference_gradients, usual_name
from helpers import make_model

from mindspeed_lora.errors import UsageError
from mindspeed_lora.parallel.collectives import all_reduce
from mindspeed_lora.parallel.context import build_context, check_expert_grid
from mindspeed_lora.parallel.pipeline import PipelineRunner
from mindspeed_lora.weights.families import model_config_from_hf
from mindspeed_lora.weights.table import WeightTable, named_slices


@dataclass(frozen=True)
class Grid:
    """``etp`` None: the experts are cut over TP."""

    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int | None = None
    dp: int = 1
    sp: bool = False

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def name(self) -> str:
        uncut = "" if self.etp is None else f"etp{self.etp}-"
        return f"tp{self.tp}{'sp' if self.sp else ''}-pp{self.pp}-ep{self.ep}-{uncut}dp{self.dp}"


def every_grid() -> list[Grid]:
    """The product of TP 1/2, PP 1/2, EP 1/2/4, ETP 1/2, sequence parallelism and DP that 8 processes hold."""
    found = []
    for tp, pp, ep, etp, dp, sp in product((1, 2), (1, 2), (1, 2, 4), (None, 1), (1, 2, 4), (False, True)):
        grid = Grid(tp, pp, ep, etp, dp, sp)
        cut = ep * (etp or tp)
        if grid.world_size <= 8 and (dp * tp) % cut == 0 and not (tp == 1 and (sp or etp)):
            found.append(grid)
    return found


CHOSEN = (
    Grid(ep=2, dp=2),
    Grid(ep=4, dp=4),
    Grid(pp=2, ep=2, dp=4),
    Grid(tp=2, ep=2, dp=2, sp=True),
    Grid(tp=2, pp=2, ep=2, dp=2),
    Grid(tp=2, ep=2, etp=1, sp=True),
    Grid(tp=2, ep=4, etp=1, dp=2),
    Grid(tp=2, pp=2, ep=2, etp=1, dp=2),
    Grid(tp=2, ep=1, etp=1, sp=True),
)
FAMILY_OF = {grid: FAMILIES[number % len(FAMILIES)] for number, grid in enumerate(CHOSEN)}
COLUMNS = {0: 16, 1: 20}  # of the data-parallel ranks, even and odd ones: padded to other lengths


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("experts")
    return {family: make_model(root / family, family, num_hidden_layers=2) for family in FAMILIES}


def gradient_cell(folder: Path, grid: Grid, lora: bool, fusion: bool) -> dict[str, Any]:
    """Loss and this rank's gradients by the table's names, summed over the groups that the context names."""
    context = build_context(torch.device("cpu"), grid.tp, grid.pp, grid.sp, grid.ep, grid.etp)
    engine = build_engine(folder, context, SPEC if lora else None, fusion)
    rows = slice(context.dp_rank * 4 // grid.dp, (context.dp_rank + 1) * 4 // grid.dp)
    ids, labels, weights = (tensor[rows] for tensor in batch())
    extra = COLUMNS[context.dp_rank % 2] - ids.shape[1]
    ids, labels = (torch.nn.functional.pad(tensor, (0, extra), value=value) for tensor, value in ((ids, 0), (labels, -100)))
    loss = PipelineRunner(engine.stages, context).forward_backward(ids, labels, weights, micro_batch_size=1).sum()
    gradients = {}
    for stage in engine.stages:
        named = [(name, parameter.grad) for name, parameter in stage.named_parameters() if parameter.requires_grad]
        assert all(gradient is not None for _, gradient in named), [name for name, gradient in named if gradient is None]
        for name, gradient in named_slices(named, stage.experts):
            row = engine.table.lora_row(name) if lora else engine.table.row(name)
            own = context if row.expert is None else context.for_experts()
            total = gradient.clone()
            if row.grad_sum == "always" or (row.grad_sum == "sp" and grid.sp):
                all_reduce(total, own.tp_group)
            gradients[name] = (all_reduce(total, own.dp_group), context.cut(row.expert is not None)[0])
    return {"loss": float(all_reduce(loss, context.dp_group)), "gradients": gradients, "last": context.is_last_stage}


def whole(results: list[dict[str, Any]], table: WeightTable) -> dict[str, list[torch.Tensor]]:
    """HF parts by the table's names; what several ranks hold is equal on all of them."""
    shards: dict[str, dict[int, torch.Tensor]] = {}
    for result in results:
        for name, (gradient, rank) in result["gradients"].items():
            known = shards.setdefault(name, {}).setdefault(rank, gradient)
            torch.testing.assert_close(gradient, known, rtol=0, atol=0, msg=f"{name} differs between ranks that hold the same part")
    parts = {}
    for name, by_rank in shards.items():
        row = table.lora_row(name) if ".lora_" in name else table.row(name)
        parts[name] = table.unshard(row, [by_rank[rank] for rank in sorted(by_rank)])
    return parts


def check_lora(pool: Any, folder: Path, merged: Path, grid: Grid) -> None:
    table = WeightTable(model_config_from_hf(folder))
    loss, expected = expected_lora_gradients(merged, table)
    results = pool.run(gradient_cell, grid.world_size, folder, grid, True, grid.sp)
    assert [result["loss"] for result in results if result["last"]] == pytest.approx([loss] * (grid.dp * grid.tp), rel=1e-5)
    got = whole(results, table)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(torch.cat(got[name]), value, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("grid", CHOSEN, ids=lambda grid: f"{FAMILY_OF[grid]}-{grid.name}")
def test_lora_gradients_equal_those_of_merged_weights(pool: Any, folders: dict[str, Path], tmp_path: Path, grid: Grid) -> None:
    folder = folders[FAMILY_OF[grid]]
    check_lora(pool, folder, merged_folder(folder, tmp_path), grid)


@pytest.mark.full
@pytest.mark.parametrize("family", (*FAMILIES, "deepseek_v2_lite", "deepseek_v2", "deepseek_v3"))
def test_lora_gradients_at_every_layout(pool: Any, tmp_path: Path, family: str) -> None:
    folder = make_model(tmp_path / "model", family, num_hidden_layers=2)
    merged = merged_folder(folder, tmp_path / "merged")
    for grid in every_grid():
        check_lora(pool, folder, merged, grid)


def check_full(pool: Any, folder: Path, grid: Grid) -> None:
    table = WeightTable(model_config_from_hf(folder))
    loss, expected = reference_gradients(folder)
    results = pool.run(gradient_cell, grid.world_size, folder, grid, False, False)
    assert [result["loss"] for result in results if result["last"]] == pytest.approx([loss] * (grid.dp * grid.tp), rel=1e-5)
    for name, parts in whole(results, table).items():
        row, layer = table.parse(name)
        for hf_name, part in zip(row.hf_names(layer), parts, strict=True):
            torch.testing.assert_close(
                part, expected[usual_name(hf_name)], rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.parametrize(
    ("family", "grid"),
    [
        ("qwen2_moe", Grid(tp=2, ep=2, dp=2, sp=True)),  # shared expert with its gate, and the router, of which each rank has a share
        ("qwen2_moe", Grid(tp=2, ep=2, etp=1)),
        ("qwen2_moe", Grid(tp=2, pp=2, ep=4, etp=1, dp=2, sp=True)),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_full_gradients_equal_transformers(pool: Any, folders: dict[str, Path], family: str, grid: Grid) -> None:
    check_full(pool, folders[family], grid)


@pytest.mark.full
@pytest.mark.parametrize("family", FAMILIES)
def test_full_gradients_at_every_layout(pool: Any, folders: dict[str, Path], family: str) -> None:
    for grid in every_grid():
        check_full(pool, folders[family], grid)


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_deepseek_s_gradients_equal_one_process(pool: Any, tmp_path: Path, family: str) -> None:
    """Groups of experts, a bias of the choice, shared experts and latent attention beside the dispatch."""
    folder, grid = make_model(tmp_path / "model", family), Grid(tp=2, pp=2, ep=2, etp=1, sp=True)
    table = WeightTable(model_config_from_hf(folder))
    alone, several = (whole(pool.run(gradient_cell, each.world_size, folder, each, True, each.sp), table) for each in (Grid(pp=1), grid))
    assert several.keys() == alone.keys()
    for name, parts in alone.items():
        torch.testing.assert_close(
            torch.cat(several[name]), torch.cat(parts), rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def _place(grid: Grid) -> tuple[Any, ...]:
    context = build_context(torch.device("cpu"), grid.tp, grid.pp, grid.sp, grid.ep, grid.etp)
    experts = context.experts
    members = {name: sorted(_ranks(getattr(experts, f"{name}_group"), context.rank)) for name in ("ep", "tp", "dp")}
    return context.tp_rank, context.pp_rank, experts.ep_rank, context.has_first_copy, members, list(context.own_experts(8))


def _ranks(group: Any, own: int) -> list[int]:
    import torch.distributed as dist

    return [own] if group is None else dist.get_process_group_ranks(group)


def test_where_experts_lie(pool: Any) -> None:
    """EP ranks are neighbours: on the data-parallel axis where experts are cut over TP, else on one machine first."""
    cut = pool.run(_place, 8, Grid(tp=2, ep=2, dp=4))
    assert [place[2] for place in cut] == [0, 0, 1, 1, 0, 0, 1, 1]
    assert cut[5][4] == {"ep": [5, 7], "tp": [4, 5], "dp": [1, 5]}
    assert [place[3] for place in cut] == [True] * 4 + [False] * 4
    assert cut[2][5] == [4, 5, 6, 7]
    uncut = pool.run(_place, 8, Grid(tp=2, pp=2, ep=4, etp=1, dp=2))
    assert [place[:3] for place in uncut] == [(0, 0, 0), (1, 0, 1), (0, 1, 0), (1, 1, 1), (0, 0, 2), (1, 0, 3), (0, 1, 2), (1, 1, 3)]
    assert uncut[6][4] == {"ep": [2, 3, 6, 7], "tp": [6], "dp": [6]}
    assert all(place[3] for place in uncut)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [((2, 1, 4, None), "--expert-model-parallel-size 4 x expert tensor parallel size 1 = 4 does not divide the 2 processes"),
     ((1, 2, 2, None), "the 2 processes of a pipeline stage .data parallel size 1 x tensor parallel size 2.; start more")],
)  # fmt: skip
def test_a_stage_too_small_for_its_experts_is_refused(sizes: tuple[int, int, int, int | None], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        check_expert_grid(*sizes)


def _idle_expert(folder: Path) -> list[tuple[float, list[int]]]:
    """Every rank sees one token twice over: of 8 experts at most 4 have rows, of the EP ranks' halves perhaps none."""
    context = build_context(torch.device("cpu"), expert_parallel_size=2)
    engine = build_engine(folder, context, SPEC)
    ids, labels = torch.tensor([[4, 4]]), torch.tensor([[4, -100]])
    PipelineRunner(engine.stages, context).forward_backward(ids, labels, torch.ones(1), 1)
    named = dict(engine.stages[0].named_parameters())
    gradient = named["decoder.layers.0.mlp.experts.linear_fc1.lora_B.default.weight"].grad
    assert gradient is not None
    return [(float(one.abs().max()), [number]) for number, one in zip(engine.stages[0].experts, gradient, strict=True)]


def test_an_expert_without_tokens_gets_a_zero_gradient_and_nobody_waits(pool: Any, folders: dict[str, Path]) -> None:
    largest = [peak for rank in pool.run(_idle_expert, 2, folders["qwen3_moe"]) for peak, _ in rank]
    assert len(largest) == 8
    assert 2 <= sum(peak > 0 for peak in largest) <= 4


def _calls(folder: Path) -> tuple[list[int], float]:
    """Rows padded to 16 tokens on one replica, to 20 on the other, and receive buffers for 4 micro-batches of the one, 3 of the other."""
    context = build_context(torch.device("cpu"), 1, 2, False, 2)
    engine = build_engine(folder, context, SPEC)
    runner = PipelineRunner(engine.stages, context)
    runner._budget_bytes = 2 * 16 * 64 * 4 * 4
    sizes: list[int] = []
    build = runner._build

    def built(size: int, *others: int) -> Any:
        sizes.append(size)
        return build(size, *others)

    runner._build = built  # type: ignore[method-assign]
    ids, labels, weights = batch(rows=4, length=COLUMNS[context.dp_rank])
    loss = runner.forward_backward(ids, labels, weights, 1).sum()
    return sizes, float(loss)


@pytest.mark.skipif(torch.__version__ < "2.9", reason="over gloo, schedules of torch.distributed.pipelining need torch 2.9")
def test_replicas_that_share_experts_cut_a_step_alike(pool: Any, folders: dict[str, Path]) -> None:
    """Other calls would mean another order of forward and backward passes, and exchanges that wait for each other."""
    results = pool.run(_calls, 4, folders["mixtral"], timeout=60)
    assert [sizes for sizes, _ in results] == [[2]] * 4, "two calls of one size"
    assert all(loss > 0 for _, loss in results[1::2] if loss)


def _untrained(folder: Path, pp_size: int) -> list[float]:
    """Nothing of the second replica's rows is trained, but its experts have the first one's tokens, forward and backward."""
    context = build_context(torch.device("cpu"), 1, pp_size, False, 2)
    engine = build_engine(folder, context, SPEC)
    ids, labels, weights = batch(rows=2)
    PipelineRunner(engine.stages, context).forward_backward(ids, torch.full_like(labels, -100) if context.dp_rank else labels, weights, 1)
    named = [(name, parameter.grad) for stage in engine.stages for name, parameter in stage.named_parameters() if ".experts." in name]
    return [float(gradient.abs().max()) for _, gradient in named if gradient is not None]


@pytest.mark.parametrize("pp_size", [1, 2])
def test_a_replica_without_trained_tokens_still_works_for_the_others(pool: Any, folders: dict[str, Path], pp_size: int) -> None:
    for peaks in pool.run(_untrained, 2 * pp_size, folders["mixtral"], pp_size, timeout=60):
        assert peaks and min(peaks) > 0


def _nothing_to_send() -> list[tuple[int, ...]]:
    from mindspeed_lora.parallel.dispatch import from_experts, plan_exchange, to_experts

    context = build_context(torch.device("cpu"), expert_parallel_size=2)
    assert context.experts.ep_group is not None
    counts = torch.tensor([0, 0, 0, 3]) if context.dp_rank else torch.zeros(4, dtype=torch.int64)
    rows = torch.ones(int(counts.sum()), 5, requires_grad=True)
    exchange = plan_exchange(counts, context.experts.ep_group)
    there = to_experts(rows, exchange)
    back = from_experts(2 * there, exchange)
    back.sum().backward()
    assert torch.equal(back, torch.full_like(rows, 2.0))
    assert rows.grad is not None and torch.equal(rows.grad, torch.full_like(rows, 2.0))
    return [tuple(there.shape), exchange.groups.lengths]


def test_ranks_without_rows_take_part(pool: Any) -> None:
    assert pool.run(_nothing_to_send, 2) == [[(0, 5), (0, 0)], [(3, 5), (0, 3)]]
