"""``--dry-run``: no device, no data, no torchrun; what does not fit gets advice that fits."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import re
from pathlib import Path

import pytest

from mindspeed_lora.arguments.cli import main
from mindspeed_lora.arguments.configs import LORA_TARGETS
from mindspeed_lora.log import LOGGER_NAME
from mindspeed_lora.training.advice import advise, merge_flags
from mindspeed_lora.training.machines import MACHINES, find_machine
from mindspeed_lora.training.memory import largest_estimate
from mindspeed_lora.training.sizes import RunSizes
from mindspeed_lora.training.step_time import step_time
from mindspeed_lora.weights.config import ModelConfig
from mindspeed_lora.weights.lora_spec import LoraSpec

LORA = LoraSpec(16, 32.0, LORA_TARGETS)
QWEN3_8B = ModelConfig("qwen3", 4096, 12288, 36, 32, 8, 128, 151936, 151936, 1e-6, 1e6, qk_layernorm=True)
CONFIG = dict(
    architectures=["Qwen3ForCausalLM"],
    model_type="qwen3",
    hidden_size=4096,
    intermediate_size=12288,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=151936,
    max_position_embeddings=40960,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    tie_word_embeddings=False,
    torch_dtype="bfloat16",
    hidden_act="silu",
    attention_bias=False,
)


@pytest.fixture(scope="module")
def qwen3_8b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the config.json of Qwen3-8B and no weights."""
    folder = tmp_path_factory.mktemp("qwen3_8b")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def command(folder: Path, *flags: str) -> list[str]:
    words = ["--load", str(folder), "--data-path", "absent", "--train-iters", "10", "--bf16", "--seq-length", "4096", "--dry-run"]
    return [*words, *flags]


def dry_run(folder: Path, *flags: str) -> str:
    """What a dry run says."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logger = logging.getLogger(LOGGER_NAME)
    logger.addHandler(handler)
    try:
        assert main("posttrain_gpt.py", command(folder, *flags)) == 0
    finally:
        logger.removeHandler(handler)
    return stream.getvalue()


LORA_WORDS = ["--lora-target-modules", *LORA_TARGETS, "--lora-fusion"]


def test_it_needs_no_device_no_data_and_no_weights(qwen3_8b: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def touched(*_: object) -> None:
        raise AssertionError("a device was touched")

    for name in ("select_device", "initialize", "build_stage_modules"):
        monkeypatch.setattr(f"mindspeed_lora.training.run.{name}", touched, raising=False)
    monkeypatch.setattr("mindspeed_lora.parallel.context.select_device", touched)
    layout = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "4", "--save", str(tmp_path / "save")]
    text = dry_run(qwen3_8b, *LORA_WORDS, *layout, "--dry-run-devices", "16", "--global-batch-size", "32")
    assert "devices: 16 = TP 2 x PP 4 x DP 2; step: 1 rows x 16 micro-batches x DP 2 = 32 rows of 4096 tokens" in text
    assert re.search(r"memory, GiB +stage 0 +stage 1 +stage 2 +stage 3", text)
    assert "tokens per second" not in text and not (tmp_path / "save").exists()


def test_a_run_that_fits_and_its_time(qwen3_8b: Path) -> None:
    text = dry_run(qwen3_8b, *LORA_WORDS, "--dry-run-machine", "h200")
    assert "devices: 8 = TP 1 x PP 1 x DP 8" in text and "fits: " in text and "step on 8 x H200" in text


def test_a_run_that_does_not_fit_gets_flags_that_make_it_fit(qwen3_8b: Path) -> None:
    flags = ["--micro-batch-size", "4", "--dry-run-machine", "atlas-900-a2"]
    text = dry_run(qwen3_8b, *flags)
    assert "does NOT fit" in text and "--use-distributed-optimizer" in text
    taken = re.search(r"take: (.*)", text)
    assert taken is not None
    words = taken[1].split()
    again = [flag for flag in flags if not (flag in ("--micro-batch-size", "4") and "--micro-batch-size" in words)]
    assert "fits: " in dry_run(qwen3_8b, *again, *words)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dry-run-machine", "cray"], "unknown machine; use atlas-900-a2, h100, h200, rtx4090, laptop"),
        (["--dry-run-devices", "6", "--tensor-model-parallel-size", "4"], "= 4 does not divide it; use a multiple of 4"),
        (["--tensor-model-parallel-size", "3"], "tensor parallel size 3 does not divide"),
    ],
)
def test_refusals(qwen3_8b: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str) -> None:
    assert main("posttrain_gpt.py", command(qwen3_8b, *flags)) == 2
    assert message in capsys.readouterr().err


def test_dry_run_flags_need_dry_run(qwen3_8b: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [word for word in command(qwen3_8b, "--dry-run-machine", "h100") if word != "--dry-run"]
    assert main("posttrain_gpt.py", words) == 2
    assert "--dry-run-machine h100 needs --dry-run" in capsys.readouterr().err


def test_nothing_fits_is_said(qwen3_8b: Path) -> None:
    assert "no combination of these fits" in dry_run(qwen3_8b, "--dry-run-machine", "laptop")


def test_time_obeys_the_formulas_it_states() -> None:
    sizes, machine = RunSizes(QWEN3_8B, LORA, 2), find_machine("h200")
    one = step_time(sizes, machine)
    assert 0.3 < one.utilisation(machine) < machine.matmul_share
    four = step_time(dataclasses.replace(sizes, num_micro_batches=4), machine)
    assert four.parts["matmuls and attention"] == pytest.approx(4 * one.parts["matmuls and attention"])
    piped = step_time(dataclasses.replace(sizes, pp_size=4, num_micro_batches=4), machine)
    busy = sum(value for name, value in piped.parts.items() if name not in ("pipeline bubble", "gradient reduction", "optimizer"))
    assert piped.parts["pipeline bubble"] == pytest.approx(busy * 3 / 4)  # (p - 1) / m of the busy time


def test_advice_fits_and_is_the_fastest_single_change_where_one_is_enough() -> None:
    machine = find_machine("h100")
    sizes = RunSizes(QWEN3_8B, LORA, 2, dp_size=8, micro_batch_size=4)
    singles, together = advise(sizes, machine)
    fitting = [one for one in singles if one.total_bytes <= machine.usable_bytes]
    assert together is not None and fitting and together.seconds == min(one.seconds for one in fitting)
    assert largest_estimate(together.sizes, machine.memory_bytes)[1]["total"] <= machine.usable_bytes
    assert together.sizes.global_batch_size == sizes.global_batch_size and together.sizes.world_size == sizes.world_size


def test_a_later_flag_replaces_an_earlier_one() -> None:
    assert merge_flags("--a 1 --b  --a 2 --c x y") == "--a 2 --b --c x y"


def test_every_machine_is_sensible() -> None:
    for machine in MACHINES:
        assert machine.usable_bytes < machine.memory_bytes and 0 < machine.matmul_share <= 1 and machine.link >= machine.network


def test_a_pair_uses_one_link_of_a_mesh_and_all_of_a_switch() -> None:
    mesh, switch = find_machine("atlas-900-a2"), find_machine("h100")
    assert mesh.link_between(2, 2) == pytest.approx(mesh.link_share * 28e9) and mesh.link_between(8, 8) == mesh.link_share * mesh.link
    assert switch.link_between(2, 2) == switch.link_between(8, 8) == switch.link_share * switch.link
    assert mesh.link_between(2, 16) == mesh.link_share * mesh.network
