"""What every entry point does around its verb: exit codes, one message, notes, ranks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import ROOT

from mindspeed_lora.arguments import cli
from mindspeed_lora.arguments.flag import COMMANDS, INFER
from mindspeed_lora.errors import CheckpointError, UsageError


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Replaces the verb by one that records its config, and raises ``error`` where it is set."""
    record = SimpleNamespace(config=None, error=None, result=0, shutdowns=0)

    def run(config: Any) -> int:
        record.config = config
        if record.error is not None:
            raise record.error
        return int(record.result)

    monkeypatch.setattr(cli, "_load_verb", lambda command: run)
    monkeypatch.setattr(cli, "OTHER_RANKS_WAIT_S", 0.0)
    monkeypatch.delenv("RANK", raising=False)

    def shutdown() -> None:
        record.shutdowns += 1

    monkeypatch.setattr(cli, "_shutdown", shutdown)
    return record


def test_a_good_run_calls_the_verb_and_logs_the_notes(verb: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[str] = []
    monkeypatch.setattr(cli, "configure_logging", lambda rank: SimpleNamespace(info=logged.append, warning=logged.append))
    assert cli.main(INFER, ["--load", str(tmp_path), "--use-mcore-models"]) == 0
    assert verb.config.load.load == tmp_path and verb.shutdowns == 1
    assert "  --use-mcore-models: there is one implementation of the model here" in logged
    verb.result = 3
    assert cli.main(INFER, ["--load", str(tmp_path)]) == 3


@pytest.mark.parametrize(("error", "code"), [(UsageError("--x is wrong"), 2), (CheckpointError("y is torn"), 1)])
def test_errors_become_one_message_and_an_exit_code(
    error: Exception, code: int, verb: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verb.error = error
    assert cli.main(INFER, ["--load", str(tmp_path)]) == code
    assert capsys.readouterr().err == f"error: {error}\n" and verb.shutdowns == 1


def test_another_rank_waits_and_then_says_who_it_is(
    verb: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    verb.error = CheckpointError("y is torn")
    assert cli.main(INFER, ["--load", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "[rank 3] error: y is torn\n" and len(waited) == 1


def test_an_interrupt_is_a_line_and_130(verb: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verb.error = KeyboardInterrupt()
    assert cli.main(INFER, ["--load", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "interrupted\n" and verb.shutdowns == 1


def test_our_own_mistakes_keep_their_traceback(verb: SimpleNamespace, tmp_path: Path) -> None:
    verb.error = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        cli.main(INFER, ["--load", str(tmp_path)])
    assert verb.shutdowns == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_entry_points_refuse_with_code_2_and_no_traceback(command: str) -> None:
    done = subprocess.run([sys.executable, command, "--nonsense"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"error: --nonsense is no flag of {command}") and "Traceback" not in done.stderr


def test_every_command_has_its_verb() -> None:
    assert set(cli.VERBS) == set(COMMANDS)


def test_under_torchrun_one_rank_speaks(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", INFER, "--load", str(tmp_path / "none")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and done.stderr.count("error: --load") == 1, done.stderr
