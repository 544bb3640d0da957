"""The flag registry itself: unique, complete, and the page and help written from it."""

from __future__ import annotations

import dataclasses
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

from mindspeed_lora.arguments.flag import ACCEPTED, ACTIVE, COMMANDS, CONVERT, EVALUATE, GROUPS, INFER, REFUSED, RUNS
from mindspeed_lora.arguments.flags_page import flags_page
from mindspeed_lora.arguments.peer_names import DECLARED_NAMES, SCRIPT_NAMES
from mindspeed_lora.arguments.registry import CONFIGS, FLAGS, build_config, config_paths, flags_of

# Paths that decide an error, another config (InspectConfig) or that there is a group (profile), and then go.
CHECKED_ONLY = {"rope_scaling_type", "per_token_loss", "pairwise", "inspect", "profile"}
# Config fields that a command shares with others through its group, but cannot set.
WITHOUT_FLAG = {
    (CONVERT, "lora.fusion"),
    *((command, "lora.shared_experts") for command in (CONVERT, INFER, EVALUATE)),
    (INFER, "load.lora_load"),  # the first of --lora-load's adapters
    *((command, path) for command in (INFER, EVALUATE) for path in ("load.finetune", "load.load_optim", "load.load_rng")),
    *((command, "parallel.layers_per_virtual_stage") for command in (INFER, EVALUATE)),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_names_are_unique_and_every_destination_is_a_config_field(command: str) -> None:
    paths = config_paths(CONFIGS[command])
    for flag in flags_of(command).values():  # asserts uniqueness
        assert all(path in paths or path in CHECKED_ONLY for path in flag.dest), flag.name
        assert flag.name.startswith("--") and flag.group in GROUPS


@pytest.mark.parametrize("command", COMMANDS)
def test_every_config_field_has_a_flag(command: str) -> None:
    set_by_flags = {path for flag in flags_of(command).values() for path in flag.dest}
    missing = {(command, path) for path in config_paths(CONFIGS[command])} - {(command, path) for path in set_by_flags}
    assert missing == {pair for pair in WITHOUT_FLAG if pair[0] == command}


@pytest.mark.parametrize("command", COMMANDS)
def test_required_flags_are_the_fields_without_default(command: str) -> None:
    for path, default in config_paths(CONFIGS[command]).items():
        if default is dataclasses.MISSING:
            assert any(flag.required and path in flag.dest for flag in flags_of(command).values()), path


def test_each_status_has_what_it_needs() -> None:
    for flag in FLAGS:
        if flag.status == ACTIVE:
            assert flag.dest and flag.help and flag.group != "peer" and not flag.reason, flag.name
        else:
            assert flag.status in (ACCEPTED, REFUSED) and len(flag.reason) > 10, flag.name
        assert bool(flag.only) == bool(flag.otherwise), flag.name
        assert flag.value is not None or not (flag.choices or flag.not_yet or flag.only or flag.many), flag.name


def test_all_script_flags_of_the_peer_are_registered() -> None:
    registered = {flag.name for flag in FLAGS}
    assert len(SCRIPT_NAMES) == 278 and not [name for name in SCRIPT_NAMES if f"--{name}" not in registered]
    assert not set(SCRIPT_NAMES) & set(DECLARED_NAMES)


def test_an_optional_group_without_values_is_none() -> None:
    path = Path("x")
    required = {"load_model_type": "hf", "save_model_type": "mg", "load_dir": path, "save_dir": path}
    assert build_config(CONFIGS[CONVERT], required).lora is None
    assert build_config(CONFIGS[CONVERT], {**required, "lora.r": 4}).lora.r == 4


def test_flags_page_is_up_to_date() -> None:
    assert (ROOT / "docs" / "flags.md").read_text(encoding="utf-8") == flags_page(), (
        "run: python -m mindspeed_lora.arguments.flags_page docs/flags.md"
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_fast_complete_and_without_torch(command: str) -> None:
    script = f"import sys, runpy; sys.argv = ['{command}', '--help']\ntry:\n  runpy.run_path('{command}', run_name='__main__')\n"
    script += "except SystemExit as done:\n  assert done.code == 0\nassert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 1.0  # seconds; 0.1 measured
    listed = {line.split()[0] for line in done.stdout.splitlines() if line.startswith("  --")}
    for flag in flags_of(command).values():
        assert (flag.name in listed) == (flag.status == ACTIVE), flag.name
    assert done.stdout.count(f"{command} --") >= 3  # usage and two examples
    if command in RUNS:
        assert "torchrun" in done.stdout


def test_version() -> None:
    done = subprocess.run([sys.executable, CONVERT, "--version"], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0 and done.stdout.startswith("mindspeed_lora ")
