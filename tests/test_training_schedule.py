"""Megatron's schedule: values at the corners, in samples."""

from __future__ import annotations

import dataclasses
import math

import pytest

from mindspeed_lora.arguments.configs import OptimizerFlags
from mindspeed_lora.errors import UsageError
from mindspeed_lora.training.schedule import build_schedule

FLAGS = OptimizerFlags(lr=1e-3, min_lr=1e-4)


def test_warm_up_is_linear_from_its_initial_rate() -> None:
    schedule = build_schedule(dataclasses.replace(FLAGS, lr_warmup_iters=4, lr_warmup_init=2e-4), 20, 8)
    assert [schedule.at(8 * step) for step in range(5)] == pytest.approx([2e-4, 4e-4, 6e-4, 8e-4, 1e-3])


def test_warm_up_fraction_counts_decay_iterations() -> None:
    schedule = build_schedule(dataclasses.replace(FLAGS, lr_warmup_fraction=0.1, lr_decay_iters=40), 20, 2)
    assert schedule.warmup_samples == pytest.approx(8)
    assert schedule.at(4) == pytest.approx(0.5e-3)


@pytest.mark.parametrize("style", ["linear", "cosine", "constant"])
def test_decay(style: str) -> None:
    schedule = build_schedule(dataclasses.replace(FLAGS, lr_decay_style=style), 10, 4)
    quarter = {"linear": 0.75, "cosine": 0.5 * (1 + math.cos(math.pi / 4)), "constant": 1.0}[style]
    assert schedule.at(0) == pytest.approx(1e-3)
    assert schedule.at(10) == pytest.approx(1e-4 + quarter * 9e-4)
    assert schedule.at(40) == pytest.approx(1e-3 if style == "constant" else 1e-4)
    assert schedule.at(400) == pytest.approx(1e-3 if style == "constant" else 1e-4)


def test_decay_starts_after_warm_up() -> None:
    schedule = build_schedule(dataclasses.replace(FLAGS, lr_warmup_iters=5), 10, 1)
    assert schedule.at(5) == pytest.approx(1e-3)
    assert schedule.at(7) == pytest.approx(1e-4 + 0.6 * 9e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr_decay_style": "wavy"}, "--lr-decay-style wavy"),
        ({"lr_warmup_fraction": 0.1, "lr_warmup_iters": 3}, "--lr-warmup-fraction"),
        ({"lr_warmup_iters": 10}, "--lr-decay-iters 10"),
        ({"min_lr": 1.0}, "--min-lr"),
        ({"lr_decay_iters": 0}, "--lr-decay-iters 0"),
    ],
)
def test_refusals(change: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_schedule(dataclasses.replace(FLAGS, **change), 10, 1)  # type: ignore[arg-type]
