"""Runs on preference pairs through ``train``: logs, reference models, resuming, layouts, and pairs that cannot be trained."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import golden, make_model
from pool import ProcessPool
from test_training_preference import BETA, batch_loss, first_pairs, policy_and_reference, preference_config, workspace
from training_helpers import change, make_config, metrics, run_training, saved_parameters, write_pairs, write_tokenizer

from mindspeed_lora.arguments.configs import PreferenceFlags, RecomputeFlags
from mindspeed_lora.data.batches import BatchShape
from mindspeed_lora.data.pairs import make_pair_batch, open_pair_dataset
from mindspeed_lora.errors import CheckpointError, DataError, UsageError

__all__ = ["workspace"]  # the fixture

FIELDS = ("lm_loss", "grad_norm", "rewards_accuracies", "rewards_chosen", "rewards_rejected", "rewards_margins")


def values(save: Path) -> list[list[float]]:
    return [[record[field] for field in FIELDS] for record in metrics(save)]


def validation_losses(save: Path) -> list[float]:
    records = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return [record["validation_loss"] for record in records if "validation_loss" in record]


def test_what_is_logged(workspace: Path, tmp_path: Path) -> None:
    save = tmp_path / "save"
    config = preference_config(workspace, train_iters=2, eval_interval=1, data__split=(80.0, 20.0, 0.0), save__save=save)
    text = run_training(config)
    line = next(line for line in text.splitlines() if "] iteration " in line)
    names = [field.split(":")[0] for field in line.split(" | ")[4:]]
    rewards = ["rewards/accuracies", "rewards/chosen", "rewards/rejected", "rewards/margins"]
    assert names[1 : 2 + len(rewards)] == [*rewards, "lm loss"]
    assert (
        re.search(r" validation loss at iteration 1 \| lm loss value: \S+ \| rewards/accuracies value: \S+ \| ", text) and "PPL" not in text
    )
    assert "shared with the policy: no second model" in text
    _, margins = batch_loss("sigmoid", first_pairs(workspace), *policy_and_reference(workspace, True), BETA)
    first = metrics(save)[0]
    assert first["rewards_margins"] == pytest.approx(np.mean(margins), rel=1e-4)
    assert first["rewards_accuracies"] == pytest.approx(np.mean([margin > 0 for margin in margins]))
    assert first["rewards_chosen"] - first["rewards_rejected"] == pytest.approx(first["rewards_margins"], abs=1e-5)
    validated = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines() if "validation_loss" in line]
    assert set(validated[0]) == {"iteration", "validation_loss", *(f"validation_{name.replace('/', '_')}" for name in rewards)}
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(save / "tensorboard"))
    events.Reload()
    assert {*rewards, "lm loss", "lm loss validation", "rewards/margins validation"} <= set(events.Tags()["scalars"])


@pytest.mark.parametrize("lora", [True, False])
def test_runs_agree_at_every_layout(pool: ProcessPool, workspace: Path, tmp_path: Path, lora: bool) -> None:
    """Pairs that cannot be trained make the ranks' numbers of pairs differ; evaluation included."""
    write_pairs(tmp_path / "pairs", empty=(1, 2, 9))
    more: dict[str, Any] = dict(
        train_iters=3, optimizer__lr_warmup_iters=0, data__data_path=str(tmp_path / "pairs"), data__split=(80.0, 20.0, 0.0), eval_interval=3
    )
    run_training(preference_config(workspace, lora=lora, save__save=tmp_path / "one", **more))
    grid = dict(parallel__tensor_parallel_size=2, parallel__pipeline_parallel_size=2, parallel__sequence_parallel=True)
    if not lora:
        grid = dict(parallel__pipeline_parallel_size=2, parallel__layers_per_virtual_stage=1)
    config = preference_config(
        workspace,
        lora=lora,
        save__save=tmp_path / "many",
        optimizer__use_distributed_optimizer=True,
        recompute=RecomputeFlags("full", "block", 1),
        micro_batch_size=1,
        **grid,
        **more,
    )
    pool.run(run_training, 4, config)
    for one, many in zip(values(tmp_path / "one"), values(tmp_path / "many"), strict=True):
        assert many == pytest.approx(one, rel=2e-4, abs=2e-5)
    first, last = values(tmp_path / "one")[0], values(tmp_path / "one")[-1]
    assert abs(first[0] - last[0]) > 1e-3, "the runs do not move: nothing was compared"
    found = [validation_losses(tmp_path / name) for name in ("one", "many")]
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_the_adapter_that_training_starts_from_is_the_reference(workspace: Path, tmp_path: Path) -> None:
    """Without --ref-model, policy and reference agree at first, and the reference stays; the same adapter may be named."""
    config = preference_config(
        workspace, train_iters=3, preference=PreferenceFlags(beta=BETA), optimizer__lr=1e-2, optimizer__lr_warmup_iters=0
    )
    run_training(change(config, save__save=tmp_path / "own"))
    own = values(tmp_path / "own")
    assert own[0][0] == pytest.approx(math.log(2), rel=1e-6) and own[0][3:] == pytest.approx([0, 0, 0], abs=1e-5)
    assert abs(own[1][0] - own[0][0]) > 1e-3
    for number, folder in enumerate((workspace / "sft", workspace / "sft" / "iter_0000003" / "peft")):
        run_training(change(config, preference__ref_model=folder, save__save=tmp_path / f"named{number}"))
        assert values(tmp_path / f"named{number}") == own


@pytest.mark.parametrize("lora", [True, False])
def test_a_continued_run_keeps_its_reference(workspace: Path, tmp_path: Path, lora: bool) -> None:
    changes = dict(preference=PreferenceFlags(beta=BETA), optimizer__lr=1e-2, optimizer__lr_warmup_iters=0)
    config = preference_config(workspace, lora=lora, **changes)
    run_training(change(config, train_iters=3, save__save=tmp_path / "whole"))
    run_training(change(config, train_iters=2, save__save=tmp_path / "parts"))
    continued = change(config, load__load=tmp_path / "parts", load__lora_load=None, load__finetune=False, train_iters=3)
    text = run_training(change(continued, save__save=tmp_path / "parts"))
    assert f"reference: {workspace / 'model'}" in text and (f"with the adapter {workspace / 'sft'}" in text) == lora
    assert values(tmp_path / "parts") == values(tmp_path / "whole")
    assert abs(values(tmp_path / "whole")[-1][5]) > 0.01
    ours, theirs = (saved_parameters(tmp_path / name, lora) for name in ("parts", "whole"))
    assert all((ours[name] == value).all() for name, value in theirs.items())


def test_a_reference_of_another_rank_is_a_model_of_its_own(workspace: Path, tmp_path: Path) -> None:
    config = make_config(workspace, train_iters=2, lora__r=2, lora__alpha=4.0, optimizer__lr=2e-2, optimizer__lr_warmup_iters=0)
    run_training(change(config, save__save=tmp_path / "small"))
    config = preference_config(workspace, train_iters=1, preference__ref_model=tmp_path / "small", preference__ref_iteration=2)
    text = run_training(change(config, save__save=tmp_path / "save"))
    assert "a frozen copy in memory" in text
    import peft
    import transformers

    policy, _ = policy_and_reference(workspace, True)
    base = transformers.AutoModelForCausalLM.from_pretrained(workspace / "model")
    reference = peft.PeftModel.from_pretrained(base, tmp_path / "small" / "iter_0000002" / "peft")
    import contextlib

    loss, _ = batch_loss("sigmoid", first_pairs(workspace), policy, contextlib.nullcontext(reference), BETA)
    assert values(tmp_path / "save")[0][0] == pytest.approx(float(loss.detach()), rel=1e-5)


@pytest.mark.parametrize("reference", ["model", "other"])
def test_a_base_cut_over_the_replicas_serves_both(pool: ProcessPool, workspace: Path, tmp_path: Path, reference: str) -> None:
    """--fsdp-base: the reference's passes gather the layers as the policy's do, shared with it or a second model."""
    config = preference_config(workspace, preference__ref_model=workspace / reference, train_iters=2, optimizer__lr_warmup_iters=0)
    run_training(change(config, save__save=tmp_path / "one"))
    pool.run(run_training, 2, change(config, save__save=tmp_path / "two", fsdp_base=True))
    for one, two in zip(values(tmp_path / "one"), values(tmp_path / "two"), strict=True):
        assert two == pytest.approx(one, rel=2e-4, abs=2e-5)


def test_pairs_that_train_nothing_are_counted(workspace: Path, tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs", empty=(0, 3), equal=(2,))
    config = preference_config(
        workspace, data__data_path=str(tmp_path / "pairs"), data__seq_length=12, save__save=tmp_path / "s", train_iters=1
    )
    text = run_training(config)
    dataset = open_pair_dataset(tmp_path / "pairs", 12)
    assert "2 of 24 pairs with an answer that has no trained token: skipped" in text
    assert "1 of 24 pairs whose chosen and rejected answers are the same" in text
    assert 0 < dataset.num_cut < 24 and f"{dataset.num_cut} of 24 pairs longer than --seq-length" in text
    assert metrics(tmp_path / "s")[0]["skipped_samples"] == 2
    batch = make_pair_batch(dataset, np.arange(8), BatchShape(2, 8, 0, 1, 12, False, 4, 0))
    assert batch.num_pairs == 6 and batch.micro_batch_size == 4
    assert batch.row_trained_tokens[0] == batch.row_trained_tokens[2] == 0, "pair 0 is chosen row 0, rejected row 2"


def test_long_pairs_share_the_room_by_the_longer_answer(tmp_path: Path) -> None:
    """30 prompt and 20 or 4 answer tokens in 20: int(20 * 20 / 50) = 8 for the answer, 12 for the prompt, of both sides."""
    from mindspeed_lora.data.indexed_dataset import IndexedDatasetBuilder
    from mindspeed_lora.data.sft_dataset import key_stem

    prompt = np.arange(100, 130)
    for side, answer in (("chosen", np.arange(200, 220)), ("rejected", np.arange(300, 304))):
        for key, start in (("input_ids", prompt), ("labels", np.full(30, -100))):
            with IndexedDatasetBuilder(key_stem(tmp_path / "p", f"{side}_{key}")) as builder:
                builder.add_document(np.concatenate([start, answer]))
                builder.finish()
    rows = open_pair_dataset(tmp_path / "p", 20).rows
    assert rows.input_ids[0].tolist() == [*range(100, 112), *range(200, 208)]
    assert rows.input_ids[1].tolist() == [*range(100, 112), *range(300, 304)]
    assert rows.labels[1].tolist() == [*[-100] * 12, *range(300, 304)] and rows.lengths.tolist() == [20, 16]
    assert open_pair_dataset(tmp_path / "p", 50).num_cut == 0


def test_the_peers_files_are_read() -> None:
    case = golden() / "data_pair_qwen3_think_none"
    dataset = open_pair_dataset(case / "output" / "out", 4096)
    expected = json.loads((case / "decoded.json").read_text())
    for row in range(2 * len(dataset)):
        side = ("chosen", "rejected")[row % 2]
        for key, column in (("input_ids", dataset.rows.input_ids), ("labels", dataset.rows.labels)):
            assert column[row].tolist() == expected[f"packed_{side}_{key}_document"]["data"][row // 2]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"data__data_path": "data/set"}, UsageError, "--stage dpo, but --data-path .*set holds instruction data"),
        ({"data__data_path": "data/nothing"}, UsageError, "nothing_packed_chosen_input_ids_document.idx does not exist"),
        (
            {"stage": "sft", "preference": None},
            UsageError,
            "pairs holds preference pairs, and this run trains on single records; add --stage dpo",
        ),
        (
            {"preference__ref_model": "wide"},
            UsageError,
            "--ref-model .*wide is of another architecture .*ffn_hidden_size 128 instead of 96",
        ),
        (
            {"preference__ref_model": "sft", "preference__ref_iteration": 7},
            UsageError,
            "--refer-model-iter 7: .*iter_0000007 does not exist; give an iteration that .*sft holds",
        ),
    ],
)
def test_refusals(workspace: Path, tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    if not (workspace / "wide").exists():
        make_model(workspace / "wide", "qwen3", intermediate_size=128)
        write_tokenizer(workspace / "wide")
    found = {key: (workspace / value if isinstance(value, str) else value) for key, value in changes.items()}
    with pytest.raises(error, match=message):
        run_training(preference_config(workspace, save__save=tmp_path / "save", **found))
    assert not list(tmp_path.iterdir())


def test_a_run_of_the_other_stage_and_a_lost_reference_are_refused(workspace: Path, tmp_path: Path) -> None:
    config = preference_config(workspace, preference=PreferenceFlags(), load__lora_load=workspace / "sft", load__finetune=False)
    with pytest.raises(CheckpointError, match=r"made with stage sft, this one has dpo .--stage."):
        run_training(config)
    make_model(tmp_path / "reference", "qwen3", seed=3)
    run_training(preference_config(workspace, preference__ref_model=tmp_path / "reference", train_iters=1, save__save=tmp_path / "save"))
    (tmp_path / "reference").rename(tmp_path / "moved")
    continued = preference_config(workspace, preference=PreferenceFlags(), load__lora_load=tmp_path / "save", load__finetune=False)
    with pytest.raises(CheckpointError, match=r"reference model of this run, .*reference, is not there any more; say where .* --ref-model"):
        run_training(continued)


def test_no_pair_at_all_and_files_of_different_runs(tmp_path: Path) -> None:
    write_pairs(tmp_path / "a", pairs=3, empty=(0, 1, 2))
    with pytest.raises(DataError, match="every pair has an answer without a trained token"):
        open_pair_dataset(tmp_path / "a", 64)
    write_pairs(tmp_path / "b", pairs=4)
    for ending in ("bin", "idx"):
        (tmp_path / f"b_packed_rejected_labels_document.{ending}").replace(tmp_path / f"a_packed_rejected_labels_document.{ending}")
    with pytest.raises(DataError, match="unlike those of the other files"):
        open_pair_dataset(tmp_path / "a", 64)
