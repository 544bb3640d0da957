"""The cells of the layout tests: what may vary without changing the result, and how one cell is run on a rank."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from training_helpers import change, make_config

from mindspeed_lora.arguments.configs import LoraFlags, RecomputeFlags, TrainConfig

GLOBAL_BATCH, STEPS = 8, 20


@dataclass(frozen=True)
class Layout:
    """Sizes of the grid; ``most_rows`` bounds the cell's micro-batch size, ``micro_batch`` sets it."""

    name: str
    tp: int = 1
    pp: int = 1
    dp: int = 1
    sp: bool = False
    virtual: int | None = None
    micro_batch: int | None = None
    most_rows: int = GLOBAL_BATCH
    ep: int = 1
    etp: int | None = None

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp


LAYOUTS = (
    Layout("tp1"),
    Layout("tp2", tp=2),
    Layout("tp2sp", tp=2, sp=True),
    Layout("pp2", pp=2),
    Layout("tp2pp2", tp=2, pp=2, sp=True),
    Layout("dp2", dp=2),
    Layout("tp2pp2dp2", tp=2, pp=2, dp=2, sp=True),
    Layout("pp2dp4", pp=2, dp=4, most_rows=2),
    Layout("pp2vpp2", pp=2, virtual=1),
    Layout("pp2_one_micro_batch", pp=2, micro_batch=GLOBAL_BATCH),
)
MODES = ("lora_fused", "lora_plain", "full_untied", "full_tied")
RECOMPUTE = {
    "keep": RecomputeFlags(),
    "recompute": RecomputeFlags("full", "block", 1),
}


@dataclass(frozen=True)
class Cell:
    """One combination."""

    layout: Layout
    mode: str
    micro_batch: int
    recompute: str
    distributed_optimizer: bool

    @property
    def name(self) -> str:
        optimizer = "zero1" if self.distributed_optimizer else "plain"
        return f"{self.layout.name}-{self.mode}-mbs{self.micro_batch}-{self.recompute}-{optimizer}"

    def config(self, workspace: Path, **changes: Any) -> TrainConfig:
        layout = self.layout
        config = make_config(
            workspace,
            parallel__tensor_parallel_size=layout.tp,
            parallel__pipeline_parallel_size=layout.pp,
            parallel__sequence_parallel=layout.sp,
            parallel__layers_per_virtual_stage=layout.virtual,
            parallel__expert_parallel_size=layout.ep,
            parallel__expert_tensor_parallel_size=layout.etp,
            optimizer__use_distributed_optimizer=self.distributed_optimizer,
            recompute=RECOMPUTE[self.recompute],
            micro_batch_size=layout.micro_batch or min(self.micro_batch, layout.most_rows),
            global_batch_size=GLOBAL_BATCH,
            train_iters=STEPS,
        )
        lora = None
        if self.mode.startswith("lora"):
            assert isinstance(config.lora, LoraFlags)
            lora = dataclasses.replace(config.lora, fusion=self.mode == "lora_fused")
        return change(dataclasses.replace(config, lora=lora), **changes)


def all_cells() -> list[Cell]:
    """The full product."""
    return [Cell(*values) for values in itertools.product(LAYOUTS, MODES, (1, 4), RECOMPUTE, (False, True))]


def pairwise(cells: list[Cell]) -> list[Cell]:
    """A few cells in which every pair of values of two different dimensions occurs (greedy, the same each time)."""

    def pairs(cell: Cell) -> set[tuple[Any, ...]]:
        values = [(index, value) for index, value in enumerate(dataclasses.astuple(cell))]
        return set(itertools.combinations(values, 2))

    left = set().union(*(pairs(cell) for cell in cells))
    chosen = []
    while left:
        best = max(cells, key=lambda cell: len(pairs(cell) & left))
        chosen.append(best)
        left -= pairs(best)
    return chosen


@dataclass(frozen=True)
class Outcome:
    """What one rank reports: losses and norms of all steps, and its shards by name (of the first ranks that hold them)."""

    losses: list[float]
    norms: list[float]
    tp_rank: int
    expert_tp_rank: int
    gradients: dict[str, torch.Tensor]
    changes: dict[str, torch.Tensor]


def run_cell(config: TrainConfig, steps: int = STEPS) -> Outcome:
    """``steps`` training steps on this rank, with the first step's reduced and clipped gradients."""
    from mindspeed_lora.parallel.collectives import all_gather_dim0
    from mindspeed_lora.parallel.context import initialize, world_size_from_environment
    from mindspeed_lora.training.loop import Trainer
    from mindspeed_lora.training.parameters import trained_parameters
    from mindspeed_lora.training.preflight import plan_training
    from mindspeed_lora.training.run import build_machinery, build_model, training_batches
    from mindspeed_lora.weights.table import named_slices

    torch.manual_seed(config.runtime.seed)
    plan = plan_training(config, world_size_from_environment())
    parallel = config.parallel
    sizes = (parallel.tensor_parallel_size, parallel.pipeline_parallel_size, parallel.sequence_parallel)
    context = initialize("cpu", *sizes, 5, parallel.expert_parallel_size, parallel.expert_tensor_parallel_size)
    stages, _ = build_model(plan, context)
    trained = trained_parameters(stages, plan.table, context)
    parts = build_machinery(plan, context, stages, trained)
    start = {item.name: item.parameter.detach().clone() for item in trained}
    trainer = Trainer(config, context, parts, plan.state, None, plan.global_batch_size, None, None)
    losses, norms, gradients = [], [], {}
    for number, batch in zip(range(steps), training_batches(plan, context), strict=False):
        result = trainer.step(batch)
        losses.append(result.loss)
        norms.append(result.norm)
        if number == 0:
            for part in parts.gradients.parts:
                whole = all_gather_dim0(part.own, part.context.dp_group) if part.sharded else part.own
                gradients |= {item.name: part.layout.view(whole, item).clone() for item in part.layout.parameters}
    changes = {item.name: item.parameter.detach() - start[item.name] for item in trained}
    if not context.has_first_copy:
        gradients, changes = {}, {}
    sliced = [dict(named_slices(values.items(), stages[0].experts)) for values in (gradients, changes)]
    return Outcome(losses, norms, context.tp_rank, context.experts.tp_rank, *sliced)


def assemble(outcomes: list[Outcome], table: Any, field: str) -> dict[str, torch.Tensor]:
    """Whole logical tensors from all ranks' shards, by Megatron name and part."""
    from mindspeed_lora.checkpoint.resume import table_row

    shards: dict[str, dict[int, torch.Tensor]] = {}
    for outcome in outcomes:
        for name, value in getattr(outcome, field).items():
            rank = outcome.expert_tp_rank if ".local_experts." in name else outcome.tp_rank
            shards.setdefault(name, {})[rank] = value
    whole = {}
    for name, by_rank in shards.items():
        parts = table.unshard(table_row(table, name), [by_rank[rank] for rank in sorted(by_rank)])
        whole |= {f"{name}[{index}]": part for index, part in enumerate(parts)}
    return whole
