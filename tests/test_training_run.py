"""One run: its line, records, reports, guards, files, and every refusal before anything is written."""

from __future__ import annotations

import dataclasses
import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import golden, make_model
from pool import ProcessPool
from training_helpers import TARGETS, change, losses, make_config, make_workspace, metrics, run_training, write_data, write_tokenizer

from mindspeed_lora.arguments.configs import LoraFlags, TrainConfig
from mindspeed_lora.errors import MindSpeedLoraError, UsageError
from mindspeed_lora.manifest import read_manifest, verify_parts
from mindspeed_lora.parallel.context import build_context, single_process_context
from mindspeed_lora.training.flat import TrainedParameter
from mindspeed_lora.training.guards import check_finite, check_replicas
from mindspeed_lora.training.preflight import plan_training
from mindspeed_lora.training.report import IterationReport
from mindspeed_lora.weights.sources import open_adapter


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("workspace"))


@pytest.fixture(scope="module")
def run(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Text and folder of a LoRA run of two iterations with evaluation."""
    save = tmp_path_factory.mktemp("run") / "save"
    config = make_config(workspace, save__save=save, train_iters=2, log_throughput=True, eval_interval=1, data__split=(80.0, 20.0, 0.0))
    return run_training(config), save


def test_iteration_line(run: tuple[str, Path]) -> None:
    """Names, order and widths as MindSpeed-LLM prints them."""
    line = next(line for line in run[0].splitlines() if "] iteration " in line)
    fields = line.strip().removesuffix("|").split(" | ")
    assert re.fullmatch(r"\[[-0-9]{10} [:0-9]{8}\] iteration        1/       2", fields[0])
    assert fields[1] == "consumed samples:            8"
    names = [field.split(":")[0] for field in fields[2:]]
    assert names == [
        "elapsed time per iteration (ms)",
        "throughput per GPU (TFLOP/s/GPU)",
        "core attn ratio (%)",
        "learning rate",
        "global batch size",
        "lm loss",
        "loss scale",
        "grad norm",
        "number of skipped iterations",
        "number of nan iterations",
    ]
    assert (
        "learning rate: 5.000000E-04" in line and re.search(r"lm loss: \d\.\d{6}E\+00 ", line) and re.search(r"grad norm: \d\.\d{3} ", line)
    )


def test_line_leaves_out_what_is_not_there() -> None:
    report = IterationReport(3, 9, 24, 2, 1.0, 1e-3, 8, None, None, 1, 0.0, 0.0, 0.0)
    assert report.line(False, datetime(2026, 1, 2, 3, 4, 5)) == (
        " [2026-01-02 03:04:05] iteration        3/       9 | consumed samples:           24 | skipped samples:            2 | "
        "elapsed time per iteration (ms): 1.0 | learning rate: 1.000000E-03 | global batch size:     8 | loss scale: 1.0 | "
        "number of skipped iterations:   1 | number of nan iterations:   0 |"
    )


def test_validation_and_reports(run: tuple[str, Path]) -> None:
    text, save = run
    assert len(re.findall(r"validation loss at iteration \d \| lm loss value: \S+ \| lm loss PPL: \S+ \|", text)) == 2
    assert "base 35, adapter 0, missing 0, unexpected 0" in text
    assert "trainable parameters: 14,848 of 228,544" in text
    assert re.search(r"saving checkpoint at iteration       2 to .* in torch format", text)
    assert f"--lora-load {save}" in text and "convert_ckpt.py" in text and "inference.py" in text


def test_records(run: tuple[str, Path]) -> None:
    records = [json.loads(line) for line in (run[1] / "metrics.jsonl").read_text().splitlines()]
    assert [sorted(record) for record in records[:2]][1] == ["iteration", "validation_loss"]
    assert all(record["tokens_per_second_per_device"] > 0 for record in metrics(run[1]))
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run[1] / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("lm loss")] == pytest.approx(losses(run[1]))


def test_manifest_says_what_the_next_step_needs(run: tuple[str, Path], workspace: Path) -> None:
    manifest = json.loads((run[1] / "iter_0000002" / "mindspeed_lora.json").read_text())
    assert manifest["kind"] == "adapter" and manifest["iteration"] == 2
    assert manifest["lora"] == {"r": 4, "alpha": 8.0, "targets": list(TARGETS)}
    assert manifest["base"]["path"] == str(workspace / "model") and manifest["base"]["fingerprint"].startswith("sha256:")
    assert {part["file"] for part in manifest["parts"]} >= {"mp_rank_00/model_optim_rng.pt", "peft/adapter_model.safetensors"}


def test_the_peft_folder_alone_knows_its_base_and_form(run: tuple[str, Path]) -> None:
    folder = run[1] / "iter_0000002"
    own, whole = read_manifest(folder / "peft"), read_manifest(folder)
    assert own is not None and whole is not None and own.kind == "adapter" and own.base
    assert [own.base, own.lora, own.template, own.tokenizer] == [whole.base, whole.lora, whole.template, whole.tokenizer]
    assert open_adapter(folder / "peft").base_reference == own.base, "so that another base is refused"
    verify_parts(folder / "peft", own)
    assert {part.file for part in own.parts} == {"adapter_config.json", "adapter_model.safetensors"}


def test_peft_loads_the_exported_adapter_and_gives_our_loss(run: tuple[str, Path], workspace: Path) -> None:
    import peft
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(workspace / "model")
    model = peft.PeftModel.from_pretrained(base, run[1] / "iter_0000002" / "peft")
    from mindspeed_lora.data.sft_dataset import open_sft_dataset, split_ranges

    dataset = open_sft_dataset(workspace / "data" / "set")
    total, tokens = 0.0, 0
    for index in split_ranges(len(dataset), (80.0, 20.0, 0.0))[1]:
        ids, labels = (torch.from_numpy(values)[None] for values in dataset[index])
        count = int((labels[:, 1:] != -100).sum())
        total += float(model(input_ids=ids, labels=labels).loss.detach()) * count
        tokens += count
    reported = float(re.findall(r"lm loss value: (\S+)", run[0])[-1])
    assert total / tokens == pytest.approx(reported, rel=1e-5)


@pytest.mark.parametrize("filtered", [True, False])
def test_saved_names_and_shapes_are_the_peers(pool: ProcessPool, tmp_path: Path, filtered: bool) -> None:
    keys = json.loads((golden() / "lora_state_dict_keys_qwen3_tp2pp2.json").read_text())
    layers = {name.split(".")[2] for name in keys["tp0pp0"] if name.startswith("decoder.layers.")}
    shape = dict(num_hidden_layers=2 * len(layers), num_attention_heads=4, num_key_value_heads=2, head_dim=32)
    make_model(tmp_path / "model", "qwen3", "bfloat16", **shape)
    write_tokenizer(tmp_path / "model")
    write_data(tmp_path / "data" / "set")
    layout = {"parallel__tensor_parallel_size": 2, "parallel__pipeline_parallel_size": 2, "runtime__params_dtype": "bf16"}
    config = make_config(tmp_path, lora=LoraFlags(8, 16.0, TARGETS), train_iters=1, save__save=tmp_path / "save", **layout)
    pool.run(run_training, 4, change(config, save__lora_ckpt_filter=filtered))
    assert sorted(keys) == ["tp0pp0", "tp0pp1", "tp1pp0", "tp1pp1"]
    for rank, expected in keys.items():
        folder = tmp_path / "save" / "iter_0000001" / f"mp_rank_{int(rank[2]):02d}_{int(rank[5]):03d}"
        model = _load(folder / "model_optim_rng.pt")["model"]
        found = {name: [list(value.shape), str(value.dtype)] for name, value in model.items()}
        assert found == {name: value for name, value in expected.items() if value is not None and (not filtered or "lora" in name)}


def _load(path: Path) -> dict[str, Any]:
    from mindspeed_lora.weights.torch_files import load_torch_file

    return load_torch_file(path)


def test_one_file_with_base_and_adapter_continues_alone(workspace: Path, tmp_path: Path) -> None:
    save = tmp_path / "save"
    run_training(make_config(workspace, save__save=save, save__lora_ckpt_filter=False, train_iters=2))
    names = _load(save / "iter_0000002" / "mp_rank_00" / "model_optim_rng.pt")["model"]
    assert "decoder.layers.0.mlp.linear_fc1.base_layer.weight" in names and "output_layer.weight" in names
    text = run_training(make_config(workspace, load__load=save, save__save=save, train_iters=3))
    assert "holds base and adapter together" in text
    assert [record["iteration"] for record in metrics(save)] == [1, 2, 3]


def test_virtual_stages_save_as_model0_and_model1(pool: ProcessPool, workspace: Path, tmp_path: Path) -> None:
    config = make_config(
        workspace, parallel__pipeline_parallel_size=2, parallel__layers_per_virtual_stage=1, save__save=tmp_path / "s", train_iters=1
    )
    pool.run(run_training, 2, dataclasses.replace(config, lora=None))
    first, last = (_load(tmp_path / "s" / "iter_0000001" / f"mp_rank_00_00{stage}" / "model_optim_rng.pt") for stage in (0, 1))
    assert "embedding.word_embeddings.weight" in first["model0"] and "embedding.word_embeddings.weight" not in first["model1"]
    assert "output_layer.weight" in last["model1"] and all("layers.1." not in name for name in last["model1"])


def test_masked_samples_and_batches_are_counted(tmp_path: Path) -> None:
    make_workspace(tmp_path)
    write_data(tmp_path / "data" / "set", masked=(0, 1, 2, 3, 9))
    config = make_config(tmp_path, global_batch_size=4, train_iters=3, data__shuffle=False, save__save=tmp_path / "s")
    text = run_training(config)
    assert "iteration 1: no trained token" in text
    records = metrics(tmp_path / "s")
    assert [record["skipped_iterations"] for record in records] == [1, 0, 0]
    assert [record["skipped_samples"] for record in records] == [4, 4, 5]
    assert records[0]["lm_loss"] is None and records[0]["learning_rate"] == 0.0


def first_loss(config: TrainConfig) -> float:
    from layout_cells import run_cell

    return run_cell(config, 1).losses[0]


def test_loss_normalizations(pool: ProcessPool, workspace: Path) -> None:
    """Token: sum / tokens. Micro-batch: the mean of micro-batches' means."""
    from mindspeed_lora.data.batches import StepBatches
    from mindspeed_lora.data.sft_dataset import open_sft_dataset

    config = make_config(workspace, data__shuffle=False)
    dataset = open_sft_dataset(workspace / "data" / "set")
    batch = next(iter(StepBatches(dataset, range(24), 0, False, 2, 8, 0, 1, 32, False, 4, 0)))
    one_row = make_config(workspace, data__shuffle=False, micro_batch_size=1, global_batch_size=1)
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(workspace / "model")
    sums, counts = [], []
    for row in range(8):
        ids, labels = (torch.from_numpy(values)[None] for values in dataset[row])
        counts.append(int((labels[:, 1:] != -100).sum()))
        sums.append(float(model(input_ids=ids, labels=labels).loss.detach()) * counts[-1])
    assert batch.num_trained_tokens == sum(counts)
    assert first_loss(config) == pytest.approx(sum(sums) / sum(counts), rel=1e-5)
    means = [(sums[row] + sums[row + 1]) / (counts[row] + counts[row + 1]) for row in range(0, 8, 2)]
    peers = change(config, loss_normalization="micro-batch")
    assert first_loss(peers) == pytest.approx(sum(means) / 4, rel=1e-5)
    assert pool.run(first_loss, 2, peers) == pytest.approx([sum(means) / 4] * 2, rel=1e-5)
    assert first_loss(one_row) == pytest.approx(sums[0] / counts[0], rel=1e-5)


def test_a_loss_that_is_no_number_stops_and_names_the_records(workspace: Path, tmp_path: Path) -> None:
    with pytest.raises(MindSpeedLoraError, match=r"lm loss (nan|inf|\d).*grad norm.*Records of this batch .*: \d+, \d+"):
        run_training(
            make_config(
                workspace, optimizer__lr=1e30, optimizer__min_lr=0.0, optimizer__clip_grad=0.0, save__save=tmp_path / "s", train_iters=9
            )
        )
    assert not (tmp_path / "s" / "latest_checkpointed_iteration.txt").exists()


def test_non_finite_norm_alone_is_caught() -> None:
    check_finite(1.0, 1.0, 1, [3])
    with pytest.raises(MindSpeedLoraError, match="grad norm inf"):
        check_finite(1.0, float("inf"), 1, [3])


def test_an_adapter_that_changes_nothing_is_reported(workspace: Path) -> None:
    assert "the adapter changes nothing" in run_training(make_config(workspace, train_iters=1))  # rate 0 at the first step of a warm-up
    assert "changes nothing" not in run_training(make_config(workspace, train_iters=2))


def test_dead_lora_gradients_stop_the_run(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mindspeed_lora.training import gradients

    monkeypatch.setattr(gradients, "_accumulate_into", lambda view: lambda parameter: None)
    with pytest.raises(MindSpeedLoraError, match="LoRA B matrices of pipeline stage 0 are exactly zero"):
        run_training(make_config(workspace))


def replicas(differ: bool) -> str:
    """In one of two tensor-parallel groups they differ."""
    context = build_context(torch.device("cpu"), tensor_parallel_size=2)
    weight = torch.nn.Parameter(torch.full((2,), 1.0 + differ * (context.rank == 1)))
    try:
        named = [TrainedParameter("decoder.final_layernorm.weight", weight)]
        check_replicas(named, context)
    except MindSpeedLoraError as error:
        return str(error)
    return ""


def test_replicas_that_differ_are_named(pool: ProcessPool) -> None:
    assert pool.run(replicas, 4, False) == [""] * 4
    assert all("rank 0: decoder.final_layernorm.weight differs" in text for text in pool.run(replicas, 4, True)), "both groups stop"
    check_replicas([], single_process_context())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"global_batch_size": 7}, UsageError, "--global-batch-size 7 must be a multiple of --micro-batch-size 2"),
        ({"train_iters": 0}, UsageError, "--train-iters 0"),
        ({"load__load": None}, UsageError, "--load is missing"),
        ({"load__load": None, "load__lora_load": Path("x")}, UsageError, "--load is missing"),
        ({"load__load": Path("/nowhere")}, MindSpeedLoraError, "/nowhere"),
        ({"data__data_path": "/nowhere/set"}, MindSpeedLoraError, "--data-path /nowhere/set"),
        ({"runtime__params_dtype": "fp8"}, UsageError, "training in fp8 is not supported; pass --bf16, --fp16"),
        ({"data__seq_length": 1}, UsageError, "--seq-length 1"),
        ({"data__pad_to_multiple_of": 0}, UsageError, "--pad-to-multiple-of 0"),
        ({"lora": LoraFlags(r=4)}, UsageError, "--lora-target-modules"),
        ({"lora": LoraFlags(targets=("linear_q",))}, UsageError, "linear_q"),
        ({"parallel__tensor_parallel_size": 2}, UsageError, "does not divide the number of processes, 1"),
        ({"architecture__num_layers": 7}, UsageError, "--num-layers 7"),
    ],
)
def test_refusals_write_nothing(workspace: Path, tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run_training(make_config(workspace, save__save=tmp_path / "save", **changes))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("world_size", "changes", "message"),
    [
        ("8", {"parallel__tensor_parallel_size": 8, "parallel__sequence_parallel": True}, "tensor parallel size 8 does not divide"),
        ("3", {"parallel__pipeline_parallel_size": 3, "micro_batch_size": 1}, "pipeline parallel size 3 does not divide"),
        (
            "2",
            {"parallel__pipeline_parallel_size": 2, "parallel__layers_per_virtual_stage": 3},
            "--num-layers-per-virtual-pipeline-stage 3",
        ),
        (
            "2",
            {
                "parallel__tensor_parallel_size": 2,
                "parallel__sequence_parallel": True,
                "data__seq_length": 31,
                "data__pad_to_seq_length": True,
            },
            "--seq-length 31 is not divisible",
        ),
    ],
)
def test_layouts_that_do_not_fit_are_refused(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world_size: str, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", world_size)
    with pytest.raises(UsageError, match=message):
        run_training(make_config(workspace, save__save=tmp_path / "save", **changes))
    assert not list(tmp_path.iterdir())


def test_data_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    make_workspace(tmp_path)
    make_model(tmp_path / "small", vocab_size=100)
    write_tokenizer(tmp_path / "small")
    with pytest.raises(MindSpeedLoraError, match="vocabulary has 100 tokens"):
        run_training(make_config(tmp_path, load__load=tmp_path / "small"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fsdp_base": True, "lora": None}, "--fsdp-base without LoRA: all weights are trained"),
        ({"runtime__qlora": True, "lora": None}, "--qlora without LoRA: all weights are trained"),
        ({"fsdp_base": True, "save__lora_ckpt_filter": False}, "--fsdp-base with --no-lora-ckpt-filter: no rank holds the whole base"),
    ],
)
def test_a_base_on_demand_needs_a_frozen_base_and_adapter_saves(workspace: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run_training(make_config(workspace, **changes))


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"fsdp_base": True}, "--fsdp-base has no effect with one data-parallel rank: there is nothing to cut the base over"),
        ({"optimizer__use_distributed_optimizer": True}, "--use-distributed-optimizer has no effect with one data-parallel rank: "),
        ({"eval_interval": 1}, "--eval-interval 1 has no effect: --split 100,0,0 leaves none of the 24 samples for validation"),
        ({"load__load_optim": False, "load__load_rng": False}, "--no-load-optim --no-load-rng: no training state is continued"),
        ({"template__prompt_type": "default", "data__pack": True}, "--prompt-type --pack: "),
    ],
)
def test_flags_that_change_nothing_here_are_named(workspace: Path, changes: dict[str, Any], note: str) -> None:
    assert not [other for other in plan_training(make_config(workspace), 1).notes if note in other]
    assert [other for other in plan_training(make_config(workspace, **changes), 1).notes if note in other]
