"""The best checkpoint and how many of them stay; time spent waiting for data."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from training_helpers import change, make_config, make_workspace, metrics, run_training

from mindspeed_lora.checkpoint import retention
from mindspeed_lora.checkpoint.retention import BEST_NAME, remove_old
from mindspeed_lora.errors import UsageError
from mindspeed_lora.training.loop import Trainer


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("best"))


def validated(monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> None:
    """Evaluations that give ``losses`` in turn (the last value again and again)."""
    left = list(losses)
    monkeypatch.setattr(Trainer, "evaluate", lambda self, batches: (left.pop(0) if len(left) > 1 else left[0], {}))


def saved(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("iter_")) for path in folder.glob("iter_*"))


def best_config(workspace: Path, save: Path, **changes: Any) -> Any:
    settings = dict(save__save=save, save__save_best=True, eval_interval=1, data__split=(80.0, 20.0, 0.0), train_iters=5)
    return make_config(workspace, **{**settings, **changes})


def test_the_best_iteration_is_saved_named_and_kept(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    validated(monkeypatch, [float("nan"), 3.0, 2.0, 2.5, float("nan")])
    text = run_training(best_config(workspace, tmp_path / "s", save__save_interval=3, save__save_total_limit=1))
    assert saved(tmp_path / "s") == [3, 5], "the best, and the newest; no loss is no best one"
    assert (tmp_path / "s" / BEST_NAME).read_text() == "3"
    assert (tmp_path / "s" / "latest_checkpointed_iteration.txt").read_text() == "5"
    assert "best validation loss: 2.000000E+00 at iteration 3" in text
    assert text.count("successfully saved checkpoint from iteration") == 3  # 2, 3, 5
    monkeypatch.undo()
    again = make_config(workspace, load__lora_load=tmp_path / "s" / "iter_0000003", load__finetune=True, train_iters=1)
    assert f"adapter: {tmp_path / 's' / 'iter_0000003'}" in run_training(again)


def test_a_continued_run_knows_the_best(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = tmp_path / "s"
    validated(monkeypatch, [3.0, 1.0])
    run_training(best_config(workspace, save, train_iters=2))
    validated(monkeypatch, [2.0, 0.5])
    config = best_config(workspace, save, train_iters=4, load__lora_load=save)
    run_training(config)
    assert saved(save) == [1, 2, 4] and (save / BEST_NAME).read_text() == "4"


def test_a_best_full_model_can_be_loaded(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    validated(monkeypatch, [1.0, 2.0])
    run_training(dataclasses.replace(best_config(workspace, tmp_path / "s", train_iters=2), lora=None))
    config = make_config(workspace, load__load=tmp_path / "s" / "iter_0000001", load__finetune=True, train_iters=1)
    assert "iter_0000001; adapter" in run_training(dataclasses.replace(config, lora=None))


def test_saves_of_earlier_versions_are_continued(workspace: Path, tmp_path: Path) -> None:
    save = tmp_path / "s"
    run_training(make_config(workspace, save__save=save, train_iters=1))
    path = save / "iter_0000001" / "resume" / "trainer_state.json"
    state = json.loads(path.read_text())
    del state["best_loss"], state["best_iteration"]
    path.write_text(json.dumps(state))
    run_training(make_config(workspace, save__save=save, load__lora_load=save, train_iters=2))
    assert saved(save) == [1, 2]


def test_what_cannot_be_removed_stays_and_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for iteration in (1, 2, 3, 9):
        (tmp_path / f"iter_000000{iteration}").mkdir()
    assert remove_old(tmp_path, 3, 2, best=None) == [1], "9 is no older iteration"
    monkeypatch.setattr(retention.shutil, "rmtree", lambda path: (_ for _ in ()).throw(OSError("busy")))
    with caplog.at_level("WARNING"):
        from mindspeed_lora.log import LOGGER_NAME, get_logger

        get_logger().propagate = True
        assert LOGGER_NAME and remove_old(tmp_path, 3, 1, best=None) == []
    assert "iter_0000002 cannot be removed (busy)" in caplog.text
    assert not (tmp_path / "iter_0000002").exists(), "half removed, it has no checkpoint's name"


def test_best_without_validation_samples_is_refused(workspace: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--save-best: --split 100,0,0 leaves none of the 24 samples for validation"):
        run_training(best_config(workspace, tmp_path / "s", data__split=(100.0, 0.0, 0.0)))


def test_waiting_for_data_is_measured(workspace: Path, tmp_path: Path) -> None:
    text = run_training(change(make_config(workspace, save__save=tmp_path / "s"), train_iters=3))
    assert re.search(r"waited for data: \d+\.\d\d % of the time", text)
    assert all(0 < record["data_ms"] < record["elapsed_ms"] for record in metrics(tmp_path / "s"))
