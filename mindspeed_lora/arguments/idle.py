"""Flags of ``posttrain_gpt.py`` that change nothing beside the others, which is said once in the log."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Values = dict[str, Any]


def idle_notes(values: Values, sources: dict[str, str]) -> list[str]:
    """A note for each reason, naming the flags it holds for; ``values`` and ``sources`` as :func:`.checks.check_values` has them."""
    return [
        f"{' '.join(flags)}: {reason}, so there is nothing for it to do"
        for paths, reason in _rules(values)
        if (flags := [sources[path] for path in paths if path in values])
    ]


def _rules(values: Values) -> Iterator[tuple[tuple[str, ...], str]]:
    """Config paths, and why a value of theirs is not looked at in this run."""
    yield ("architecture.max_position_embeddings",), "training is bounded by --seq-length alone"
    if values.get("data.padding_free"):
        yield ("data.pad_to_seq_length",), "--padding-free pads nothing"
    elif values.get("data.pad_to_seq_length", True):
        yield ("data.pad_to_multiple_of",), "rows are padded to --seq-length, where --no-pad-to-seq-lengths is not passed"
    if values.get("optimizer.lr_decay_style") == "constant":
        length = () if values.get("optimizer.lr_warmup_fraction") else ("optimizer.lr_decay_iters",)
        yield ("optimizer.min_lr", *length), "--lr-decay-style constant decays nothing"
    if not values.get("optimizer.lr_warmup_fraction") and not values.get("optimizer.lr_warmup_iters"):
        yield ("optimizer.lr_warmup_init",), "there is no warm-up"
    if values.get("eval_iters") == 0:
        yield ("eval_interval",), "--eval-iters 0 validates nothing"
    if values.get("parallel.pipeline_parallel_size", 1) == 1:
        yield ("pipeline_buffer_fraction",), "there is one pipeline stage"
    if "save.save" not in values:
        yield ("save.save_optim", "save.save_rng", "save.lora_ckpt_filter"), "nothing is saved"
