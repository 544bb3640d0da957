"""Writes ``docs/flags.md`` from the registry: ``python -m mindspeed_lora.arguments.flags_page docs/flags.md``."""

from __future__ import annotations

import sys
from pathlib import Path

from mindspeed_lora.arguments.flag import ACCEPTED, ACTIVE, COMMANDS, GROUPS, REFUSED, Flag
from mindspeed_lora.arguments.help_texts import DESCRIPTIONS, GROUP_NOTES
from mindspeed_lora.arguments.parser import help_text
from mindspeed_lora.arguments.peer_names import DECLARED_NAMES, SCRIPT_NAMES
from mindspeed_lora.arguments.registry import CONFIGS, FLAGS, config_paths, flags_of
from mindspeed_lora.files import write_text

INTRODUCTION = f"""# Flags

This page is written from the flag registry (`mindspeed_lora/arguments/`) by
`python -m mindspeed_lora.arguments.flags_page docs/flags.md`; a test compares them.

- *Active*: the flag does something.
- *Accepted*: MindSpeed-LLM's scripts pass it, it is valid, and there is nothing to do here, for the reason given; the log says so.
- *Refused*: it would change the result and is not supported, for the reason given.

The {len(SCRIPT_NAMES)} flags that MindSpeed-LLM's example scripts pass are all here. A further {len(DECLARED_NAMES)} that its parsers
declare are known by name: the error says that they are not supported. Anything else is a misspelling: the error says the
nearest name. There are no abbreviations. Every error of the command line has exit code 2.

A flag given twice: the last one counts, and the log says so.
Two flags that contradict each other (`--bf16 --params-dtype fp32`) are an error.
"""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _usage(flag: Flag) -> str:
    if flag.value is None:
        return f"`{flag.name}`"
    return f"`{flag.name} {flag.value.metavar}{' ...' if flag.many else ''}`"


def _active_section(command: str) -> list[str]:
    defaults = config_paths(CONFIGS[command])
    lines = [f"## {command}", "", DESCRIPTIONS[command], ""]
    for group in GROUPS:
        flags = [flag for flag in flags_of(command).values() if flag.group == group and flag.status == ACTIVE]
        if not flags:
            continue
        note = f": {GROUP_NOTES[group]}" if group in GROUP_NOTES else ""
        lines += [f"**{group.capitalize()}**{note}", "", "| flag | meaning |", "|---|---|"]
        lines += [f"| {_usage(flag)} | {_cell(help_text(flag, defaults))} |" for flag in flags]
        lines.append("")
        for flag in flags:
            later: dict[str, list[str]] = {}
            for value, sentence in flag.not_yet.items():
                later.setdefault(sentence.removeprefix(f"{value} "), []).append(f"`{value}`")
            lines += [f"`{flag.name}` refuses {', '.join(values)}: {sentence}.\n" for sentence, values in later.items()]
    return lines


def _commands(flag: Flag) -> str:
    return ", ".join(name.removesuffix(".py") for name in COMMANDS if name in flag.commands)


def _only(flag: Flag) -> str:
    """The values an accepted flag may have, and what the others get."""
    if not flag.only:
        return ""
    values = ", ".join(f"`{value:g}`" if isinstance(value, float) else f"`{value}`" for value in flag.only)
    return f" (only {values}; else: {flag.otherwise})"


def _peer_section(status: str, title: str) -> list[str]:
    lines = [f"## {title}", "", "| flag | commands | reason |", "|---|---|---|"]
    for flag in sorted((flag for flag in FLAGS if flag.status == status), key=lambda flag: flag.name):
        lines.append(f"| {_usage(flag)} | {_commands(flag)} | {_cell(flag.reason + _only(flag))} |")
    return [*lines, ""]


def flags_page() -> str:
    """The page as Markdown."""
    lines = [INTRODUCTION]
    for command in COMMANDS:
        lines += _active_section(command)
    lines += _peer_section(ACCEPTED, "Accepted, nothing to do")
    lines += _peer_section(REFUSED, "Refused")
    return "\n".join(lines).rstrip("\n") + "\n"


if __name__ == "__main__":
    write_text(Path(sys.argv[1]), flags_page())
