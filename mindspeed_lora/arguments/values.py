"""How the text of one flag becomes a value: each type says its rule once, for errors, help and the page of flags."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class ExplainedValueError(ValueError):
    """A value breaks its rule, and the text says where."""


@dataclass(frozen=True)
class ValueType:
    """A kind of value. ``parse`` raises ValueError where the text breaks ``rule``."""

    metavar: str
    rule: str
    parse: Callable[[str], Any]


def _whole_number(minimum: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise ValueError(text)
        return value

    return parse


def _number(accepts: Callable[[float], bool]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = float(text)
        if not math.isfinite(value) or not accepts(value):
            raise ValueError(text)
        return value

    return parse


def _text(text: str) -> str:
    if not text.strip():
        raise ValueError(text)
    return text


def _path(text: str) -> Path:
    return Path(_text(text)).expanduser()


def _split(text: str) -> tuple[float, float, float]:
    shares = [float(part) for part in text.replace("/", ",").split(",") if part.strip()]
    shares += [0.0] * (3 - len(shares))
    if len(shares) != 3 or not all(math.isfinite(share) and share >= 0 for share in shares) or shares[0] <= 0:
        raise ValueError(text)
    return shares[0], shares[1], shares[2]


def _numbers(minimum: int) -> Callable[[str], tuple[int, ...]]:
    def parse(text: str) -> tuple[int, ...]:
        return tuple(_whole_number(minimum)(part) for part in text.split(","))

    return parse


def _layer_pattern(text: str) -> int | tuple[int, ...]:
    """``2``, ``-1``, or a list such as ``[0,1,1]`` or ``([0]*3+[1]*58)``, as Megatron writes it."""
    if re.fullmatch(r"-?\d+", text):
        return int(text)
    pattern: list[int] = []
    for part in text.replace(" ", "").removeprefix("(").removesuffix(")").split("+"):
        found = re.fullmatch(r"\[([01](?:,[01])*)\](?:\*(\d+))?", part)
        if found is None:
            raise ValueError(text)
        pattern += [int(flag) for flag in found[1].split(",")] * int(found[2] or 1)
    return tuple(pattern)


def _probabilities(text: str) -> tuple[float, ...]:
    return tuple(_number(lambda value: 0 < value <= 1)(part) for part in text.split(","))


def _json_object(text: str) -> dict[str, object]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ExplainedValueError(f"not JSON at line {error.lineno} column {error.colno}: {error.msg}") from error
    if not isinstance(value, dict):
        raise ExplainedValueError(f"JSON, but {type(value).__name__} where an object is needed")
    return value


def _named_path(text: str) -> tuple[str, Path]:
    """``a=DIR`` or ``DIR`` (a folder with ``=`` in its name: ``./a=b``)."""
    name, equals, folder = text.partition("=")
    if not equals or "/" in name:
        return "", _path(text)
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
        raise ValueError(text)
    return name, _path(folder)


COUNT = ValueType("N", "a whole number of at least 1", _whole_number(1))
COUNT_OR_ZERO = ValueType("N", "a whole number of at least 0", _whole_number(0))
WHOLE = ValueType("N", "a whole number", _whole_number(-(2**63)))
COUNTS = ValueType("N,N,..", "whole numbers of at least 1, with commas between them", _numbers(1))
NUMBERS = ValueType("N,N,..", "whole numbers of at least 0, with commas between them", _numbers(0))
POSITIVE = ValueType("X", "a number above 0", _number(lambda value: value > 0))
NOT_NEGATIVE = ValueType("X", "a number of at least 0", _number(lambda value: value >= 0))
NUMBER = ValueType("X", "a number", _number(lambda value: True))
FRACTION = ValueType("X", "a number from 0 to 1", _number(lambda value: 0 <= value <= 1))
SHARE = ValueType("X", "a number above 0 and at most 1", _number(lambda value: 0 < value <= 1))
BELOW_HALF = ValueType("X", "a number from 0 to below 0.5", _number(lambda value: 0 <= value < 0.5))
DECAY = ValueType("X", "a number from 0 to below 1", _number(lambda value: 0 <= value < 1))
TEXT = ValueType("TEXT", "a text that is not empty", _text)
RAW_TEXT = ValueType("TEXT", "any text", str)
NAMED_PATH = ValueType("[NAME=]PATH", "a path, or NAME=PATH with a name of letters, digits, dots and dashes", _named_path)
PATH = ValueType("PATH", "a path", _path)
PROBABILITIES = ValueType("P,P,..", "numbers above 0 and at most 1, with commas between them, such as 0.7,0.3", _probabilities)
SPLIT = ValueType("A,B,C", "three shares (train, validation, test) of at least 0, the first above 0, such as 100,0,0", _split)
LAYER_PATTERN = ValueType("N", "a whole number, or ones and zeros by layer such as [0]*3+[1]*58", _layer_pattern)
JSON_OBJECT = ValueType("JSON", 'a JSON object such as {"prompt": "question", "response": "answer"}', _json_object)
