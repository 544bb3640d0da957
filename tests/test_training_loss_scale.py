"""fp16: the loss scale by Megatron's rules, and runs that overflow, recover, continue, and agree with fp32 and between layouts."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_model
from pool import ProcessPool
from torch import nn
from training_helpers import (
    TARGETS,
    change,
    losses,
    make_config,
    make_workspace,
    metrics,
    run_training,
    saved_parameters,
    write_tokenizer,
)

from mindspeed_lora.arguments.configs import (
    InferenceConfig,
    LoadFlags,
    LoraFlags,
    LossScaleFlags,
    OptimizerFlags,
    ParallelFlags,
    RuntimeFlags,
    TemplateFlags,
    TokenizerFlags,
    TrainConfig,
)
from mindspeed_lora.arguments.flag import EVALUATE, INFER, TRAIN
from mindspeed_lora.arguments.parser import parse
from mindspeed_lora.errors import CheckpointError, MindSpeedLoraError
from mindspeed_lora.inference.engine import Engine, ScoreBatch
from mindspeed_lora.inference.session import lead, open_session
from mindspeed_lora.parallel.context import build_context, single_process_context
from mindspeed_lora.training import loss_scale
from mindspeed_lora.training.flat import FlatLayout, TrainedParameter
from mindspeed_lora.training.gradients import FlatGradients
from mindspeed_lora.training.loss_scale import LossScaler, build_scaler
from mindspeed_lora.training.optimizer import build_updates

FLAGS = LossScaleFlags(initial=64.0, minimum=4.0, window=3, hysteresis=2)


def scales(flags: LossScaleFlags, events: str) -> list[float]:
    """The scale after each step; "o": an overflow, ".": none."""
    scaler, found = LossScaler(flags), []
    for event in events:
        scaler.update(event == "o")
        found.append(scaler.scale)
    return found


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ("......", [64, 64, 128, 128, 128, 256]),  # x 2 after every 3 good steps
        ("oooo", [64, 32, 16, 8]),  # the first overflow is borne, the second halves, and so does every one after it
        ("oooooooo", [64, 32, 16, 8, 4, 4, 4, 4]),  # --min-loss-scale
        ("..o...", [64, 64, 64, 64, 64, 128]),  # an overflow starts the window anew
        (".o.o", [64, 64, 64, 32]),  # good steps do not bring the patience back
        ("o...oo", [64, 64, 64, 128, 128, 64]),  # growth does
        ("oo...o", [64, 32, 32, 32, 64, 64]),
    ],
)
def test_the_scale_moves_as_in_megatron(events: str, expected: list[float]) -> None:
    assert scales(FLAGS, events) == expected


def test_a_constant_scale_stays() -> None:
    flags = dataclasses.replace(FLAGS, constant=1000.0)
    assert scales(flags, "ooo......") == [1000.0] * 9 and LossScaler(flags).at_minimum


def test_defaults_are_megatrons_and_only_fp16_has_a_scale() -> None:
    scaler = build_scaler(LossScaleFlags(), torch.float16)
    assert scaler is not None and scaler.record() == {"scale": 2.0**32, "good_steps": 0, "patience": 2}
    assert (scaler.flags.minimum, scaler.flags.window) == (1.0, 1000) and not scaler.at_minimum
    assert build_scaler(LossScaleFlags(), torch.bfloat16) is None


def test_record_and_restore(tmp_path: Path) -> None:
    """Every counter goes on; a state without a scale changes nothing, and a constant scale is the flag's."""
    scaler, other = LossScaler(FLAGS), LossScaler(dataclasses.replace(FLAGS, initial=8.0))
    for event in "oo..":
        scaler.update(event == "o")
    other.restore(json.loads(json.dumps(scaler.record())), tmp_path)
    assert other.record() == scaler.record() == {"scale": 32.0, "good_steps": 2, "patience": 0}
    other.restore(None, tmp_path)
    assert other.scale == 32.0
    constant = LossScaler(dataclasses.replace(FLAGS, constant=2.0))
    constant.restore(scaler.record(), tmp_path)
    assert constant.scale == 2.0


@pytest.mark.parametrize("record", [{}, {"scale": 0, "good_steps": 0, "patience": 1}, {"scale": "x"}, 3])
def test_a_record_that_is_no_scale_is_named(record: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is no loss scale.*--no-load-optim"):
        LossScaler(FLAGS).restore(record, tmp_path)


def parsed(command: str, words: str, folder: Path) -> tuple[Any, list[str]]:
    needed = {TRAIN: f"--data-path {folder}/set --train-iters 1", INFER: "", EVALUATE: "--task mmlu --task-data-path " + str(folder)}
    return parse(command, [*needed[command].split(), "--load", str(folder), *words.split()])


def test_flags(tmp_path: Path) -> None:
    config, notes = parsed(TRAIN, "--fp16 --initial-loss-scale 4096 --min-loss-scale 2 --loss-scale-window 500 --hysteresis 3", tmp_path)
    assert config.loss_scale == LossScaleFlags(None, 4096.0, 2.0, 500, 3) and config.runtime.params_dtype == "fp16"
    assert not [note for note in notes if "scale" in note]
    assert parsed(TRAIN, "--bf16", tmp_path)[0].loss_scale == LossScaleFlags()
    config, notes = parsed(TRAIN, "--fp16 --loss-scale 128 --hysteresis 3", tmp_path)
    assert config.loss_scale.constant == 128 and "--hysteresis: --loss-scale 128 is constant" in notes
    notes = parsed(TRAIN, "--bf16 --initial-loss-scale 4096", tmp_path)[1]
    assert "--initial-loss-scale: bf16 and fp32 need no loss scale; only --fp16 has one" in notes
    for command in (INFER, EVALUATE):
        config, notes = parsed(command, "--fp16 --initial-loss-scale 4096 --hysteresis 2", tmp_path)
        assert config.runtime.params_dtype == "fp16" and "it belongs to training" in notes[-1]


def unscaled(bad: float, sharded: bool) -> tuple[bool, float]:
    """What unscale says where only the last rank has ``bad``; an own gradient after it."""
    context = build_context(torch.device("cpu"))
    weight = nn.Parameter(torch.ones(4))
    layout = FlatLayout([TrainedParameter("w", weight)], context, sharded)
    layout.flatten_parameters()
    gradients = FlatGradients(layout, context, sharded)
    gradients.own.fill_(6.0)
    if context.dp_rank == context.dp_size - 1:
        gradients.own[-1] = bad
    return gradients.unscale(4.0), float(gradients.own[0])


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_every_rank_hears_of_one_ranks_overflow(pool: ProcessPool, bad: float, sharded: bool) -> None:
    assert pool.run(unscaled, 2, bad, sharded) == [(False, 1.5)] * 2
    assert pool.run(unscaled, 2, 8.0, sharded) == [(True, 1.5)] * 2


def unscaled_experts(bad_rank: int) -> bool:
    """What unscale says where only ``bad_rank`` has an infinity, among its experts' gradients."""
    context = build_context(torch.device("cpu"), expert_parallel_size=2)
    trained = [TrainedParameter("w", nn.Parameter(torch.ones(4))), TrainedParameter("e", nn.Parameter(torch.ones(4)), of_expert=True)]
    gradients, _ = build_updates(trained, context, OptimizerFlags(use_distributed_optimizer=True))
    for part in gradients.parts:
        part.own.fill_(1.0)
    if context.rank == bad_rank:
        gradients.parts[1].own[0] = math.inf
    return gradients.unscale(4.0)


def test_every_rank_hears_of_an_overflow_among_experts(pool: ProcessPool) -> None:
    """DP 4 with two pairs of ranks that share the experts out."""
    assert [pool.run(unscaled_experts, 4, bad_rank) for bad_rank in (0, 3, -1)] == [[False] * 4, [False] * 4, [True] * 4]


def test_a_stage_that_trains_nothing_has_no_overflow() -> None:
    context = single_process_context()
    assert FlatGradients(FlatLayout([], context, False), context, False).unscale(2.0)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("workspace"))


def fp16(workspace: Path, **changes: Any) -> TrainConfig:
    scale = LossScaleFlags(initial=2.0**14)
    return change(make_config(workspace, runtime__params_dtype="fp16", loss_scale=scale, train_iters=8), **changes)


@pytest.fixture(scope="module")
def alone(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save folder of an fp16 run on one process."""
    save = tmp_path_factory.mktemp("alone")
    run_training(fp16(workspace, save__save=save))
    return save


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_losses_are_fp32s(workspace: Path, tmp_path: Path, lora: bool) -> None:
    adapter = LoraFlags(r=4, alpha=8.0, targets=TARGETS) if lora else None
    run_training(fp16(workspace, lora=adapter, save__save=tmp_path / "half"))
    run_training(fp16(workspace, lora=adapter, runtime__params_dtype="fp32", save__save=tmp_path / "single"))
    half, single = losses(tmp_path / "half"), losses(tmp_path / "single")
    assert half == pytest.approx(single, abs=1e-2) and half != single
    norms = [[record["grad_norm"] for record in metrics(tmp_path / name)] for name in ("half", "single")]
    assert norms[0] == pytest.approx(norms[1], rel=2e-2)  # free of the scale
    assert {record["loss_scale"] for record in metrics(tmp_path / "half")} == {2.0**14}


def test_the_scale_keeps_small_gradients(workspace: Path, tmp_path: Path) -> None:
    """Gradients that fp16 rounds to nothing at scale 1: 2^-30 of the loss."""
    with pytest.raises(MindSpeedLoraError, match="LoRA B matrices of pipeline stage 0 are exactly zero"):
        run_training(fp16(workspace, loss_scale__constant=2.0**-30))


def test_layouts_agree(pool: ProcessPool, workspace: Path, alone: Path, tmp_path: Path) -> None:
    """TP 2 x PP 2; ZeRO-1 on DP 2."""
    cut = fp16(workspace, save__save=tmp_path / "tp2pp2", parallel__tensor_parallel_size=2, parallel__pipeline_parallel_size=2)
    pool.run(run_training, 4, change(cut, parallel__sequence_parallel=True))
    zero = fp16(workspace, save__save=tmp_path / "dp2", optimizer__use_distributed_optimizer=True)
    pool.run(run_training, 2, zero)
    for name in ("tp2pp2", "dp2"):
        assert losses(tmp_path / name) == pytest.approx(losses(alone), abs=3e-3)
        assert [r["learning_rate"] for r in metrics(tmp_path / name)] == [r["learning_rate"] for r in metrics(alone)]


def overflowing(workspace: Path, save: Path, **changes: Any) -> TrainConfig:
    return fp16(workspace, save__save=save, loss_scale=LossScaleFlags(initial=2.0**22, window=4), train_iters=16, **changes)


def check_recovery(save: Path, text: str) -> None:
    """Skips and halvings, then training; rates stand still while skipping, samples do not."""
    records = metrics(save)
    skipped = [record["skipped_iterations"] for record in records]
    count = skipped.index(0)
    assert 2 <= count <= 10 and skipped[:count] == [1] * count and not any(skipped[count : count + 3])
    assert [r["loss_scale"] for r in records[:count]] == [2.0**22 / 2**step for step in range(count)]  # the first is borne
    assert [r["learning_rate"] for r in records[:count]] == [0.0] * count and records[count]["learning_rate"] > 0
    assert [r["consumed_samples"] for r in records] == [8 * (step + 1) for step in range(16)]
    assert records[0]["lm_loss"] is None and records[0]["grad_norm"] is None and records[count]["grad_norm"] > 0
    assert records[count + 3]["loss_scale"] == 2 * records[count]["loss_scale"]  # window 4
    assert "iteration 1: overflow in fp16 at loss scale 4.1943e+06; skipped, the scale stays" in text
    assert "iteration 2: overflow in fp16 at loss scale 4.1943e+06; skipped, the scale is now 2.09715e+06" in text
    assert "loss scale: 2097152.0 | number of skipped iterations:   1 | number of nan iterations:   0 |" in text
    assert "in fp16 also iterations that overflowed" in text


def test_an_overflow_skips_halves_and_then_trains(workspace: Path, tmp_path: Path) -> None:
    check_recovery(tmp_path / "s", run_training(overflowing(workspace, tmp_path / "s")))
    state = json.loads((tmp_path / "s/iter_0000016/resume/trainer_state.json").read_text())
    skipped = sum(record["skipped_iterations"] for record in metrics(tmp_path / "s"))
    assert state["skipped_iterations"] == skipped and state["optimizer_steps"] == 16 - skipped
    assert state["schedule_samples"] == 8 * (16 - skipped)


def test_all_ranks_skip_alike(pool: ProcessPool, workspace: Path, tmp_path: Path) -> None:
    layout = {"parallel__tensor_parallel_size": 2, "parallel__pipeline_parallel_size": 2}
    check_recovery(tmp_path / "s", pool.run(run_training, 4, overflowing(workspace, tmp_path / "s", **layout))[0])


def test_resume_keeps_the_scale(workspace: Path, tmp_path: Path) -> None:
    """Stopped while it skips and again inside a window: the same bits as without a stop; other flags do not matter."""
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    run_training(overflowing(workspace, whole))
    run_training(change(overflowing(workspace, parted), train_iters=3))
    going = change(overflowing(workspace, parted), load__lora_load=parted, loss_scale__initial=16.0)
    run_training(change(going, train_iters=12))
    assert json.loads((parted / "iter_0000012/resume/trainer_state.json").read_text())["loss_scale"]["good_steps"] > 0
    text = run_training(going)
    kept = ("loss_scale", "lm_loss", "grad_norm", "skipped_iterations", "learning_rate")
    assert [[r[key] for key in kept] for r in metrics(parted)] == [[r[key] for key in kept] for r in metrics(whole)]
    one, other = saved_parameters(parted), saved_parameters(whole)
    assert all(torch.equal(one[name], other[name]) for name in other) and "loss scale 16" not in text
    states = [json.loads((save / "iter_0000016/resume/trainer_state.json").read_text())["loss_scale"] for save in (whole, parted)]
    assert states[0] == states[1] and states[0]["scale"] < 2.0**22


def test_resume_with_and_without_a_scale(workspace: Path, alone: Path, tmp_path: Path) -> None:
    """Without the optimizer's state it starts anew; a state of before there was a scale, and one of bf16, are read."""
    more = change(fp16(workspace, train_iters=9), load__lora_load=alone)
    text = run_training(change(more, load__load_optim=False, loss_scale__initial=32.0))
    assert "masters from the loaded weights, loss scale 32" in text and "| loss scale: 32.0 |" in text
    assert "| loss scale: 1.0 |" in run_training(change(more, runtime__params_dtype="bf16"))
    single = change(make_config(workspace, save__save=tmp_path / "s", train_iters=1))
    run_training(single)
    path = tmp_path / "s/iter_0000001/resume/trainer_state.json"
    state = json.loads(path.read_text())
    assert state.pop("loss_scale") is None
    path.write_text(json.dumps(state))
    text = run_training(fp16(workspace, load__lora_load=tmp_path / "s", train_iters=2, loss_scale__initial=64.0))
    assert "| loss scale: 64.0 |" in text


def wrong_loss(steps: int) -> Any:
    """A loss that is no number in the first ``steps`` steps of a run."""
    from mindspeed_lora.training.loop import Trainer

    real = Trainer._means

    def means(self: Trainer, batch: Any, training: bool) -> list[float]:
        found = real(self, batch, training)
        return [math.nan, *found[1:]] if self.state.iteration <= steps else found

    return means


def test_a_loss_that_is_no_number(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skipped and counted while the scale can fall; at its minimum, or constant, the run stops with the records."""
    from mindspeed_lora.training.loop import Trainer

    monkeypatch.setattr(Trainer, "_means", wrong_loss(2))
    config = fp16(workspace, train_iters=3, save__save=tmp_path / "s")
    text = run_training(config)
    assert text.count("number of skipped iterations:   1 | number of nan iterations:   1 |") == 2
    assert [record["nan_iterations"] for record in metrics(tmp_path / "s")] == [1, 1, 0]
    for scale in ({"loss_scale__minimum": 2.0**14}, {"loss_scale__constant": 2.0**14}):
        with pytest.raises(MindSpeedLoraError, match=r"iteration 1: lm loss nan.*Records of this batch .*: \d+, \d+"):
            run_training(change(config, save__save=None, **scale))


def test_gradients_that_overflow_at_the_minimum_go_on(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in Megatron: the loss is a number, so the next batch may be better. Not for ever, though."""
    config = fp16(workspace, train_iters=2, loss_scale__constant=2.0**40)
    text = run_training(config)
    assert text.count("skipped, the scale stays") == 2
    monkeypatch.setattr(loss_scale, "MOST_OVERFLOWS", 2)
    with pytest.raises(MindSpeedLoraError, match=r"2 steps in a row .* scale 1.09951e\+12, and --loss-scale allows .* --bf16"):
        run_training(config)


def test_only_overflows_in_a_row_at_the_minimum_end_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_scale, "MOST_OVERFLOWS", 3)
    assert scales(FLAGS, "ooooo" + "oo.oo." + "oo")[-1] == FLAGS.minimum  # at it from the fifth on
    with pytest.raises(MindSpeedLoraError, match=r"3 steps in a row .* scale 4, and --min-loss-scale"):
        scales(FLAGS, "ooooo" + "ooo")


def logits_and_scores(base: Path, adapter: Path | None, dtype: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a prompt ``[1, 4, v]``, and log-probabilities of two of its tokens, as inference and evaluation compute them."""
    found: list[torch.Tensor] = []

    def work(engine: Engine) -> None:
        ids = torch.tensor([[5, 9, 200, 31]])
        found.append(engine.forward(ids, torch.ones_like(ids, dtype=torch.bool), use_cache=True, keep_last=4))
        batch = ScoreBatch(ids, torch.tensor([[2, 3]]), torch.tensor([[[31, 31], [7, 8]]]))
        found.append(next(iter(engine.score([batch]))).log_probs.float())

    runtime, load = RuntimeFlags(device="cpu", params_dtype=dtype), LoadFlags(load=base, lora_load=adapter)
    config = InferenceConfig(ParallelFlags(), runtime, load, TokenizerFlags(), TemplateFlags(), tasks=("greedy",))
    assert lead(open_session(config, all_replicas=False), work) == 0
    return found[0], found[1]


def test_asking_in_fp16(workspace: Path, alone: Path, tmp_path: Path) -> None:
    """A base with its adapter by the flag, and a checkpoint of float16 by itself: fp32's answers within its rounding."""
    single = logits_and_scores(workspace / "model", alone, "fp32")
    half = logits_and_scores(workspace / "model", alone, "fp16")
    make_model(tmp_path, "qwen3", "float16")
    write_tokenizer(tmp_path)
    stored, wide = logits_and_scores(tmp_path, None, None), logits_and_scores(tmp_path, None, "fp32")
    for rounded, exact in zip((*half, *stored), (*single, *wide), strict=True):
        torch.testing.assert_close(rounded.float(), exact, atol=1e-2, rtol=1e-2)
        assert not torch.equal(rounded.float(), exact)
