"""From a command line to a frozen config: one parser per command, built from the registry. The Namespace never leaves this file."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any, NoReturn

from mindspeed_lora import __version__
from mindspeed_lora.arguments.checks import check_paths, check_values
from mindspeed_lora.arguments.configs import InspectConfig
from mindspeed_lora.arguments.flag import ACCEPTED, ACTIVE, GROUPS, REFUSED, RUNS, Flag
from mindspeed_lora.arguments.help_texts import DESCRIPTIONS, EXAMPLES, GROUP_NOTES, USAGES
from mindspeed_lora.arguments.registry import CONFIGS, build_config, config_paths, explain_unknown, flags_of
from mindspeed_lora.arguments.values import ExplainedValueError
from mindspeed_lora.errors import UsageError

Given = list[tuple[Flag, Any]]


class _Record(argparse.Action):
    """Appends (flag, value) to the Namespace's ``given``, in the order of the command line; refuses what the registry refuses."""

    def __init__(self, *args: Any, flag: Flag, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.flag = flag

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        namespace.given.append((self.flag, value_of(self.flag, values)))


class _Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are UsageErrors."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; python {self.prog} --help lists the flags")


def _convert(flag: Flag, text: str) -> Any:
    """One value of a flag.

    Raises:
        UsageError: it breaks the type's rule, or is not among the choices.
    """
    assert flag.value is not None
    if text in flag.not_yet:
        raise UsageError(f"{flag.name} {text}: {flag.not_yet[text]}")
    try:
        value = flag.value.parse(text)
    except ValueError as error:
        detail = f" ({error})" if isinstance(error, ExplainedValueError) else ""
        raise UsageError(f"{flag.name} {text}: it must be {flag.value.rule}{detail}") from error
    if flag.choices and value not in flag.choices:
        near = difflib.get_close_matches(text, map(str, flag.choices), n=2, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? known are" if near else "use"
        raise UsageError(f"{flag.name} {text}: unknown value; {hint} {' or '.join(map(str, flag.choices))}")
    if flag.only and value not in flag.only:
        raise UsageError(f"{flag.name} {text}: {flag.otherwise}")
    return value


def value_of(flag: Flag, values: Any) -> Any:
    """The value of one occurrence of ``flag``: its constant, its one value, or the tuple of its values.

    Raises:
        UsageError: the flag is refused, or a value is.
    """
    if flag.status == REFUSED:
        given = f" {' '.join(values)}" if values else ""
        raise UsageError(f"{flag.name}{given}: {flag.reason}")
    if flag.value is None:
        return flag.const
    if flag.one_only and len(values) > 1:
        raise UsageError(f"{flag.name} {' '.join(values)}: {flag.one_only}")
    if flag.many:
        return tuple(_convert(flag, text) for text in values)
    return _convert(flag, values[0] if isinstance(values, list) else values)


def _nargs(flag: Flag) -> int | str | None:
    if flag.value is None:
        return 0
    if flag.status != ACTIVE:
        return "*" if flag.many or flag.status == REFUSED else None
    return "+" if flag.many or flag.one_only else None


def _default_text(flag: Flag, defaults: dict[str, Any]) -> str:
    if flag.required:
        return "required"
    if flag.default_text:
        return f"default: {flag.default_text}"
    default = defaults.get(flag.dest[0]) if flag.dest else None
    if flag.value is None or default is None or default is dataclasses.MISSING:
        return ""
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else f"{default:g}" if isinstance(default, float) else str(default)
    return f"default: {shown}" if shown else ""


def help_text(flag: Flag, defaults: dict[str, Any]) -> str:
    """The line of help: meaning, values, unit, default."""
    choices = f"one of {', '.join(map(str, flag.choices))}" if flag.choices and not flag.many else ""
    details = [choices, flag.unit and f"in {flag.unit}", _default_text(flag, defaults)]
    shown = "; ".join(detail for detail in details if detail)
    return f"{flag.help} ({shown})" if shown else flag.help


def _epilog(command: str) -> str:
    accepted = [flag.name for flag in flags_of(command).values() if flag.status == ACCEPTED]
    lines = [
        f"{len(accepted)} further flags of MindSpeed-LLM's scripts are accepted and have nothing to do here; docs/flags.md says why, "
        "flag by flag.",
        "",
        "examples:",
        *(f"  {example}" for example in EXAMPLES[command]),
    ]
    return "\n".join(lines)


@cache
def build_parser(command: str) -> argparse.ArgumentParser:
    """The parser of one command: groups in the order of GROUPS, no abbreviations."""
    parser = _Parser(
        prog=command,
        usage=USAGES[command],
        description=DESCRIPTIONS[command],
        epilog=_epilog(command),
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=44, width=120),
    )
    parser.add_argument("--version", action="version", version=f"mindspeed_lora {__version__}")
    defaults = config_paths(CONFIGS[command])
    for name in GROUPS:
        flags = [flag for flag in flags_of(command).values() if flag.group == name]
        group = parser.add_argument_group(name, GROUP_NOTES.get(name)) if flags else None
        for flag in flags:
            assert group is not None
            shown = help_text(flag, defaults).replace("%", "%%") if flag.status == ACTIVE else argparse.SUPPRESS
            options: dict[str, Any] = {"flag": flag, "action": _Record, "nargs": _nargs(flag), "help": shown, "default": argparse.SUPPRESS}
            if flag.value is not None:
                options["metavar"] = flag.value.metavar
            group.add_argument(flag.name, dest=argparse.SUPPRESS, **options)
    return parser


def _check_known(command: str, argv: Sequence[str]) -> None:
    """Raise UsageError at the first ``--flag`` that is none."""
    known = flags_of(command)
    for word in argv:
        name = word.split("=", 1)[0]
        if name.startswith("--") and len(name) > 2 and " " not in name and name not in known and name not in ("--help", "--version"):
            raise UsageError(explain_unknown(command, name))


def _collect(given: Given) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """Values by config path, the flag each came from, and notes on flags that were given twice (the last one counts).

    Raises:
        UsageError: two different flags contradict each other.
    """
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    last: dict[str, Any] = {}
    notes = []
    for flag, value in given:
        if flag.name in last and last[flag.name] != value:
            notes.append(f"{flag.name} was given twice, with {_shown(last[flag.name])} and {_shown(value)}: the last one counts")
        last[flag.name] = value
        for path in flag.dest:
            if path in values and values[path] != value and sources[path] != flag.name:
                raise UsageError(f"{sources[path]} and {flag.name} contradict each other; keep one of them")
            values[path], sources[path] = value, flag.name
    return values, sources, notes


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _accepted_notes(given: Given) -> list[str]:
    """One line per reason, naming the accepted flags it holds for."""
    by_reason: dict[str, list[str]] = {}
    for flag, _ in given:
        if flag.status == ACCEPTED and flag.name not in by_reason.setdefault(flag.reason, []):
            by_reason[flag.reason].append(flag.name)
    if not by_reason:
        return []
    return ["accepted flags that have nothing to do here:", *(f"  {' '.join(names)}: {reason}" for reason, names in by_reason.items())]


def _shown_path(value: Any) -> str:
    return str(value[0][1]) if isinstance(value, tuple) else str(value)


def _check_required(command: str, given: Given) -> None:
    present = {flag.name: value for flag, value in given}
    if "--lora-load" in present and command in RUNS and "--load" not in present:
        raise UsageError(
            f"--lora-load {_shown_path(present['--lora-load'])} without --load: an adapter needs its base model; add --load BASE"
        )
    missing = [flag for flag in flags_of(command).values() if flag.required and flag.name not in present]
    if missing:
        shown = "; ".join(f"{flag.name} ({flag.help})" for flag in missing)
        raise UsageError(f"{command} needs {shown}")


def _inspection(given: Given) -> InspectConfig:
    """``--inspect`` needs nothing else, and takes only ``--verify`` beside it.

    Raises:
        UsageError: another flag is there, or the folder is not.
    """
    others = [flag.name for flag, _ in given if flag.name not in ("--inspect", "--verify")]
    check_paths(given)
    if others:
        raise UsageError(f"--inspect writes nothing and takes no flag but --verify; leave out {' '.join(dict.fromkeys(others))}")
    values = _collect(given)[0]
    return InspectConfig(values["inspect"], values.get("verify", False))


def parse(command: str, argv: Sequence[str] | None = None) -> tuple[Any, list[str]]:
    """Parse ``argv`` (default: the process's own) into the command's frozen config.

    Returns the config (of the class in ``registry.CONFIGS``; InspectConfig with ``--inspect``) and notes for the log, one line each.

    Raises:
        UsageError: unknown, refused, missing or contradictory flags, a value that breaks its rule, a path that is not there.
        SystemExit: after ``--help`` or ``--version``.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    _check_known(command, argv)
    given: Given = []
    parser = build_parser(command)
    parser.parse_args(argv, namespace=argparse.Namespace(given=given))
    if any(path == "inspect" for flag, _ in given for path in flag.dest):
        return _inspection(given), []
    _check_required(command, given)
    values, sources, notes = _collect(given)
    check_paths(given)
    notes += check_values(command, values, sources)
    return build_config(CONFIGS[command], values), notes + _accepted_notes(given)
