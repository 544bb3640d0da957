"""The flag registry: every flag of the five commands, once. Parsers, ``--help``, validation and ``docs/flags.md`` come from it."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from functools import cache
from typing import Any

from mindspeed_lora.arguments import (
    flags_asking,
    flags_experts,
    flags_fp16,
    flags_model,
    flags_peer,
    flags_refused,
    flags_tools,
    flags_training,
)
from mindspeed_lora.arguments.configs import ConvertConfig, EvaluationConfig, InferenceConfig, PreprocessConfig, TrainConfig
from mindspeed_lora.arguments.flag import CONVERT, EVALUATE, INFER, PREPROCESS, TRAIN, Flag
from mindspeed_lora.arguments.peer_names import PEER_NAMES

CONFIGS: dict[str, type] = {
    CONVERT: ConvertConfig,
    PREPROCESS: PreprocessConfig,
    TRAIN: TrainConfig,
    INFER: InferenceConfig,
    EVALUATE: EvaluationConfig,
}
"""What each command's command line becomes."""

FLAGS: tuple[Flag, ...] = (
    *flags_tools.FLAGS,
    *flags_model.FLAGS,
    *flags_experts.FLAGS,
    *flags_fp16.FLAGS,
    *flags_training.FLAGS,
    *flags_asking.FLAGS,
    *flags_peer.FLAGS,
    *flags_refused.FLAGS,
)


@cache
def flags_of(command: str) -> dict[str, Flag]:
    """The command's flags by name, dashes included.

    Raises:
        AssertionError: two rows of the registry claim one name for one command (our mistake; a test looks for it).
    """
    flags: dict[str, Flag] = {}
    for flag in FLAGS:
        if command in flag.commands:
            assert flag.name not in flags, f"{flag.name} is twice in the registry for {command}"
            flags[flag.name] = flag
    return flags


@cache
def _nested(config: type) -> dict[str, type | None]:
    """Fields of a config class: the dataclass each holds (also where it may be None), or None for a plain value."""
    hints = typing.get_type_hints(config)
    found: dict[str, type | None] = {}
    for field in dataclasses.fields(config):
        kinds = [hints[field.name], *typing.get_args(hints[field.name])]
        found[field.name] = next((kind for kind in kinds if dataclasses.is_dataclass(kind) and isinstance(kind, type)), None)
    return found


def config_paths(config: type, prefix: str = "") -> dict[str, Any]:
    """Every plain field of a config class, nested ones as ``group.field``, with its default (``dataclasses.MISSING``: none)."""
    paths: dict[str, Any] = {}
    nested = _nested(config)
    for field in dataclasses.fields(config):
        inner = nested[field.name]
        if inner is not None:
            paths.update(config_paths(inner, f"{prefix}{field.name}."))
            continue
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        paths[prefix + field.name] = default
    return paths


def build_config(config: type, values: dict[str, Any], prefix: str = "") -> Any:
    """Make the frozen config from ``values`` by path; an optional group (``lora``) without any value becomes None."""
    arguments: dict[str, Any] = {}
    hints = typing.get_type_hints(config)
    for name, inner in _nested(config).items():
        path = prefix + name
        if inner is None:
            if path in values:
                arguments[name] = values[path]
        elif type(None) not in typing.get_args(hints[name]) or any(key.startswith(path + ".") for key in values) or path in values:
            arguments[name] = build_config(inner, values, path + ".")
    return config(**arguments)


def explain_unknown(command: str, name: str) -> str:
    """Why ``name`` is no flag of ``command``: another command's, MindSpeed-LLM's only, or misspelt (with the nearest name)."""
    others = [other for other in CONFIGS if other != command and name in flags_of(other) and flags_of(other)[name].status != "refused"]
    if others:
        return f"{name} is a flag of {', '.join(others)}, not of {command}{_nearest(command, name)}"
    if name in PEER_NAMES:
        return f"{name} is known to MindSpeed-LLM, but not supported here; leave it out (docs/flags.md lists what {command} takes)"
    return f"{name} is no flag of {command}{_nearest(command, name) or f'; python {command} --help lists its flags'}"


def _nearest(command: str, name: str) -> str:
    candidates = [flag.name for flag in flags_of(command).values() if flag.status != "refused"] + ["--help", "--version"]
    close = difflib.get_close_matches(name.replace("_", "-"), candidates, n=1, cutoff=0.7)
    return f"; did you mean {close[0]}?" if close else ""
