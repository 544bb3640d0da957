"""``posttrain_gpt.py --dry-run``: what a run would need, before any device is touched."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from mindspeed_lora.arguments.configs import TrainConfig
from mindspeed_lora.checkpoint.start import StartPoint
from mindspeed_lora.errors import UsageError
from mindspeed_lora.manifest import read_manifest
from mindspeed_lora.parallel.context import world_size_from_environment
from mindspeed_lora.training.advice import Outcome, advise, merge_flags
from mindspeed_lora.training.machines import Machine, find_machine
from mindspeed_lora.training.memory import GIB, MIB, estimate, largest_estimate
from mindspeed_lora.training.preflight import ModelPlan, plan_model
from mindspeed_lora.training.report import print_block
from mindspeed_lora.training.sizes import RunSizes
from mindspeed_lora.training.step_time import step_time
from mindspeed_lora.weights.families import model_config_from_hf
from mindspeed_lora.weights.sources import HFBase


class ConfigOnlyBase(HFBase):
    """A folder with a ``config.json`` and no weights: enough to plan with; asking for a tensor says that it is missing."""

    def __init__(self, path: Path) -> None:
        self.path = self.config_dir = path
        self.config = model_config_from_hf(path)
        self.manifest = read_manifest(path)
        self.tensors = {}
        self.dtype = getattr(torch, self.config.dtype)


def dry_run(config: TrainConfig) -> int:
    """Print memory per stage, step time, and advice; returns 0, also where the run does not fit.

    Raises:
        MindSpeedLoraError: what plan_model refuses, or an unknown machine.
    """
    machine = find_machine(config.dry_run_machine) if config.dry_run_machine else None
    plan = plan_model(config, _devices(config, machine), _start(config))
    sizes = plan.sizes
    lines = _lines_of_run(plan, sizes) + _lines_of_memory(sizes, machine)
    if machine is not None:
        lines += _lines_of_time(sizes, machine) + _lines_of_verdict(sizes, machine)
    print_block("dry run", [*lines, *(f"note: {note}" for note in plan.notes)])
    return 0


def _devices(config: TrainConfig, machine: Machine | None) -> int:
    """World size: the flag, torchrun's, the machine's, or one replica."""
    parallel = config.parallel
    ep_size, etp_size = parallel.expert_grid
    replica = max(parallel.tensor_parallel_size, ep_size * (etp_size or parallel.tensor_parallel_size)) * parallel.pipeline_parallel_size
    found = config.dry_run_devices or (world_size_from_environment() if "WORLD_SIZE" in os.environ else 0)
    if not found:
        return max(machine.devices, replica) if machine else replica
    if found % replica:
        raise UsageError(
            f"--dry-run-devices {found}: a whole model on --tensor-model-parallel-size x --pipeline-model-parallel-size (x "
            f"--expert-model-parallel-size) = {replica} does not divide it; "
            f"use a multiple of {replica}"
        )
    return found


def _start(config: TrainConfig) -> StartPoint | None:
    """A start from ``config.json`` alone where the folder has nothing else; None: as in a real run."""
    folder = config.load.load
    if folder is None or not (folder / "config.json").is_file() or config.load.lora_load is not None:
        return None
    if any(any(folder.glob(pattern)) for pattern in ("*.safetensors", "*.bin", "*.pt", "*.index.json", "*checkpointed_iteration.txt")):
        return None
    note = f"{folder} holds a config.json and no weights: enough for a dry run"
    return StartPoint(ConfigOnlyBase(folder), None, notes=[note])


def _lines_of_run(plan: ModelPlan, sizes: RunSizes) -> list[str]:
    lora = f"LoRA {plan.lora.describe()}" if plan.lora else "full-parameter training"
    recompute = " ".join(str(value) for value in vars(sizes.recompute).values() if value is not None) or "off"
    return [
        f"model: {sizes.model.family}, {sizes.model.num_layers} layers, hidden {sizes.model.hidden_size}, "
        f"{str(plan.dtype).removeprefix('torch.')}; {lora}",
        f"devices: {sizes.world_size} = {sizes.describe()}; step: {sizes.micro_batch_size} rows x {sizes.num_micro_batches} micro-batches "
        f"x DP {sizes.dp_size} = {sizes.global_batch_size} rows of {sizes.length} tokens; recomputation: {recompute}",
    ]


def _lines_of_memory(sizes: RunSizes, machine: Machine | None) -> list[str]:
    """A table, one line per purpose, one column per stage (equal neighbours once)."""
    every = [estimate(sizes, stage, machine.memory_bytes if machine else None) for stage in range(sizes.pp_size)]
    names = [*dict.fromkeys(name for parts in every for name in parts if name != "total"), "total"]
    columns = [stage for stage in range(sizes.pp_size) if stage in (0, sizes.pp_size - 1) or every[stage] != every[stage - 1]]
    largest = max(parts["total"] for parts in every)
    unit, word = (GIB, "GiB") if largest >= GIB / 4 else (MIB, "MiB")
    width = max(map(len, names))
    head = "".join(f"{f'stage {stage}':>12}" for stage in columns) if sizes.pp_size > 1 else f"{'a device':>12}"
    lines = [f"{f'memory, {word}':<{width}}{head}"]
    for name in names:
        cells = "".join(f"{every[stage][name] / unit:>12.2f}" if name in every[stage] else f"{'-':>12}" for stage in columns)
        lines.append(f"{name:<{width}}{cells}")
    return lines


def _lines_of_time(sizes: RunSizes, machine: Machine) -> list[str]:
    time = step_time(sizes, machine)
    parts = ", ".join(f"{name} {1000 * value:,.1f}" for name, value in time.parts.items())
    return [
        f"step on {machine.words}: about {_seconds(time.seconds)}, {time.tokens_per_second:,.0f} tokens per second and device, "
        f"{100 * time.utilisation(machine):.0f} % of {machine.flops / 1e12:,.0f} TFLOP/s (an estimate: rows full, nothing overlapped)",
        f"  ms: {parts}",
    ]


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value >= 1 else f"{1000 * value:.0f} ms"


def _lines_of_verdict(sizes: RunSizes, machine: Machine) -> list[str]:
    needed = largest_estimate(sizes, machine.memory_bytes)[1]["total"]
    usable = f"{machine.usable_bytes / GIB:.1f} of {machine.memory_bytes / GIB:.1f} GiB (the rest: collectives, driver, fragmentation)"
    if needed <= machine.usable_bytes:
        return [f"fits: {needed / GIB:.1f} GiB of the usable {usable}"]
    singles, together = advise(sizes, machine)
    lines = [f"does NOT fit: {needed / GIB:.1f} GiB, usable {usable}; each change alone would give:"]
    lines += _lines_of_outcomes(singles, machine)
    if together is None:
        return [*lines, "no combination of these fits: take more devices, a shorter --seq-length, or a smaller model"]
    batch = "" if together.sizes.num_micro_batches == sizes.num_micro_batches else f" --global-batch-size {sizes.global_batch_size}"
    flags = merge_flags(together.flags) + batch
    return [
        *lines,
        f"take: {flags}",
        f"      {together.total_bytes / GIB:.1f} GiB, {_seconds(together.seconds)} a step",
    ]


def _lines_of_outcomes(outcomes: Sequence[Outcome], machine: Machine) -> list[str]:
    lines = []
    for one in sorted(outcomes, key=lambda outcome: outcome.total_bytes):
        verdict = "fits" if one.total_bytes <= machine.usable_bytes else "does not"
        lines.append(f"  {one.total_bytes / GIB:7.1f} GiB  {_seconds(one.seconds):>8}  {verdict:<8}  {one.flags}")
    return lines
