"""The factor of the loss in fp16, which keeps gradients between 6e-8, where fp16 has nothing, and 65504, where it ends.

Megatron's rules; w = ``--loss-scale-window``, h = ``--hysteresis``, patience starts at h, good at 0::

    every gradient finite   good + 1;  at w:  scale x 2, good = 0, patience = h
    an overflow anywhere    good = 0,  patience - 1;  at 0 and below:  scale = max(scale / 2, --min-loss-scale)

Patience returns with growth only: after the first halving every further overflow halves at once. ``--loss-scale`` keeps one value.
Megatron goes on for ever where no smaller scale is left; here it ends after :data:`MOST_OVERFLOWS` steps in a row that train nothing.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from mindspeed_lora.arguments.configs import LossScaleFlags
from mindspeed_lora.errors import CheckpointError, MindSpeedLoraError

GROWTH, BACKOFF = 2.0, 0.5
MOST_OVERFLOWS = 100


class LossScaler:
    """The scale of the next step, and what decides when it changes."""

    def __init__(self, flags: LossScaleFlags) -> None:
        self.flags = flags
        self.scale = flags.initial if flags.constant is None else flags.constant
        self.good_steps, self.patience = 0, flags.hysteresis
        self._in_vain = 0  # overflows in a row at the smallest scale

    @property
    def at_minimum(self) -> bool:
        """Whether no overflow makes the scale smaller."""
        return self.flags.constant is not None or self.scale <= self.flags.minimum

    def update(self, overflow: bool) -> None:
        """Go on to the next step's scale.

        Raises:
            MindSpeedLoraError: too many overflows in a row, and the scale cannot become smaller.
        """
        self._in_vain = self._in_vain + 1 if overflow and self.at_minimum else 0
        if self._in_vain >= MOST_OVERFLOWS:
            flag = "--min-loss-scale" if self.flags.constant is None else "--loss-scale"
            raise MindSpeedLoraError(
                f"{self._in_vain} steps in a row overflowed in fp16 at loss scale {self.scale:g}, and {flag} allows no smaller one: "
                f"nothing is trained. Train with --bf16 or in fp32, or pass a smaller {flag}"
            )
        if self.flags.constant is not None:
            return
        if overflow:
            self.good_steps, self.patience = 0, self.patience - 1
            if self.patience <= 0:
                self.scale = max(self.scale * BACKOFF, self.flags.minimum)
            return
        self.good_steps += 1
        if self.good_steps >= self.flags.window:
            self.scale, self.good_steps, self.patience = self.scale * GROWTH, 0, self.flags.hysteresis

    def record(self) -> dict[str, float]:
        """What a continued run needs."""
        return {"scale": self.scale, "good_steps": self.good_steps, "patience": self.patience}

    def restore(self, record: dict[str, Any] | None, folder: Path) -> None:
        """Go on from ``record``, of the training state in ``folder``; None: of a run that had no scale. A constant scale is the flag's.

        Raises:
            CheckpointError: it is no record of a scale.
        """
        if record is None or self.flags.constant is not None:
            return
        try:
            scale, good_steps, patience = float(record["scale"]), int(record["good_steps"]), int(record["patience"])
        except (KeyError, TypeError, ValueError):
            scale, good_steps, patience = math.nan, 0, 0
        if not (math.isfinite(scale) and scale > 0):
            raise CheckpointError(
                f"{folder}: {record} is no loss scale (a number above 0, with good_steps and patience); "
                "pass --no-load-optim to start at --initial-loss-scale"
            )
        self.scale, self.good_steps, self.patience = scale, good_steps, patience


def build_scaler(flags: LossScaleFlags, dtype: torch.dtype) -> LossScaler | None:
    """None: ``dtype`` has the range of fp32 and needs no scale."""
    return LossScaler(flags) if dtype == torch.float16 else None
