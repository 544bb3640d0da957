"""Checks of ``inference.py``'s own flags: adapters with names, the two limits of an answer's length, prompts from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mindspeed_lora.arguments.configs import BASE
from mindspeed_lora.errors import UsageError


def check_asking(values: dict[str, Any], sources: dict[str, str]) -> list[str]:
    """Complete ``values`` (by path into the config, as ``sources``); returns notes for the log.

    Raises:
        UsageError: flags contradict each other.
    """
    _check_adapters(values, sources)
    _check_input_file(values)
    if values.get("max_length") is not None and values.get("max_new_tokens") is not None:
        del values["max_length"], sources["max_length"]
        return ["--max-length has no effect beside --max-new-tokens, which says how long an answer may be"]
    return []


def _check_adapters(values: dict[str, Any], sources: dict[str, str]) -> None:
    """One folder, or several with a name each; the first is ``--lora-load`` to everyone else."""
    adapters: tuple[tuple[str, Path], ...] = values.get("adapters", ())
    for name, folder in adapters:
        if not folder.is_dir():
            raise UsageError(f"--lora-load {f'{name}={folder}' if name else folder}: there is no such folder; give an adapter's folder")
    names = [name for name, _ in adapters]
    if len(adapters) > 1 and "" in names:
        raise UsageError("--lora-load with several adapters needs a name for each: --lora-load a=DIR b=DIR")
    if len(set(names)) < len(names) or BASE in names:
        twice = next(name for name in names if name == BASE or names.count(name) > 1)
        raise UsageError(f"--lora-load {twice}=...: names must differ, and {BASE} stands for no adapter; take another name")
    if adapters:
        values["load.lora_load"], sources["load.lora_load"] = adapters[0][1], "--lora-load"


def _check_input_file(values: dict[str, Any]) -> None:
    if "input_file" not in values:
        if "output_file" in values:
            raise UsageError(f"--output-file {values['output_file']} needs --input-file, the prompts to answer")
        return
    if "prompts" in values:
        raise UsageError("--prompt and --input-file both say what to ask; keep one of them")
    tasks = values.setdefault("tasks", ("greedy",))
    if len(tasks) > 1 or tasks == ("chat",):
        raise UsageError(
            f"--input-file is answered in one way; pass --task with one of greedy, do_sample, beam_search "
            f"and beam_search_with_sampling (found: {' '.join(tasks)})"
        )
    values.setdefault("output_file", values["input_file"].with_suffix(".answers.jsonl"))
