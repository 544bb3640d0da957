"""``--profile``: a trace of some steps on some ranks, for chrome://tracing or ui.perfetto.dev.

What the profiler records (operators, kernels, collectives) lies within named ranges of the step:

    forward and backward | reduce gradients | optimizer

so that a collective beside a product, on another stream of the device, shows as overlap. Iterations are counted as MindSpeed-LLM's
profiler counts them: from 1, ``--profile-step-start`` is the first to be traced, ``--profile-step-end`` the first that is not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mindspeed_lora.arguments.configs import ProfileFlags, TrainConfig
from mindspeed_lora.device import make_profiler, synchronize
from mindspeed_lora.errors import MindSpeedLoraError, UsageError
from mindspeed_lora.log import get_logger

ALL = -1  # of --profile-ranks and --profile-step-end: all ranks, to the run's end


def last_iteration(flags: ProfileFlags, train_iters: int) -> int:
    """The last iteration of the trace."""
    return train_iters if flags.step_end == ALL else flags.step_end - 1


def check_profile(config: TrainConfig, done: int, world_size: int) -> None:
    """Refuse a trace that would not come about; ``done``: iterations behind the run when it starts.

    Raises:
        UsageError: steps outside the run, or ranks outside the world.
    """
    flags = config.profile
    if flags is None:
        return
    first, last = flags.step_start, last_iteration(flags, config.train_iters)
    traced = f"--profile-step-start {first} and --profile-step-end {flags.step_end} trace iterations {first} to {last}"
    if first > last:
        raise UsageError(f"{traced}: there are none; --profile-step-end must be above --profile-step-start, or -1 for the run's end")
    if first <= done or last > config.train_iters:
        raise UsageError(f"{traced}, but this run makes iterations {done + 1} to {config.train_iters}; choose some of those")
    foreign = [rank for rank in flags.ranks if not ALL <= rank < world_size]
    if foreign:
        raise UsageError(f"--profile-ranks {foreign[0]}: there are ranks 0 to {world_size - 1}, and -1 for all of them")


@dataclass
class StepTrace:
    """Records iterations ``first`` to ``last`` of this rank and writes them to ``path``."""

    first: int
    last: int
    path: Path
    device: torch.device
    make: Callable[[], Any]
    profiler: Any = None

    def before(self, done: int) -> None:
        """``done`` iterations lie behind; start where the next is the first to be traced."""
        if done + 1 == self.first:
            self.profiler = self.make()
            self.profiler.start()

    def after(self, done: int) -> None:
        """Write the trace where iteration ``done`` was the last of it.

        Raises:
            MindSpeedLoraError: the file cannot be written.
        """
        if self.profiler is None or done != self.last:
            return
        synchronize(self.device)
        self.profiler.stop()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.profiler.export_chrome_trace(str(self.path))
        except (OSError, RuntimeError) as error:
            raise MindSpeedLoraError(f"--profile: {self.path} cannot be written ({error}); choose another --profile-save-path") from error
        self.profiler = None
        get_logger().info(f"trace of iterations {self.first} to {self.last}: {self.path} (open it in ui.perfetto.dev)")


def step_trace(config: TrainConfig, rank: int, device: torch.device) -> StepTrace | None:
    """The trace that this rank is to make, or None."""
    flags = config.profile
    if flags is None or (rank not in flags.ranks and ALL not in flags.ranks):
        return None
    first, last = flags.step_start, last_iteration(flags, config.train_iters)
    folder = flags.save_path or (config.save.save / "profile" if config.save.save else Path("profile_dir"))

    def make() -> Any:
        return make_profiler(device, flags.record_shapes, flags.with_memory, flags.with_stack)

    return StepTrace(first, last, folder / f"rank{rank}_iterations_{first}_to_{last}.json", device, make)
