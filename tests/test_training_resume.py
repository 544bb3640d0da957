"""Stopping and going on: bit-equal at one layout, equal within rounding at another; what is loaded and what is refused."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pool import ProcessPool
from training_helpers import change, losses, make_config, make_workspace, metrics, run_training, saved_parameters

from mindspeed_lora.arguments.configs import TrainConfig
from mindspeed_lora.checkpoint.save import save_checkpoint
from mindspeed_lora.checkpoint.start import verify_folder
from mindspeed_lora.conversion.inspect import describe
from mindspeed_lora.errors import CheckpointError, MindSpeedLoraError, UsageError

STEPS, STOP = 20, 10


@pytest.fixture(scope="module")
def workspaces(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    return {tied: make_workspace(tmp_path_factory.mktemp("tied" if tied else "untied"), tied=tied) for tied in (False, True)}


@pytest.fixture
def workspace(workspaces: dict[bool, Path]) -> Path:
    return workspaces[False]


def layout(tp: int = 1, pp: int = 1, virtual: int | None = None) -> dict[str, Any]:
    return {
        "parallel__tensor_parallel_size": tp,
        "parallel__pipeline_parallel_size": pp,
        "parallel__sequence_parallel": tp > 1,
        "parallel__layers_per_virtual_stage": virtual,
    }


def config_of(workspace: Path, lora: bool, **changes: Any) -> TrainConfig:
    config = make_config(workspace, train_iters=STEPS, **changes)
    return config if lora else dataclasses.replace(config, lora=None)


def continuing(config: TrainConfig, save: Path, lora: bool, **changes: Any) -> TrainConfig:
    source = {"load__lora_load": save} if lora else {"load__load": save}
    return change(config, save__save=save, **source, **changes)


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float = 0.0) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]) if tolerance == 0 else torch.allclose(value, other[name], atol=tolerance), name


@pytest.mark.parametrize(
    ("lora", "tied", "world_size", "changes"),
    [
        (True, False, 1, {}),
        (True, False, 4, layout(2, 2) | {"optimizer__use_distributed_optimizer": True, "runtime__params_dtype": "bf16"}),
        (False, True, 4, layout(1, 2) | {"optimizer__use_distributed_optimizer": True}),
        (False, True, 2, layout(1, 2, 1) | {"runtime__params_dtype": "bf16"}),
    ],
    ids=["lora", "lora_tp2pp2_zero1_bf16", "full_tied_pp2dp2_zero1", "full_tied_pp2vpp2_bf16"],
)
def test_stop_and_resume_equals_an_uninterrupted_run(
    pool: ProcessPool, workspaces: dict[bool, Path], tmp_path: Path, lora: bool, tied: bool, world_size: int, changes: dict[str, Any]
) -> None:
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    config = config_of(workspaces[tied], lora, **changes)
    pool.run(run_training, world_size, change(config, save__save=whole))
    pool.run(run_training, world_size, change(config, save__save=parted, train_iters=STOP))
    pool.run(run_training, world_size, continuing(config, parted, lora))
    assert losses(parted) == losses(whole)
    assert [record["grad_norm"] for record in metrics(parted)] == [record["grad_norm"] for record in metrics(whole)]
    assert_equal(saved_parameters(parted, lora), saved_parameters(whole, lora))


@pytest.mark.parametrize(
    ("lora", "tied", "first", "then"),
    [
        (True, False, (4, layout(2, 2)), (2, {"optimizer__use_distributed_optimizer": True})),
        (True, False, (2, {}), (4, layout(2, 2, 1))),
        (False, True, (4, layout(2, 2)), (2, {})),
        (False, False, (2, {"optimizer__use_distributed_optimizer": True}), (2, layout(2, 1))),
    ],
    ids=["lora_tp2pp2_to_dp2_zero1", "lora_dp2_to_tp2pp2vpp2", "full_tied_tp2pp2_to_dp2", "full_dp2_zero1_to_tp2"],
)
def test_resume_on_another_layout(
    pool: ProcessPool,
    workspaces: dict[bool, Path],
    tmp_path: Path,
    lora: bool,
    tied: bool,
    first: tuple[int, dict[str, Any]],
    then: tuple[int, dict[str, Any]],
) -> None:
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    config = config_of(workspaces[tied], lora)
    pool.run(run_training, 1, change(config, save__save=whole))
    pool.run(run_training, first[0], change(config, save__save=parted, train_iters=STOP, **first[1]))
    pool.run(run_training, then[0], continuing(config, parted, lora, **then[1]))
    assert losses(parted) == pytest.approx(losses(whole), rel=1e-5)
    assert_equal(saved_parameters(parted, lora), saved_parameters(whole, lora), tolerance=1e-5)


@pytest.fixture(scope="module")
def stopped(workspaces: dict[bool, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA run of STOP iterations; copy it before writing."""
    save = tmp_path_factory.mktemp("stopped") / "save"
    run_training(make_config(workspaces[False], save__save=save, train_iters=STOP))
    return save


def test_an_adapter_only_save_alone_knows_its_base(workspace: Path, stopped: Path, tmp_path: Path) -> None:
    save = Path(shutil.copytree(stopped, tmp_path / "save"))
    text = run_training(make_config(workspace, load__load=save, save__save=save, train_iters=STEPS))
    assert f"its base is {workspace / 'model'}" in text
    assert [record["iteration"] for record in metrics(save)] == list(range(1, STEPS + 1))


def test_finetune_takes_weights_only(workspace: Path, stopped: Path, tmp_path: Path) -> None:
    run_training(make_config(workspace, load__lora_load=stopped, load__finetune=True, save__save=tmp_path, train_iters=1))
    assert [record["iteration"] for record in metrics(tmp_path)] == [1]
    assert metrics(tmp_path)[0]["consumed_samples"] == 8
    assert_equal(saved_parameters(tmp_path), saved_parameters(stopped))  # the first step's rate is 0 in a warm-up


def test_no_load_optim_keeps_the_position(workspace: Path, stopped: Path, tmp_path: Path) -> None:
    text = run_training(make_config(workspace, load__lora_load=stopped, load__load_optim=False, save__save=tmp_path, train_iters=STEPS))
    assert "--no-load-optim" in text
    assert metrics(tmp_path)[0]["iteration"] == STOP + 1


def test_no_save_optim_leaves_counters_only(workspace: Path, tmp_path: Path) -> None:
    config = make_config(workspace, save__save=tmp_path / "a", save__save_optim=False, save__save_rng=False, train_iters=2)
    run_training(config)
    resume = tmp_path / "a" / "iter_0000002" / "resume"
    assert sorted(path.name for path in resume.iterdir()) == ["mindspeed_lora.json", "trainer_state.json"]
    config = change(config, load__lora_load=tmp_path / "a", save__save=tmp_path / "b", train_iters=4)
    with pytest.raises(MindSpeedLoraError, match="--no-load-optim"):
        run_training(config)
    run_training(change(config, load__load_optim=False))
    assert metrics(tmp_path / "b")[0]["iteration"] == 3


def test_verify_and_inspect_cover_the_training_state(stopped: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(stopped, tmp_path / "broken"))
    resume = broken / f"iter_{STOP:07d}/resume"
    assert dict(describe(broken, verify=True))["training"].startswith(f"can be continued from iteration {STOP} (resume/); ")
    state = max(resume.iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(state.read_bytes())
    data[len(data) // 2] ^= 1
    state.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"resume/{state.name}: its CRC32 differs"):
        verify_folder(broken)
    with pytest.raises(CheckpointError, match=rf"resume/{state.name}: its CRC32 differs"):
        list(describe(broken, verify=True))
    shutil.rmtree(resume)  # somebody gives the adapter away without it
    verify_folder(broken)
    assert "training" not in dict(describe(broken))


def test_a_finished_run_says_so(workspace: Path, stopped: Path) -> None:
    text = run_training(make_config(workspace, load__lora_load=stopped, save__save=stopped, train_iters=STOP))
    assert "nothing to do; raise --train-iters" in text


@pytest.mark.parametrize("finetune", [False, True])
def test_a_used_save_folder_is_refused(workspace: Path, stopped: Path, finetune: bool) -> None:
    before = sorted(path.relative_to(stopped) for path in stopped.rglob("*"))
    source = {"load__lora_load": stopped, "load__finetune": True} if finetune else {}
    with pytest.raises(UsageError, match=f"already holds a checkpoint \\(iteration {STOP}\\)"):
        run_training(make_config(workspace, save__save=stopped, **source))
    assert sorted(path.relative_to(stopped) for path in stopped.rglob("*")) == before


def test_another_data_order_is_refused(workspace: Path, stopped: Path, tmp_path: Path) -> None:
    with pytest.raises(MindSpeedLoraError, match="seed 1234, this one has 7"):
        run_training(make_config(workspace, load__lora_load=stopped, save__save=tmp_path / "s", runtime__seed=7))
    assert not (tmp_path / "s").exists()


def test_an_adapter_whose_base_moved_is_refused(workspace: Path, stopped: Path, tmp_path: Path) -> None:
    save = Path(shutil.copytree(stopped, tmp_path / "save"))
    manifest = save / f"iter_{STOP:07d}" / "mindspeed_lora.json"
    manifest.write_text(manifest.read_text().replace(str(workspace / "model"), "/nowhere"))
    with pytest.raises(MindSpeedLoraError, match="its base /nowhere is not there"):
        run_training(make_config(workspace, load__load=save))


def fail_on_rank_1(config: TrainConfig, where: str) -> str:
    """What this rank's run ended with when ``where`` (a method of its optimizer, or its disk) fails on rank 1."""
    import resource

    import torch.distributed as dist

    from mindspeed_lora.training import run
    from mindspeed_lora.training.optimizer import FlatAdamW

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full_disk(*args: Any) -> Path:
        if dist.get_rank() == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        return save_checkpoint(*args)

    def no_memory(*args: Any) -> Any:
        if dist.get_rank() == 1:
            raise RuntimeError("out of memory")
        return getattr(original, where)(*args)

    original = type("Original", (), dict(vars(FlatAdamW)))
    with pytest.MonkeyPatch.context() as patch:
        if where == "disk":
            patch.setattr(run, "save_checkpoint", full_disk)
        else:
            patch.setattr(FlatAdamW, where, no_memory)
        try:
            run_training(config)
        except (MindSpeedLoraError, RuntimeError) as error:
            return str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return ""


@pytest.mark.parametrize(
    ("where", "changes", "message"),
    [
        ("disk", layout(2), "saving the model failed: rank 1: .*"),
        ("disk", {}, "saving the training state failed: rank 1: .*"),  # rank 1 writes its random state only
        ("make_room", {}, "making room for the optimizer's state failed: rank 1: out of memory"),
        ("export", {}, "collecting the optimizer's state failed: rank 1: out of memory"),
        ("gather", {}, "out of memory|.*onnection closed by peer.*"),  # between collectives: the others see that it has left
    ],
    ids=["model", "state", "room", "views", "gather"],
)
def test_where_one_rank_fails_to_save_all_stop_and_the_previous_save_stays(
    pool: ProcessPool, workspace: Path, stopped: Path, tmp_path: Path, where: str, changes: dict[str, Any], message: str
) -> None:
    save = Path(shutil.copytree(stopped, tmp_path / "save"))
    config = make_config(workspace, load__lora_load=save, save__save=save, train_iters=STOP + 1, **changes)
    config = change(config, optimizer__use_distributed_optimizer=True)
    for text in pool.run(fail_on_rank_1, 2, config, where, timeout=60.0):  # also of the collectives
        assert re.fullmatch(message, text, re.DOTALL), text
    assert (save / "latest_checkpointed_iteration.txt").read_text() == str(STOP)
    assert sorted(path.name for path in save.glob("*iter_*")) == [f"iter_{STOP:07d}"]
    if where == "disk":
        pool.run(run_training, 2, config)
        assert [record["iteration"] for record in metrics(save)] == list(range(1, STOP + 2))


def test_what_a_killed_run_left_goes_with_the_next_save(workspace: Path, tmp_path: Path) -> None:
    for left in (".iter_0000099.tmp/iter_0000099", ".iter_0000001.removed"):
        (tmp_path / left).mkdir(parents=True)
    run_training(make_config(workspace, train_iters=1, save__save=tmp_path))
    assert [path.name for path in tmp_path.glob("*iter_*") if path.is_dir()] == ["iter_0000001"]
