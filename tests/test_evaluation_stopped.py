"""A run that is stopped from outside: Ctrl-C at the terminal, or a process of it that dies."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from evaluation_helpers import config_for, run_evaluate, small_benchmarks
from helpers import ROOT, shared_data
from pool import ProcessPool

from mindspeed_lora.arguments.configs import EvaluationConfig

MODEL = "stories260k/hf"


def start(output: Path, data: Path, processes: int, *layout: str) -> subprocess.Popen[str]:
    """evaluation.py on more text than it can generate in a minute, in a process group of its own like a terminal's."""
    folder = str(shared_data() / MODEL)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    words = ["--device", "cpu", "--load", folder, "--task", "boolq", "gsm8k", "--task-data-path", str(data), "--evaluation-batch-size", "1"]
    more = ["--num-fewshot", "0", "--max-new-tokens", "400", "--output-path", str(output), *layout]
    return subprocess.Popen(
        [sys.executable, *torchrun, str(ROOT / "evaluation.py"), *words, *more],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for_answers(process: subprocess.Popen[str], output: Path) -> str:
    """Until the first benchmark is written and the second has some answers; returns what was printed."""
    assert process.stdout is not None
    text, end = "", time.monotonic() + 120
    while not ((output / "results.json").exists() and any(f"| {n}/40" in text for n in range(2, 40))):
        character = process.stdout.read(64)
        text += character
        assert character and time.monotonic() < end, text
    return text


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Few questions of boolq, many of gsm8k."""
    root = small_benchmarks(tmp_path_factory.mktemp("benchmarks"))
    lines = (shared_data() / "gsm8k" / "grade_school_math" / "data" / "test.jsonl").read_text().splitlines()
    (root / "gsm8k" / "test.jsonl").write_text("\n".join(sorted(lines, key=len)[:40]) + "\n")
    return root


def signalled_cell(config: EvaluationConfig, rank: int) -> tuple[int, str]:
    """As :func:`run_evaluate`, and SIGINT inside the fifth order, to one rank only."""
    from mindspeed_lora.inference import executor

    execute, orders = executor.Executor.execute, itertools.count()

    def interrupted(self: Any, message: Any) -> Any:
        if os.environ["RANK"] == str(rank) and next(orders) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return execute(self, message)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executor.Executor, "execute", interrupted)
        try:
            return run_evaluate(config)
        except KeyboardInterrupt:
            return 130, "interrupted"


@pytest.mark.parametrize(
    ("tp", "pp", "dp", "rank"), [(1, 1, 1, 0), (2, 1, 1, 0), (1, 2, 1, 0), (1, 1, 2, 0), (1, 1, 2, 1), (2, 1, 2, 0), (2, 1, 2, 2)]
)
def test_an_interruption_inside_an_order_leaves_all_ranks_at_one_place(
    pool: ProcessPool, tmp_path: Path, data: Path, tp: int, pp: int, dp: int, rank: int
) -> None:
    """Whichever driver the signal reaches: all ranks end by themselves with 130, and what was answered counts."""
    config = replace(config_for(shared_data() / MODEL, data, tmp_path, tp, pp, tasks=("gsm8k",), max_new_tokens=8), evaluation_batch_size=1)
    results = pool.run(signalled_cell, tp * pp * dp, config, rank)
    assert [code for code, _ in results] == [130] * len(results), results
    scores = json.loads((tmp_path / "results.json").read_text())["mindspeed_lora"]["scores"]["gsm8k"]
    assert not scores["complete"] and scores.get("count", 0) < 40


LAYOUTS = [(1, ()), (2, ("--tensor-model-parallel-size", "2")), (2, ("--pipeline-model-parallel-size", "2")), (2, ())]


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "layout"), LAYOUTS)
def test_ctrl_c_ends_every_rank_and_keeps_what_was_answered(tmp_path: Path, data: Path, processes: int, layout: tuple[str, ...]) -> None:
    process = start(tmp_path, data, processes, *layout)
    text = wait_for_answers(process, tmp_path)
    os.killpg(process.pid, signal.SIGINT)
    rest, _ = process.communicate(timeout=45)
    assert process.returncode != 0 and (processes > 1 or process.returncode == 130), rest
    assert "gsm8k: interrupted" in rest and "gsm8k acc = " in rest, text + rest
    scores = json.loads((tmp_path / "results.json").read_text())["mindspeed_lora"]
    assert not scores["complete"] and scores["scores"]["boolq"]["complete"] and not scores["scores"]["gsm8k"]["complete"]
    assert 1 <= scores["scores"]["gsm8k"]["count"] < 40
    assert processes > 1 or "Traceback" not in rest, rest


def children(pid: int) -> list[int]:
    """Processes that ``pid`` started."""
    return [int(word) for path in Path(f"/proc/{pid}/task").glob("*/children") for word in path.read_text().split()]


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "layout"), LAYOUTS[1:])
def test_a_rank_that_dies_is_told_and_ends_the_run(tmp_path: Path, data: Path, processes: int, layout: tuple[str, ...]) -> None:
    process = start(tmp_path, data, processes, *layout)
    text = wait_for_answers(process, tmp_path)
    workers = sorted(children(process.pid))
    os.kill(workers[-1], signal.SIGKILL)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and "has died or was ended" in rest, text + rest
    scores = json.loads((tmp_path / "results.json").read_text())["mindspeed_lora"]["scores"]
    assert scores["boolq"]["complete"] and not scores.get("gsm8k", {"complete": False})["complete"]
