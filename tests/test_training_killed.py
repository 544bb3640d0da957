"""Runs that are killed (``kill -9`` of one rank, in a step or at any point of a save) and gone on with, as a user would."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT
from pool import ProcessPool
from training_helpers import TARGETS, change, losses, make_config, make_workspace, run_training

from mindspeed_lora.arguments.configs import TrainConfig

STEPS, EVERY, KILLED = 12, 4, 8
KINDS = ((True, "fp32"), (False, "bf16"))  # LoRA, and all weights
STEP, BEGUN, WRITTEN, DESCRIBED, RENAMED, NAMED = "step", "begun", "written", "described", "renamed", "named"
LIMIT = {STEP: 4, BEGUN: 4, WRITTEN: 4, DESCRIBED: 4, RENAMED: 4, NAMED: 8}  # the iteration that the run goes on from

LAUNCH = """
import os, signal, sys
from mindspeed_lora.arguments.cli import main
from mindspeed_lora.checkpoint import resume, save
from mindspeed_lora.training.loop import Trainer
where, rank, at = os.environ["KILL"].split(":")
def die(): os.kill(os.getpid(), signal.SIGKILL)
def before(owner, name, due):
    whole = getattr(owner, name)
    def hooked(*args, **kwargs):
        if os.environ["RANK"] == rank and due(*args): die()
        return whole(*args, **kwargs)
    setattr(owner, name, hooked)
def is_at(*args): return any(getattr(each, "iteration", each) == int(at) for each in args)
if where == "step": before(Trainer, "_means", lambda trainer, *_, **__: trainer.state.iteration == int(at) - 1)
if where == "begun": before(save, "_write_model", is_at)
if where == "written": before(save, "write_resume", is_at)
if where == "described": before(save, "_finish", is_at)
if where == "renamed": before(save, "write_tracker", is_at)
if where == "named":
    named = save.write_tracker
    def write_and_die(folder, iteration):
        named(folder, iteration)
        if iteration == int(at): die()
    save.write_tracker = write_and_die
sys.exit(main("posttrain_gpt.py"))
"""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("killed"), tied=True)


def flags_of(workspace: Path, save: Path, lora: bool, dtype: str) -> list[str]:
    """What make_config says, as a command line."""
    words = f"--device cpu --load {workspace / 'model'} --data-path {workspace / 'data' / 'set'} --split 100,0,0 --save {save}"
    words += " --seq-length 32 --no-pad-to-seq-lengths --pad-to-multiple-of 4 --micro-batch-size 2 --global-batch-size 8 --lr 1e-3"
    words += f" --min-lr 1e-4 --lr-decay-style cosine --lr-decay-iters 20 --lr-warmup-iters 2 --train-iters {STEPS}"
    words += f" --save-interval {EVERY} --params-dtype {dtype}"
    words += f" --lora-target-modules {' '.join(TARGETS)} --lora-r 4 --lora-alpha 8 --lora-fusion" if lora else ""
    return words.split()


def launch_and_kill(flags: list[str], where: str, rank: int) -> subprocess.CompletedProcess[str]:
    """The run on two ranks, of which one ends itself with SIGKILL."""
    torchrun = f"{sys.executable} -m torch.distributed.run --nproc_per_node 2 --rdzv-backend=c10d --rdzv-endpoint=localhost:0".split()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "KILL": f"{where}:{rank}:{KILLED}", "OMP_NUM_THREADS": "1"}
    script = Path(flags[flags.index("--save") + 1]).parent / "launch.py"
    script.write_text(LAUNCH)
    return subprocess.run([*torchrun, str(script), *flags], capture_output=True, text=True, timeout=120, env=environment, check=False)


def config_of(workspace: Path, lora: bool, dtype: str, save: Path) -> TrainConfig:
    changes: dict[str, Any] = {} if lora else {"lora": None}
    return make_config(workspace, train_iters=STEPS, save__save=save, save__save_interval=EVERY, runtime__params_dtype=dtype, **changes)


@pytest.fixture(scope="module")
def whole(pool: ProcessPool, workspace: Path) -> dict[tuple[bool, str], list[float]]:
    """Losses without an interruption on two ranks, by LoRA and dtype."""
    found = {}
    for lora, dtype in KINDS:
        save = workspace / f"whole{lora}{dtype}"
        pool.run(run_training, 2, config_of(workspace, lora, dtype, save))
        found[lora, dtype] = losses(save)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("where", LIMIT)
@pytest.mark.parametrize(("lora", "dtype"), KINDS)
def test_a_killed_run_goes_on_as_if_nothing_had_been(
    pool: ProcessPool, workspace: Path, whole: dict[tuple[bool, str], list[float]], tmp_path: Path, where: str, lora: bool, dtype: str
) -> None:
    save = tmp_path / "save"
    killed = launch_and_kill(flags_of(workspace, save, lora, dtype), where, 1 if where in (STEP, BEGUN) else 0)
    assert killed.returncode != 0
    assert "Signal 9" in killed.stderr, killed.stderr[-2000:]
    assert (save / "latest_checkpointed_iteration.txt").read_text() == str(LIMIT[where])
    source = {"load__lora_load": save} if lora else {"load__load": save}
    config = change(config_of(workspace, lora, dtype, save), **source)
    other = change(config, parallel__pipeline_parallel_size=2) if dtype == "fp32" else config
    text = pool.run(run_training, 4 if dtype == "fp32" else 2, other)[0]
    assert f"continuing {save} at iteration {LIMIT[where]}" in text
    expected = whole[lora, dtype]
    assert losses(save) == (pytest.approx(expected, rel=1e-5) if dtype == "fp32" else expected)
    assert sorted(path.name for path in save.glob("*iter_*")) == [f"iter_{number:07d}" for number in (4, 8, 12)]
