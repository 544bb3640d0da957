"""A save folder that cannot be used is one message, before anything is loaded; so is a damaged record of metrics."""

from __future__ import annotations

import json
import os
import re
import resource
from pathlib import Path
from typing import Any

import pytest

from mindspeed_lora.checkpoint.start import StartPoint, check_save_folder
from mindspeed_lora.errors import DataError, UsageError
from mindspeed_lora.log import get_logger
from mindspeed_lora.training import report
from mindspeed_lora.training.report import METRICS_NAME, Recorder, check_tensorboard


def check(save: Path) -> None:
    start: Any = StartPoint(base=None, adapter=None)  # type: ignore[arg-type]
    check_save_folder(save, start)


def test_a_folder_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"nothing can be written into .*file"):
        check(tmp_path / "file" / "below")


def test_a_folder_that_may_not_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # root may write anywhere
    with pytest.raises(UsageError, match="nothing can be written"):
        check(tmp_path / "new" / "deeper")


def test_a_new_folder_is_taken_and_not_made(tmp_path: Path) -> None:
    check(tmp_path / "new" / "deeper")
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_made_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="the folder cannot be made"):
        Recorder(tmp_path / "file" / "below", None, 0)


def test_metrics_after_the_checkpoint_are_dropped_and_a_foreign_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / METRICS_NAME
    path.write_text("".join(json.dumps({"iteration": iteration}) + "\n" for iteration in (1, 2, 3)) + '{"iteration": 4')
    Recorder(tmp_path, None, 2).close()
    assert path.read_text() == '{"iteration": 1}\n{"iteration": 2}\n'
    before = path.read_text() + "notes of mine\n"
    path.write_text(before)
    with pytest.raises(DataError, match="notes of mine"):
        Recorder(tmp_path, None, 2)
    assert path.read_text() == before


def test_a_full_disk_costs_metrics_and_not_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(get_logger(), "propagate", True)
    (tmp_path / METRICS_NAME).symlink_to("/dev/full")
    Recorder(tmp_path, None, 0).add(1, {"iteration": 1}, {})
    assert re.fullmatch(f"metrics are lost: they cannot be written into {tmp_path} .*No space left.*", caplog.messages[0])


def test_half_a_line_of_metrics_is_taken_back(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    recorder = Recorder(tmp_path, None, 0)
    recorder.add(1, {"iteration": 1}, {})
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (25, limits[1]))
        recorder.add(2, {"iteration": 2}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    recorder.add(3, {"iteration": 3}, {})
    assert (tmp_path / METRICS_NAME).read_text() == '{"iteration": 1}\n{"iteration": 3}\n'


def test_tensorboard_is_checked_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_tensorboard(None)
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=f"--tensorboard-dir {tmp_path}: the package tensorboard is not installed"):
        check_tensorboard(tmp_path)


def test_a_tensorboard_folder_that_cannot_be_made_is_one_message(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"--tensorboard-dir .*file/tb: nothing can be written there"):
        Recorder(None, tmp_path / "file" / "tb", 0)
