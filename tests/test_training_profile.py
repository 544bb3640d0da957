"""``--profile``: which steps and ranks write a trace, what it names, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pool import ProcessPool
from training_helpers import make_config, make_workspace, run_training

from mindspeed_lora.arguments.cli import main
from mindspeed_lora.arguments.configs import ParallelFlags, ProfileFlags
from mindspeed_lora.errors import MindSpeedLoraError, UsageError


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("profile"))


def events(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["traceEvents"]


def ranges(trace: list[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    """(start, end) of the events of this name."""
    return sorted((event["ts"], event["ts"] + event["dur"]) for event in trace if event.get("name") == name and "dur" in event)


def test_the_trace_holds_the_asked_steps_their_parts_and_the_collectives(pool: ProcessPool, workspace: Path, tmp_path: Path) -> None:
    config = make_config(
        workspace,
        save__save=tmp_path / "s",
        train_iters=3,
        parallel=ParallelFlags(tensor_parallel_size=2, sequence_parallel=True),
        profile=ProfileFlags(step_start=2, step_end=4, ranks=(1,)),
    )
    pool.run(run_training, 2, config)
    folder = tmp_path / "s" / "profile"
    assert [path.name for path in folder.iterdir()] == ["rank1_iterations_2_to_3.json"]
    trace = events(folder / "rank1_iterations_2_to_3.json")
    steps = ranges(trace, "forward and backward")
    assert len(steps) == len(ranges(trace, "reduce gradients")) == len(ranges(trace, "optimizer")) == 2
    assert len(ranges(trace, "forward")) == len(ranges(trace, "backward")) == 2 * 4, "micro-batches of two steps"
    for kind in ("gather", "reduce_scatter"):
        found = [event for event in trace if "c10d" in event.get("name", "") and kind in event["name"]]
        assert found and all(any(start <= event["ts"] <= end for start, end in steps) for event in found), kind


def test_one_process_traces_to_the_end_where_told(workspace: Path, tmp_path: Path) -> None:
    flags = ProfileFlags(step_start=1, step_end=-1, ranks=(-1,), save_path=tmp_path / "t", record_shapes=True)
    text = run_training(make_config(workspace, train_iters=2, profile=flags))
    path = tmp_path / "t" / "rank0_iterations_1_to_2.json"
    assert f"trace of iterations 1 to 2: {path}" in text
    trace = events(path)
    assert len(ranges(trace, "optimizer")) == 2
    assert any("Input Dims" in event.get("args", {}) for event in trace)


def test_training_is_the_same(workspace: Path, tmp_path: Path) -> None:
    flags = ProfileFlags(step_start=1, step_end=2, save_path=tmp_path / "t")
    lines = [
        [
            line.split("lm loss")[1]
            for line in run_training(make_config(workspace, train_iters=2, profile=profile)).splitlines()
            if "lm loss" in line
        ]
        for profile in (None, flags)
    ]
    assert lines[0] == lines[1] and len(lines[0]) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ProfileFlags(),
            "--profile-step-start 10 and --profile-step-end 12 trace iterations 10 to 11, but this run makes iterations 1 to 4",
        ),
        (ProfileFlags(3, 6), "trace iterations 3 to 5, but this run makes iterations 1 to 4"),
        (ProfileFlags(4, 4), "trace iterations 4 to 3: there are none"),
        (ProfileFlags(5, -1), "trace iterations 5 to 4: there are none"),
        (ProfileFlags(1, 3, ranks=(0, 1)), "--profile-ranks 1: there are ranks 0 to 0, and -1 for all of them"),
        (ProfileFlags(1, 3, ranks=(-2,)), "--profile-ranks -2: there are ranks 0 to 0"),
    ],
)
def test_steps_and_ranks_outside_the_run_are_refused(workspace: Path, flags: ProfileFlags, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run_training(make_config(workspace, profile=flags))


def test_steps_behind_a_continued_run_are_refused(workspace: Path, tmp_path: Path) -> None:
    save = tmp_path / "s"
    run_training(make_config(workspace, save__save=save, train_iters=2))
    with pytest.raises(UsageError, match="trace iterations 2 to 3, but this run makes iterations 3 to 4"):
        run_training(make_config(workspace, save__save=save, load__lora_load=save, profile=ProfileFlags(2, 4)))


def test_a_folder_that_cannot_be_written_is_told(workspace: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MindSpeedLoraError, match=r"--profile: .*file.*cannot be written .*choose another --profile-save-path"):
        run_training(make_config(workspace, train_iters=1, profile=ProfileFlags(1, 2, save_path=tmp_path / "file")))


def test_the_peers_flags_are_read_and_need_profile(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"--load {workspace / 'model'} --data-path {workspace / 'data' / 'set'} --train-iters 3 --device cpu".split()
    peer = [
        "--profile-step-start",
        "5",
        "--profile-step-end",
        "10",
        "--profile-ranks",
        "0",
        "1",
        "--profile-level",
        "level1",
        "--profile-with-cpu",
    ]
    assert main("posttrain_gpt.py", [*words, *peer]) == 2
    assert "--profile-step-start needs --profile; without it no trace is written" in capsys.readouterr().err
    assert main("posttrain_gpt.py", [*words, *peer, "--profile"]) == 2
    assert "trace iterations 5 to 9, but this run makes iterations 1 to 3" in capsys.readouterr().err
