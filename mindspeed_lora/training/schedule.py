"""Megatron's learning-rate schedule, counted in samples.

Linear warm-up from ``lr_warmup_init`` to ``lr``, then constant, linear or cosine down to ``min_lr``, which holds after
``lr_decay_iters``. The first step runs at the rate of 0 samples, the logged rate is the one after the step, as in
Megatron (``megatron/core/optimizer_param_scheduler.py`` of core_v0.12.1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mindspeed_lora.arguments.configs import OptimizerFlags
from mindspeed_lora.errors import UsageError

STYLES = ("linear", "cosine", "constant")


@dataclass(frozen=True)
class LearningRateSchedule:
    """Learning rate as a function of the samples consumed by successful steps."""

    lr: float
    min_lr: float
    warmup_init: float
    warmup_samples: float
    decay_samples: int
    style: str

    def at(self, samples: int) -> float:
        """The rate after ``samples`` samples."""
        if self.warmup_samples > 0 and samples <= self.warmup_samples:
            return self.warmup_init + (self.lr - self.warmup_init) * samples / self.warmup_samples
        if self.style == "constant":
            return self.lr
        if samples > self.decay_samples:
            return self.min_lr
        ratio = (samples - self.warmup_samples) / (self.decay_samples - self.warmup_samples)
        share = 1.0 - ratio if self.style == "linear" else 0.5 * (math.cos(math.pi * ratio) + 1.0)
        return self.min_lr + share * (self.lr - self.min_lr)


def build_schedule(flags: OptimizerFlags, train_iters: int, global_batch_size: int) -> LearningRateSchedule:
    """Resolve iterations and fractions into samples.

    Raises:
        UsageError: unknown style, both kinds of warm-up, rates or lengths out of order.
    """
    decay_iters = flags.lr_decay_iters if flags.lr_decay_iters is not None else train_iters
    if flags.lr_decay_style not in STYLES:
        raise UsageError(f"--lr-decay-style {flags.lr_decay_style} is unknown; use one of {', '.join(STYLES)}")
    if flags.lr_warmup_fraction is not None and flags.lr_warmup_iters:
        raise UsageError(
            f"--lr-warmup-fraction {flags.lr_warmup_fraction} and --lr-warmup-iters {flags.lr_warmup_iters} "
            "both say the length of the warm-up; pass one"
        )
    if decay_iters <= 0:
        raise UsageError(f"--lr-decay-iters {decay_iters} (default: --train-iters) must be at least 1")
    if not 0.0 <= flags.min_lr <= flags.lr:
        raise UsageError(f"--min-lr {flags.min_lr} must lie between 0 and --lr {flags.lr}")
    fraction = flags.lr_warmup_fraction
    warmup_iters = float(flags.lr_warmup_iters) if fraction is None else fraction * decay_iters
    if not 0.0 <= warmup_iters < decay_iters:
        raise UsageError(
            f"the warm-up takes {warmup_iters:g} iterations, but must be shorter than "
            f"--lr-decay-iters {decay_iters} (default: --train-iters)"
        )
    return LearningRateSchedule(
        lr=flags.lr,
        min_lr=flags.min_lr,
        warmup_init=flags.lr_warmup_init,
        warmup_samples=warmup_iters * global_batch_size,
        decay_samples=decay_iters * global_batch_size,
        style=flags.lr_decay_style,
    )
