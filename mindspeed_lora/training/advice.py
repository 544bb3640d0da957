"""What to change when a run does not fit: each change tried on the estimate, alone and then together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from mindspeed_lora.arguments.configs import RecomputeFlags
from mindspeed_lora.training.machines import Machine
from mindspeed_lora.training.memory import largest_estimate
from mindspeed_lora.training.sizes import RunSizes
from mindspeed_lora.training.step_time import step_time


@dataclass(frozen=True)
class Outcome:
    """A changed run: the flags that change it, what its fullest device needs, and its step."""

    flags: str
    sizes: RunSizes
    total_bytes: float
    seconds: float


def advise(sizes: RunSizes, machine: Machine) -> tuple[list[Outcome], Outcome | None]:
    """(each change alone, the cheapest combination that fits; None where nothing does).

    The combination is found by taking, again and again, the change that fits at the least time, else the one that saves most.
    """
    singles = [_outcome(flags, changed, machine) for flags, changed in changes(sizes, machine)]
    taken: list[str] = []
    current = sizes
    while largest_estimate(current, machine.memory_bytes)[1]["total"] > machine.usable_bytes:
        tried = [_outcome(flags, changed, machine) for flags, changed in changes(current, machine)]
        fitting = [one for one in tried if one.total_bytes <= machine.usable_bytes]
        best = min(fitting, key=lambda one: one.seconds) if fitting else min(tried, key=lambda one: one.total_bytes, default=None)
        if best is None or best.total_bytes >= largest_estimate(current, machine.memory_bytes)[1]["total"]:
            return singles, None
        taken.append(best.flags)
        current = best.sizes
    return singles, _outcome("  ".join(taken), current, machine)


def _outcome(flags: str, sizes: RunSizes, machine: Machine) -> Outcome:
    return Outcome(flags, sizes, largest_estimate(sizes, machine.memory_bytes)[1]["total"], step_time(sizes, machine).seconds)


def changes(sizes: RunSizes, machine: Machine) -> Iterator[tuple[str, RunSizes]]:
    """Every single change that is possible, with its flags; the global batch and the number of devices stay as they are."""
    if sizes.recompute.granularity != "full":
        whole = RecomputeFlags("full", "uniform", 1)
        yield "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1", replace(sizes, recompute=whole)
    if sizes.micro_batch_size % 2 == 0:
        half = replace(sizes, micro_batch_size=sizes.micro_batch_size // 2, num_micro_batches=2 * sizes.num_micro_batches)
        yield f"--micro-batch-size {half.micro_batch_size}", half
    yield from _layouts(sizes)
    if sizes.dp_size > 1 and not sizes.sharded_optimizer:
        yield "--use-distributed-optimizer", replace(sizes, sharded_optimizer=True)
    if sizes.model.experts is not None:
        yield from _expert_layouts(sizes)
    elif sizes.lora and sizes.dp_size > 1 and not sizes.fsdp_base:
        yield "--fsdp-base", replace(sizes, fsdp_base=True)
    if sizes.lora and not sizes.qlora and not machine.name.startswith("atlas"):
        yield "--qlora", replace(sizes, qlora=True)


def _expert_layouts(sizes: RunSizes) -> Iterator[tuple[str, RunSizes]]:
    """Twice the EP, on the ranks that are there."""
    more = replace(sizes, ep_size=2 * sizes.ep_size)
    if _holds_experts(more):
        yield f"--expert-model-parallel-size {more.ep_size}", more


def _holds_experts(sizes: RunSizes) -> bool:
    """Whether the ranks of a stage hold whole copies of the experts."""
    count = sizes.model.experts.count if sizes.model.experts else sizes.ep_size
    return count % sizes.ep_size == 0 and sizes.dp_size * sizes.tp_size % (sizes.ep_size * sizes.expert_tp_size) == 0


def _layouts(sizes: RunSizes) -> Iterator[tuple[str, RunSizes]]:
    """Twice the TP or PP at half the DP, where the experts still find their ranks."""
    if sizes.dp_size % 2:
        return
    model = sizes.model
    tp, pp = 2 * sizes.tp_size, 2 * sizes.pp_size
    micro_batches = sizes.global_batch_size // (sizes.micro_batch_size * (sizes.dp_size // 2))
    moved = replace(sizes, dp_size=sizes.dp_size // 2, num_micro_batches=micro_batches)
    if all(size % tp == 0 for size in (model.num_query_groups, model.ffn_hidden_size, model.padded_vocab_size, sizes.length)):
        wider = replace(moved, tp_size=tp, sequence_parallel=True)
        if _holds_experts(wider):
            yield f"--tensor-model-parallel-size {tp} --sequence-parallel", wider
    if model.num_layers % pp == 0 and not sizes.layers_per_virtual_stage and _holds_experts(moved):
        yield f"--pipeline-model-parallel-size {pp}", replace(moved, pp_size=pp)


def merge_flags(text: str) -> str:
    """``--a 1 --b --a 2`` -> ``--a 2 --b``: a later value replaces an earlier one."""
    found: dict[str, list[str]] = {}
    values: list[str] = []
    for word in text.split():
        if word.startswith("--"):
            values = found[word] = []
        else:
            values.append(word)
    return " ".join(" ".join([flag, *values]) for flag, values in found.items())
