"""One row of the flag registry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mindspeed_lora.arguments.values import ValueType

TRAIN, INFER, EVALUATE = "posttrain_gpt.py", "inference.py", "evaluation.py"
PREPROCESS, CONVERT = "preprocess_data.py", "convert_ckpt.py"
COMMANDS = (CONVERT, PREPROCESS, TRAIN, INFER, EVALUATE)
RUNS = (TRAIN, INFER, EVALUATE)  # the commands that run a model, under torchrun

ACTIVE, ACCEPTED, REFUSED = "active", "accepted", "refused"

GROUPS = (
    "files",
    "model",
    "experts and latent attention",
    "layout",
    "data",
    "template",
    "prompts and answers",
    "score",
    "lora",
    "preference pairs",
    "batch and length",
    "optimizer and schedule",
    "evaluation while training",
    "saving and logging",
    "memory",
    "device and dtype",
    "peer",
)
"""Groups in the order in which a user thinks; "peer" holds what is only there for MindSpeed-LLM's scripts."""


@dataclass(frozen=True)
class Flag:
    """A flag of some commands; one name may have several rows, for different commands.

    ``value`` None: a switch that stores ``const``. ``many``: one or more values, stored as a tuple.
    ``dest``: paths into the command's config, such as ``optimizer.lr``; their default is the config field's own.
    ``status``: *active*; *accepted*: valid, but ``reason`` says why there is nothing to do; *refused*: ``reason`` says why and
    what to use. ``only``: the values that an accepted flag may have (others get ``otherwise``).
    ``must_exist``: "folder", "file" or "any": checked right after parsing. ``one_only``: the sentence for more than one value, where
    MindSpeed-LLM takes several.
    ``choices``: the values of an active flag; ``not_yet``: further known values and the sentence that refuses each.
    """

    name: str
    commands: tuple[str, ...]
    group: str
    help: str = ""
    value: ValueType | None = None
    dest: tuple[str, ...] = ()
    const: Any = True
    many: bool = False
    unit: str = ""
    default_text: str = ""  # shown where the config's default does not say it
    choices: tuple[Any, ...] = ()
    not_yet: Mapping[str, str] = field(default_factory=dict)
    only: tuple[Any, ...] = ()
    otherwise: str = ""
    required: bool = False
    must_exist: str = ""
    one_only: str = ""
    status: str = ACTIVE
    reason: str = ""


def active(
    name: str,
    commands: tuple[str, ...],
    group: str,
    help: str,
    value: ValueType | None = None,
    dest: str | tuple[str, ...] = (),
    **more: Any,
) -> Flag:
    """A flag that does something; ``dest`` may be one path."""
    return Flag(name, commands, group, help, value, (dest,) if isinstance(dest, str) else dest, **more)


def accepted(names: str, commands: tuple[str, ...], reason: str, value: ValueType | None = None, **more: Any) -> list[Flag]:
    """Several flags (names separated by blanks) that are valid and have nothing to do here, for one reason."""
    return [Flag(f"--{name}", commands, "peer", value=value, status=ACCEPTED, reason=reason, **more) for name in names.split()]


def refused(names: str, commands: tuple[str, ...], reason: str, value: ValueType | None = None, **more: Any) -> list[Flag]:
    """Several flags (names separated by blanks) that are known and refused with one sentence."""
    return [Flag(f"--{name}", commands, "peer", value=value, status=REFUSED, reason=reason, **more) for name in names.split()]
