"""Training with experts dealt out over processes: 20 steps equal one process, saves have the peer's folders, runs go on elsewhere."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_helpers import SPEC, build_engine
from layout_cells import Cell, Layout, Outcome, assemble, run_cell
from pool import ProcessPool
from test_training_layouts import CHANGE, GRADIENT, LOSS, relative
from training_helpers import change, losses, make_config, make_workspace, run_training, saved_parameters, write_pairs

from mindspeed_lora.arguments.configs import LossScaleFlags, OptimizerFlags, PreferenceFlags
from mindspeed_lora.errors import MindSpeedLoraError, UsageError
from mindspeed_lora.lora.inject import inject_lora
from mindspeed_lora.model.stage import build_stage_modules
from mindspeed_lora.parallel.context import build_context
from mindspeed_lora.parallel.pipeline import PipelineRunner
from mindspeed_lora.training.advice import changes as possible_changes
from mindspeed_lora.training.flat import TrainedParameter
from mindspeed_lora.training.guards import check_replicas
from mindspeed_lora.training.machines import find_machine
from mindspeed_lora.training.memory import largest_estimate, owned_elements
from mindspeed_lora.training.optimizer import build_updates
from mindspeed_lora.training.parameters import trained_parameters
from mindspeed_lora.training.preflight import plan_model
from mindspeed_lora.training.sizes import RunSizes, stage_parameters
from mindspeed_lora.training.step_time import step_time
from mindspeed_lora.weights.families import model_config_from_hf
from mindspeed_lora.weights.table import WeightTable, is_stack

BENCHMARKS = str(Path(__file__).resolve().parents[1] / "benchmarks")
if BENCHMARKS not in sys.path:
    sys.path.insert(0, BENCHMARKS)

MODES = ("lora_fused", "full_untied")
GRIDS = {
    "ep2": Layout("ep2", dp=2, ep=2),
    "ep2dp4": Layout("ep2dp4", dp=4, ep=2, most_rows=2),
    "ep4": Layout("ep4", dp=4, ep=4, most_rows=2),
    "pp2ep2": Layout("pp2ep2", pp=2, dp=2, ep=2),
    "pp2vpp2ep2": Layout("pp2vpp2ep2", pp=2, dp=2, ep=2, virtual=1),
    "tp2ep2": Layout("tp2ep2", tp=2, dp=2, ep=2, sp=True),
    "tp2pp2ep2": Layout("tp2pp2ep2", tp=2, pp=2, dp=2, ep=2, sp=True),
    "tp2pp2ep2plain": Layout("tp2pp2ep2plain", tp=2, pp=2, dp=2, ep=2),
    "tp2etp1": Layout("tp2etp1", tp=2, sp=True, etp=1),
    "tp2ep2etp1": Layout("tp2ep2etp1", tp=2, dp=2, ep=2, etp=1, sp=True),
    "tp2ep4etp1": Layout("tp2ep4etp1", tp=2, dp=2, ep=4, etp=1),
    "tp2pp2ep2etp1": Layout("tp2pp2ep2etp1", tp=2, pp=2, dp=2, ep=2, etp=1, sp=True),
    "tp2pp2ep4etp1": Layout("tp2pp2ep4etp1", tp=2, pp=2, dp=2, ep=4, etp=1),
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2-MoE (experts, shared expert with gate), and data."""
    return make_workspace(tmp_path_factory.mktemp("experts"), "qwen2_moe")


@pytest.fixture(scope="module")
def references(pool: ProcessPool, workspace: Path) -> dict[str, Outcome]:
    """One process, by what is trained."""
    return {mode: pool.run(run_cell, 1, Cell(Layout("tp1"), mode, 4, "keep", False).config(workspace))[0] for mode in MODES}


def check_cell(pool: ProcessPool, workspace: Path, expected: Outcome, cell: Cell) -> None:
    outcomes = pool.run(run_cell, cell.layout.world_size, cell.config(workspace))
    table = WeightTable(model_config_from_hf(workspace / "model"))
    for outcome in outcomes:
        assert outcome.losses == pytest.approx(expected.losses, rel=LOSS)
        assert outcome.norms == pytest.approx(expected.norms, rel=10 * LOSS)
    for field, tolerance in (("gradients", GRADIENT), ("changes", CHANGE)):
        assert relative(assemble(outcomes, table, field), assemble([expected], table, field)) <= tolerance, field


@pytest.mark.parametrize(
    ("grid", "mode", "recompute", "zero"),
    [
        ("ep2", "full_untied", "recompute", True),
        ("ep2dp4", "lora_fused", "recompute", True),
        pytest.param("tp2pp2ep2", "lora_fused", "keep", False, marks=pytest.mark.slow),
        ("tp2ep2etp1", "full_untied", "keep", True),
        pytest.param("tp2pp2ep4etp1", "lora_fused", "recompute", False, marks=pytest.mark.slow),
        ("pp2vpp2ep2", "lora_fused", "keep", True),
    ],
)
def test_twenty_steps_equal_one_process(
    pool: ProcessPool, workspace: Path, references: dict[str, Outcome], grid: str, mode: str, recompute: str, zero: bool
) -> None:
    check_cell(pool, workspace, references[mode], Cell(GRIDS[grid], mode, 1, recompute, zero))


@pytest.mark.full
@pytest.mark.parametrize("grid", GRIDS)
def test_twenty_steps_at_every_layout(pool: ProcessPool, workspace: Path, references: dict[str, Outcome], grid: str) -> None:
    for mode in MODES:
        for recompute, zero in (("keep", False), ("recompute", True)):
            check_cell(pool, workspace, references[mode], Cell(GRIDS[grid], mode, 1, recompute, zero))


CUT = {
    "ep2": (2, {"parallel__expert_parallel_size": 2}),
    "tp2": (2, {"parallel__tensor_parallel_size": 2, "parallel__sequence_parallel": True}),
    "tp2pp2ep2": (
        8,
        {
            "parallel__tensor_parallel_size": 2,
            "parallel__pipeline_parallel_size": 2,
            "parallel__expert_parallel_size": 2,
            "parallel__sequence_parallel": True,
        },
    ),
    "tp2ep4etp1": (
        4,
        {"parallel__tensor_parallel_size": 2, "parallel__expert_parallel_size": 4, "parallel__expert_tensor_parallel_size": 1},
    ),
    "tp2ep2extended": (
        4,
        {"parallel__tensor_parallel_size": 2, "parallel__expert_parallel_size": 2, "parallel__experts_over_tensor_ranks": True},
    ),
    "one": (1, {}),
}


@pytest.mark.parametrize(
    ("lora", "zero", "layouts"),
    [
        (True, True, ("ep2", "tp2")),
        (True, False, ("tp2", "tp2ep4etp1")),
        (True, True, ("tp2pp2ep2", "one")),
        (False, True, ("tp2ep4etp1", "ep2")),
        (True, True, ("tp2ep2extended", "tp2ep2extended")),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else None,
)
def test_a_run_continues_at_another_layout(
    pool: ProcessPool, workspace: Path, tmp_path: Path, lora: bool, zero: bool, layouts: tuple[str, str]
) -> None:
    def config(save: Path, **changes: Any) -> Any:
        made = make_config(workspace, train_iters=6, optimizer__use_distributed_optimizer=zero, micro_batch_size=1, **changes)
        return change(made if lora else dataclasses.replace(made, lora=None), save__save=save)

    pool.run(run_training, 1, config(tmp_path / "whole"))
    (first_size, first), (second_size, second) = (CUT[name] for name in layouts)
    pool.run(run_training, first_size, change(config(tmp_path / "parted", **first), train_iters=3))
    source = {"load__lora_load" if lora else "load__load": tmp_path / "parted"}
    pool.run(run_training, second_size, change(config(tmp_path / "parted", **second), **source))
    assert losses(tmp_path / "parted") == pytest.approx(losses(tmp_path / "whole"), rel=LOSS)
    whole, parted = (saved_parameters(tmp_path / name, lora) for name in ("whole", "parted"))
    assert whole.keys() == parted.keys()
    for name, value in whole.items():
        assert (value - parted[name]).abs().max() <= CHANGE, name
    if lora:
        peft = saved_parameters(tmp_path / "parted", lora, tmp_path / "parted" / f"iter_{6:07d}" / "peft")
        assert all(torch.equal(value, peft[name]) for name, value in parted.items()), "PEFT's form holds the same"
    if layouts == ("tp2pp2ep2", "one"):
        assert len(list((tmp_path / "parted" / "iter_0000003").glob("mp_rank_??_???_???"))) == 8
    if layouts == ("tp2ep2extended", "tp2ep2extended"):
        folders = sorted(path.name for path in (tmp_path / "parted" / "iter_0000006").glob("mp_rank_*"))
        assert folders == ["mp_rank_00_000", "mp_rank_00_001", "mp_rank_01_000", "mp_rank_01_001"]
    if layouts == ("tp2", "tp2ep4etp1"):
        folders = sorted(path.name for path in (tmp_path / "parted" / "iter_0000006").glob("mp_rank_*"))
        assert folders == ["mp_rank_00_000", "mp_rank_00_002", "mp_rank_01_001", "mp_rank_01_003"]


def _guarded(differ: str) -> str:
    """What the guard of a save says where copies of an expert, or different experts, differ."""
    context = build_context(torch.device("cpu"), expert_parallel_size=2)
    rank = context.experts.dp_rank if differ == "copies" else context.experts.ep_rank
    weight = torch.nn.Parameter(torch.full((2, 3), float(rank)))
    try:
        check_replicas([TrainedParameter("decoder.layers.0.mlp.experts.linear_fc1.weight", weight, of_expert=True)], context)
    except MindSpeedLoraError as error:
        return str(error)
    return ""


def test_copies_of_an_expert_that_differ_are_named(pool: ProcessPool) -> None:
    assert pool.run(_guarded, 4, "experts") == [""] * 4
    assert all("linear_fc1.weight differs between ranks that hold the same experts" in text for text in pool.run(_guarded, 4, "copies"))


def _elements(folder: Path, sizes: tuple[int, int, int, int | None]) -> tuple[int, int, int, int]:
    """This rank's base and adapter elements, and of them the experts'."""
    context = build_context(torch.device("cpu"), *sizes[:2], False, *sizes[2:])
    named = [pair for stage in build_engine(folder, context, SPEC).stages for pair in stage.named_parameters()]
    base, adapter = ([pair for pair in named if (".lora_" in pair[0]) == lora] for lora in (False, True))

    def count(pairs: list[tuple[str, torch.nn.Parameter]], of_experts: bool) -> int:
        return sum(parameter.numel() for name, parameter in pairs if is_stack(name, parameter) or not of_experts)

    return count(base, False), count(adapter, False), count(base, True), count(adapter, True)


@pytest.mark.parametrize("sizes", [(1, 1, 2, None), (2, 1, 2, None), (2, 2, 2, None), (2, 1, 4, 1)], ids=str)
def test_the_estimate_counts_what_a_rank_holds(pool: ProcessPool, workspace: Path, sizes: tuple[int, int, int, int | None]) -> None:
    tp, pp, ep, etp = sizes
    dp = max(1, ep * (etp or tp) // tp)
    planned = RunSizes(model_config_from_hf(workspace / "model"), SPEC, 4, tp, pp, dp, ep, etp)
    for rank, found in enumerate(pool.run(_elements, tp * pp * dp, workspace / "model", sizes)):
        counts = stage_parameters(planned, rank // tp % pp)
        assert found == (counts.base, counts.adapter, counts.expert_base, counts.expert_adapter)
    assert owned_elements(planned, counts) == -(-(counts.adapter - counts.expert_adapter) // dp) + counts.expert_adapter


@pytest.mark.parametrize(
    ("family", "changes", "world", "words"),
    [
        ("qwen2_moe", {"parallel__expert_parallel_size": 3}, 3, r"--expert-model-parallel-size 3: 4 experts .* use one of \[1, 2, 4\]"),
        ("qwen2_moe", {"parallel__expert_parallel_size": 4}, 2, "= 4 does not divide the 2 processes of a pipeline stage"),
        ("qwen2_moe", {"parallel__expert_tensor_parallel_size": 2}, 2, "--expert-tensor-parallel-size 2 is not supported; use 1 or"),
        ("qwen2_moe", dict(parallel__experts_over_tensor_ranks=True, parallel__expert_tensor_parallel_size=2), 2, "moe-tp-extend-ep deals"),
        ("qwen3", {"parallel__experts_over_tensor_ranks": True}, 1, "--moe-tp-extend-ep: a qwen3 model has no experts"),
        ("qwen3", {"parallel__expert_parallel_size": 2}, 2, "--expert-model-parallel-size 2: a qwen3 model has no experts; leave"),
        ("qwen3", {"parallel__expert_tensor_parallel_size": 2}, 2, "--expert-tensor-parallel-size 2: a qwen3 model has no experts"),
    ],
)  # fmt: skip
def test_layouts_that_experts_do_not_fit_are_refused(
    workspace: Path, tmp_path: Path, family: str, changes: dict[str, int], world: int, words: str
) -> None:
    folder = workspace if family == "qwen2_moe" else make_workspace(tmp_path, family)
    with pytest.raises(UsageError, match=words):
        plan_model(make_config(folder, global_batch_size=12, **changes), world)


def test_a_run_says_at_its_start_what_peft_will_leave_out_of_its_saves(workspace: Path) -> None:
    config = make_config(workspace)
    lora = dataclasses.replace(config.lora, targets=("linear_fc1",))
    for flags, said in ((config.lora, False), (lora, True), (None, False)):
        notes = plan_model(dataclasses.replace(config, lora=flags), 1).notes
        assert (
            any("peft/ of a save: peft over transformers 5 leaves out expert adapters on linear_fc1 alone" in note for note in notes)
            == said
        )


def test_a_dry_run_and_the_start_report_say_where_experts_lie(pool: ProcessPool, workspace: Path) -> None:
    config = make_config(workspace, parallel__expert_parallel_size=2, train_iters=1)
    assert "TP 1 x PP 1 x DP 2 (EP 2: 2 of 4 experts a rank)" in pool.run(run_training, 2, config)[0]
    sizes = RunSizes(model_config_from_hf(workspace / "model"), SPEC, 2, dp_size=8)
    machine = find_machine("h100")
    every = dict(possible_changes(sizes, machine))
    assert every["--expert-model-parallel-size 2"].ep_size == 2
    assert "--qlora" in every and "--fsdp-base" not in every, "experts are not cut over data parallelism"
    more = dataclasses.replace(sizes, ep_size=4)
    assert "experts' exchange" in step_time(more, machine).parts
    assert largest_estimate(more)[1]["total"] < largest_estimate(sizes)[1]["total"]
    assert "--expert-model-parallel-size 8" not in dict(possible_changes(more, machine)), "there are 4 experts"


def _peak(sizes: RunSizes) -> int:
    """Most bytes that torch holds on this rank in one LoRA step, weights included; tokens spread over the experts."""
    from allocated import Allocated

    context = build_context(
        torch.device("cpu"), sizes.tp_size, 1, sizes.sequence_parallel, sizes.ep_size, sizes.expert_tensor_parallel_size
    )
    torch.manual_seed(0)
    with Allocated() as allocated:
        (stage,) = build_stage_modules(sizes.model, context, torch.float32)
        assert sizes.lora is not None
        inject_lora(stage, WeightTable(sizes.model), sizes.lora, context, True, seed=0)
        with torch.no_grad():
            for name, parameter in stage.named_parameters():
                if ".lora_" not in name:
                    parameter.fill_(1.0) if "norm" in name else parameter.normal_(0.0, 0.02)
        gradients, optimizer = build_updates(trained_parameters([stage], WeightTable(sizes.model), context), context, OptimizerFlags())
        torch.manual_seed(1 + context.dp_rank)
        ids = torch.randint(0, sizes.model.vocab_size, (1, sizes.length))
        PipelineRunner([stage], context).forward_backward(ids, ids, torch.full((1,), 1.0 / sizes.length), 1)
        gradients.reduce()
        optimizer.step(1e-4)
    return int(allocated.peak)


@pytest.mark.slow
@pytest.mark.parametrize(
    "grid",
    [{"dp_size": 2, "ep_size": 2}, {"tp_size": 2, "ep_size": 2, "expert_tensor_parallel_size": 1, "sequence_parallel": True}],
    ids=str,
)
def test_the_estimate_of_a_rank_is_what_torch_allocates(pool: ProcessPool, grid: dict[str, Any]) -> None:
    """On the rank that gets most tokens."""
    import memory_estimate

    model = dataclasses.replace(memory_estimate.GIB_EXPERTS, hidden_size=512, num_layers=4, vocab_size=2048, padded_vocab_size=2048)
    sizes = RunSizes(model, memory_estimate.LORA, 4, length=1024, device_type="cpu", **grid)
    peak = max(pool.run(_peak, 2, sizes))
    assert largest_estimate(sizes)[1]["total"] == pytest.approx(peak, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "dtype"), [("dpo", "fp32"), ("sft", "fp16")])
def test_pairs_and_fp16_train_as_on_one_process(pool: ProcessPool, workspace: Path, tmp_path: Path, stage: str, dtype: str) -> None:
    """A reference's passes, untrainable pairs, and gradients with a loss scale, of which experts have a buffer of their own."""
    pairs = {"data__data_path": str(write_pairs(tmp_path / "pairs", empty=(1, 2, 9))), "preference": PreferenceFlags()}
    config = make_config(
        workspace,
        stage=stage,
        runtime__params_dtype=dtype,
        loss_scale=LossScaleFlags(initial=2.0**10),
        micro_batch_size=1,
        optimizer__use_distributed_optimizer=True,
        **(pairs if stage == "dpo" else {}),
    )
    run_training(change(config, save__save=tmp_path / "one"))
    run = change(config, save__save=tmp_path / "ep2", parallel__pipeline_parallel_size=2, parallel__expert_parallel_size=2)
    pool.run(run_training, 4, run)
    assert losses(tmp_path / "ep2") == pytest.approx(losses(tmp_path / "one"), rel=2e-3 if dtype == "fp16" else 2e-5)
