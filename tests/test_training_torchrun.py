"""The entry point under real torchrun: the same losses as one process, and one message where the run is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT
from training_helpers import TARGETS, losses, make_workspace

STEPS = 5


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("workspace"))


@pytest.fixture(scope="module")
def expected(workspace: Path) -> dict[bool, list[float]]:
    """Losses of one process, by whether LoRA is trained."""
    found = {}
    for lora in (True, False):
        result = launch(workspace, workspace / f"one{lora}", 1, lora)
        assert result.returncode == 0, result.stderr
        found[lora] = losses(workspace / f"one{lora}")
    return found


def launch(workspace: Path, save: Path, processes: int, lora: bool, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    command += [str(ROOT / "posttrain_gpt.py"), "--device", "cpu", "--load", str(workspace / "model")]
    command += ["--data-path", str(workspace / "data" / "set"), "--split", "100,0,0", "--save", str(save)]
    command += ["--seq-length", "32", "--no-pad-to-seq-lengths", "--micro-batch-size", "1", "--global-batch-size", "8", "--lr", "1e-3"]
    command += ["--train-iters", str(STEPS), "--lr-decay-style", "cosine"]
    command += ["--lora-target-modules", *TARGETS, "--lora-r", "4", "--lora-alpha", "8", "--lora-fusion"] if lora else []
    environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "HF_HUB_OFFLINE": "1"}
    return subprocess.run([*command, *flags], capture_output=True, text=True, timeout=300, env=environment, check=False)


@pytest.mark.parametrize(
    ("processes", "lora", "layout"),
    [
        (4, True, ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2", "--sequence-parallel"]),
        (8, False, ["--pipeline-model-parallel-size", "2", "--use-distributed-optimizer"]),
    ],
    ids=["lora_tp2pp2", "full_pp2dp4_zero1"],
)
def test_torchrun_equals_one_process(
    workspace: Path, expected: dict[bool, list[float]], tmp_path: Path, processes: int, lora: bool, layout: list[str]
) -> None:
    result = launch(workspace, tmp_path / "save", processes, lora, *layout)
    assert result.returncode == 0, result.stderr[-3000:]
    assert losses(tmp_path / "save") == pytest.approx(expected[lora], rel=1e-5)
    assert result.stdout.count("] iteration ") == STEPS


def test_a_wrong_run_says_one_thing_and_leaves_nothing(workspace: Path, tmp_path: Path) -> None:
    result = launch(workspace, tmp_path / "save", 1, True, "--global-batch-size", "7", "--micro-batch-size", "2")
    assert result.returncode == 2
    assert result.stderr.startswith("error: --global-batch-size 7 is not a multiple") and "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())
