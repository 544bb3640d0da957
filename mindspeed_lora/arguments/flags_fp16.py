"""Flags of half precision: the dtype, and the factor of the loss that its training needs."""

from __future__ import annotations

from mindspeed_lora.arguments.flag import EVALUATE, INFER, RUNS, TRAIN, Flag, accepted, active
from mindspeed_lora.arguments.values import COUNT, POSITIVE

T, GROUP = (TRAIN,), "device and dtype"

FLAGS: list[Flag] = [
    active("--fp16", RUNS, GROUP, "compute in float16; training scales the loss", None, "runtime.params_dtype", const="fp16"),
    active(
        "--loss-scale",
        T,
        GROUP,
        "with --fp16: one constant factor of the loss; a power of 2 loses nothing",
        POSITIVE,
        "loss_scale.constant",
        default_text="a scale that adapts itself",
    ),
    active(
        "--initial-loss-scale", T, GROUP, "with --fp16: the scale of the first step", POSITIVE, "loss_scale.initial", default_text="2^32"
    ),
    active("--min-loss-scale", T, GROUP, "with --fp16: the scale goes no lower", POSITIVE, "loss_scale.minimum"),
    active(
        "--loss-scale-window",
        T,
        GROUP,
        "with --fp16: the scale doubles after so many steps without an overflow",
        COUNT,
        "loss_scale.window",
        unit="steps",
    ),
    active(
        "--hysteresis",
        T,
        GROUP,
        "with --fp16: the overflows since the scale last grew from which on it halves",
        COUNT,
        "loss_scale.hysteresis",
    ),
    *accepted("loss-scale initial-loss-scale min-loss-scale", (INFER, EVALUATE), "it belongs to training", POSITIVE),
    *accepted("loss-scale-window hysteresis", (INFER, EVALUATE), "it belongs to training", COUNT),
]
