"""A whole run at TP2 x PP2 x DP2 with sequence parallelism against one process, and against transformers, peft and torch's AdamW.

Everything that a step has is at work: several micro-batches of uneven lengths, warm-up and cosine, weight decay, clipping, an epoch that
ends inside a batch. A micro-batch's mean instead of its sum, decay times another rate, or a rate one step late is off by per cents.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_helpers import ALL, load_peft, make_adapter
from pool import ProcessPool
from safetensors.torch import load_file
from training_helpers import make_config, make_workspace, metrics, run_training, write_data

from mindspeed_lora.arguments.configs import LoraFlags, TrainConfig
from mindspeed_lora.data.sft_dataset import open_sft_dataset

STEPS, WARMUP, GLOBAL_BATCH, SAMPLES = 20, 4, 8, 21
TOLERANCE = 1e-5
LAYOUT = {
    "parallel__tensor_parallel_size": 2,
    "parallel__pipeline_parallel_size": 2,
    "parallel__sequence_parallel": True,
    "optimizer__use_distributed_optimizer": True,
}


@dataclass(frozen=True)
class Run:
    """Of every step: loss, norm before clipping, rate after it. ``adapter``: at the end, by peft's names."""

    losses: list[float]
    norms: list[float]
    rates: list[float]
    adapter: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_workspace(tmp_path_factory.mktemp("end_to_end"))
    make_adapter(folder / "model", folder / "adapter", size=0.05, target_modules=ALL)
    write_data(folder / "data" / "odd", samples=SAMPLES)
    return folder


def config_of(workspace: Path, save: Path, **changes: Any) -> TrainConfig:
    return make_config(
        workspace,
        load__lora_load=workspace / "adapter",
        load__finetune=True,
        lora=LoraFlags(fusion=True),
        save__save=save,
        data__data_path=str(workspace / "data" / "odd"),
        data__shuffle=False,
        optimizer__lr=2e-3,
        optimizer__min_lr=0.0,
        optimizer__lr_decay_iters=None,
        optimizer__lr_warmup_iters=WARMUP,
        optimizer__weight_decay=0.1,
        optimizer__clip_grad=0.3,
        micro_batch_size=1,
        global_batch_size=GLOBAL_BATCH,
        train_iters=STEPS,
        **changes,
    )


def ours(save: Path) -> Run:
    columns = [[record[name] for record in metrics(save)] for name in ("lm_loss", "grad_norm", "learning_rate")]
    return Run(*columns, load_file(save / f"iter_{STEPS:07d}/peft/adapter_model.safetensors"))


def peft_and_torch(workspace: Path, config: TrainConfig) -> Run:
    """The same steps with nothing of ours but the data's reader."""
    import transformers

    model = load_peft(workspace / "model", workspace / "adapter", trainable=True)
    parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
    flags, dataset = config.optimizer, open_sft_dataset(config.data.data_path)
    adam = torch.optim.AdamW(parameters.values(), flags.lr, (flags.adam_beta1, flags.adam_beta2), flags.adam_eps, flags.weight_decay)
    schedule = transformers.get_cosine_schedule_with_warmup(adam, WARMUP, STEPS)
    found = Run([], [], [], {})
    for step in range(STEPS):
        samples = [[torch.from_numpy(each) for each in dataset[(GLOBAL_BATCH * step + row) % SAMPLES]] for row in range(GLOBAL_BATCH)]
        tokens = sum(int((labels[1:] != -100).sum()) for _, labels in samples)
        loss = 0.0
        for ids, labels in samples:
            logits = model(input_ids=ids[None]).logits[0, :-1]
            share = torch.nn.functional.cross_entropy(logits, labels[1:].long(), reduction="sum") / tokens
            share.backward()
            loss += share.item()
        found.norms.append(float(torch.nn.utils.clip_grad_norm_(parameters.values(), flags.clip_grad)))
        adam.step()
        schedule.step()
        adam.zero_grad()
        found.losses.append(loss)
        found.rates.append(schedule.get_last_lr()[0])
    found.adapter.update({name.replace(".default", ""): each.detach() for name, each in parameters.items()})
    return found


def assert_same(one: Run, other: Run) -> None:
    assert one.losses == pytest.approx(other.losses, rel=TOLERANCE)
    assert one.norms == pytest.approx(other.norms, rel=TOLERANCE)
    assert one.rates == pytest.approx(other.rates, rel=TOLERANCE, abs=1e-12)
    assert one.adapter.keys() == other.adapter.keys()
    for name, value in one.adapter.items():
        assert float((value - other.adapter[name]).abs().max()) <= TOLERANCE, name


@pytest.mark.slow
def test_eight_ranks_train_what_one_process_and_peft_with_torch_train(pool: ProcessPool, workspace: Path, tmp_path: Path) -> None:
    config = config_of(workspace, tmp_path / "eight", **LAYOUT)
    pool.run(run_training, 8, config)
    run_training(config_of(workspace, tmp_path / "one"))
    eight, expected = ours(tmp_path / "eight"), peft_and_torch(workspace, config)
    assert len(eight.losses) == STEPS and sum(norm > config.optimizer.clip_grad for norm in expected.norms) > STEPS // 2
    assert_same(ours(tmp_path / "one"), expected)
    assert_same(eight, expected)
    start = load_file(workspace / "adapter/adapter_model.safetensors")
    assert all(float((eight.adapter[name] - value).abs().max()) > 100 * TOLERANCE for name, value in start.items()), "all was trained"
