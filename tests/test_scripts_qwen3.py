"""The scripts of examples/mcore/qwen3: defaults, logs, exit codes, and end to end on CPU with a model cut to 2 layers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

SCRIPTS = ROOT / "examples" / "mcore" / "qwen3"
NAMES = [
    "ckpt_convert_qwen3_hf2mcore",
    "data_convert_qwen3_instruction",
    "tune_qwen3_8b_4K_full_ptd",
    "tune_qwen3_8b_4K_lora_ptd",
    "chat_qwen3_8b_ptd",
    "generate_qwen3_8b_ptd",
    "generate_qwen3_8b_lora_ptd",
    "evaluate_qwen3_8b_ptd",
    "evaluate_qwen3_8b_lora_ptd",
    "ckpt_convert_qwen3_mcore2hf_lora",
    "data_convert_qwen3_pairwise",
    "dpo_qwen3_8b_4K_lora_ptd",
]
VARIABLES = (
    *("CKPT_LOAD_DIR", "CKPT_SAVE_DIR", "DATA_PATH", "OUTPUT_PREFIX", "TOKENIZER_PATH", "CHECKPOINT", "CHECKPOINT_LORA", "TASK"),
    *("TP", "PP", "NPUS_PER_NODE", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"),
)


def run_script(name: str, cwd: Path, *arguments: str, timeout_s: float = 300, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a script from ``cwd`` with only ``variables`` of VARIABLES set."""
    environment = {key: value for key, value in os.environ.items() if key not in VARIABLES}
    environment.update({"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **variables})
    command = ["bash", str(SCRIPTS / f"{name}.sh"), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL)


@pytest.fixture
def fake_python(tmp_path: Path) -> Path:
    """An interpreter that prints its arguments one a line and exits with $FAKE_EXIT."""
    path = tmp_path / "fake_python"
    path.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\nexit "${FAKE_EXIT:-0}"\n', encoding="utf-8")
    path.chmod(0o755)
    return path


def test_all_are_there() -> None:
    assert sorted(path.stem for path in SCRIPTS.glob("*.sh")) == sorted([*NAMES, "common"])


@pytest.mark.parametrize("name", NAMES)
def test_exit_code_is_the_programs_and_the_log_has_its_output(name: str, tmp_path: Path, fake_python: Path) -> None:
    for code in (0, 3):
        result = run_script(name, tmp_path, "--extra", "a b", PYTHON=str(fake_python), FAKE_EXIT=str(code))
        assert result.returncode == code, result.stderr
        words = (tmp_path / "logs" / f"{name}.log").read_text(encoding="utf-8").splitlines()
        assert words[-2:] == ["--extra", "a b"], "arguments given to a script come last"


@pytest.mark.parametrize("name", NAMES)
def test_defaults_parse(name: str, tmp_path: Path, fake_python: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mindspeed_lora.arguments.parser import parse

    for folder in ("model_from_hf/qwen3_hf", "model_weights/qwen3_mcore", "ckpt/qwen3-8b-lora", "mmlu/test", "dataset"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "dataset/train-00000-of-00001-a09b74b3ef9c3b56.parquet").write_bytes(b"")
    (tmp_path / "dataset/pairs.json").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    run_script(name, tmp_path, PYTHON=str(fake_python))
    words = (tmp_path / "logs" / f"{name}.log").read_text(encoding="utf-8").splitlines()
    place = next(index for index, word in enumerate(words) if word.startswith(str(ROOT)))
    parse(Path(words[place]).name, words[place + 1 :])


def test_environment_reaches_torchrun_and_the_program(tmp_path: Path, fake_python: Path) -> None:
    run_script(
        "tune_qwen3_8b_4K_lora_ptd",
        tmp_path,
        PYTHON=str(fake_python),
        CKPT_LOAD_DIR="base",
        CKPT_SAVE_DIR="adapter",
        DATA_PATH="tokens",
        TOKENIZER_PATH="tok",
        TP="4",
        PP="1",
        NPUS_PER_NODE="4",
        NNODES="2",
        NODE_RANK="1",
        MASTER_ADDR="10.1.2.3",
        MASTER_PORT="6123",
    )
    text = " ".join((tmp_path / "logs" / "tune_qwen3_8b_4K_lora_ptd.log").read_text(encoding="utf-8").split("\n"))
    for pair in (
        "--nproc_per_node 4",
        "--nnodes 2",
        "--node_rank 1",
        "--master_addr 10.1.2.3",
        "--master_port 6123",
        "--tensor-model-parallel-size 4",
        "--pipeline-model-parallel-size 1",
        "--sequence-parallel",
        "--load base",
        "--save adapter",
        "--data-path tokens",
        "--tokenizer-name-or-path tok",
        "--lora-fusion",
    ):
        assert pair in text, pair


def test_a_failing_program_fails_the_script_with_its_message(tmp_path: Path) -> None:
    result = run_script("ckpt_convert_qwen3_hf2mcore", tmp_path, CKPT_LOAD_DIR="no-such-folder")
    assert result.returncode == 2
    assert "no-such-folder" in result.stdout and "Traceback" not in result.stdout
    assert "no-such-folder" in (tmp_path / "logs" / "ckpt_convert_qwen3_hf2mcore.log").read_text(encoding="utf-8")
    assert not (tmp_path / "model_weights").exists()


CUT = dict(
    num_layers=2, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, num_query_groups=2, kv_channels=32, padded_vocab_size=640
)
CUT_ARGUMENTS = [word for name, value in CUT.items() for word in (f"--{name.replace('_', '-')}", str(value))]
TRAIN_ARGUMENTS = ["--train-iters", "2", "--global-batch-size", "4", "--seq-length", "128", "--save-interval", "2"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a 2-layer model where the scripts look for Qwen3-8B, and data; the tests below fill it in their order."""
    import torch
    import transformers
    from test_repo_docs import QUICKSTART, load_quickstart

    folder = tmp_path_factory.mktemp("qwen3")
    model = folder / "model_from_hf" / "qwen3_hf"
    model.mkdir(parents=True)
    load_quickstart("make_model").make_tokenizer(model)
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=CUT["padded_vocab_size"],
        hidden_size=CUT["hidden_size"],
        intermediate_size=CUT["ffn_hidden_size"],
        num_hidden_layers=CUT["num_layers"],
        num_attention_heads=CUT["num_attention_heads"],
        num_key_value_heads=CUT["num_query_groups"],
        head_dim=CUT["kv_channels"],
        max_position_embeddings=40960,
        rope_theta=1000000.0,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
    )
    transformers.Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(model)
    (folder / "mmlu").symlink_to(QUICKSTART / "mmlu")
    (folder / "records.json").symlink_to(QUICKSTART / "new_facts.json")
    return folder


def run_step(name: str, workplace: Path, *arguments: str, **variables: str) -> str:
    """Run a script of the six steps, on CPU; its output, exit code 0 required."""
    port = str(20000 + os.getpid() % 20000)
    result = run_script(name, workplace, "--device", "cpu", *arguments, NPUS_PER_NODE="2", MASTER_PORT=port, **variables)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert result.stdout.splitlines()[1:] == (workplace / "logs" / f"{name}.log").read_text(encoding="utf-8").splitlines()
    return result.stdout


def test_step_1_convert(workplace: Path) -> None:
    result = run_script("ckpt_convert_qwen3_hf2mcore", workplace)
    assert result.returncode == 0, result.stdout + result.stderr
    files = sorted(path.parent.name for path in workplace.glob("model_weights/qwen3_mcore/iter_0000001/*/model_optim_rng.pt"))
    assert files == ["mp_rank_00_000", "mp_rank_00_001"]


def test_step_2_preprocess(workplace: Path) -> None:
    result = run_script("data_convert_qwen3_instruction", workplace, "--workers", "1", DATA_PATH="records.json")
    assert result.returncode == 0, result.stdout + result.stderr
    assert (workplace / "finetune_dataset" / "alpaca_packed_input_ids_document.bin").stat().st_size > 0


def test_step_3_full(workplace: Path) -> None:
    run_step("tune_qwen3_8b_4K_full_ptd", workplace, *CUT_ARGUMENTS, *TRAIN_ARGUMENTS)
    assert (workplace / "ckpt/qwen3-8b-full/latest_checkpointed_iteration.txt").read_text(encoding="utf-8").strip() == "2"


def test_step_3_lora(workplace: Path) -> None:
    run_step("tune_qwen3_8b_4K_lora_ptd", workplace, *CUT_ARGUMENTS, *TRAIN_ARGUMENTS)
    assert (workplace / "ckpt/qwen3-8b-lora/latest_checkpointed_iteration.txt").read_text(encoding="utf-8").strip() == "2"
    assert (workplace / "ckpt/qwen3-8b-lora/iter_0000002/peft/adapter_model.safetensors").is_file()


@pytest.mark.parametrize("name", ["generate_qwen3_8b_ptd", "generate_qwen3_8b_lora_ptd"])
def test_step_4_ask(name: str, workplace: Path) -> None:
    output = run_step(name, workplace, *CUT_ARGUMENTS, "--max-new-tokens", "4", TASK="greedy")
    assert "how are you?" in output and "MindSpeed-LLM:" in output


@pytest.mark.parametrize("name", ["evaluate_qwen3_8b_ptd", "evaluate_qwen3_8b_lora_ptd"])
def test_step_5_score(name: str, workplace: Path) -> None:
    output = run_step(name, workplace, *CUT_ARGUMENTS, "--max-eval-samples", "2", "--num-fewshot", "1")
    assert "mmlu acc = " in output and "/8=" in output


def test_step_6_merge(workplace: Path) -> None:
    from transformers import AutoModelForCausalLM

    result = run_script("ckpt_convert_qwen3_mcore2hf_lora", workplace)
    assert result.returncode == 0, result.stdout + result.stderr
    model = AutoModelForCausalLM.from_pretrained(workplace / "model_from_hf/qwen3_hf/mg2hg")
    assert model.config.num_hidden_layers == CUT["num_layers"]


def test_preference_pairs(workplace: Path) -> None:
    records = json.loads((workplace / "records.json").read_text(encoding="utf-8"))[:8]
    pairs = [{"instruction": record["instruction"], "chosen": record["output"], "rejected": "I do not know."} for record in records]
    (workplace / "pairs.json").write_text(json.dumps(pairs), encoding="utf-8")
    result = run_script("data_convert_qwen3_pairwise", workplace, "--workers", "1", DATA_PATH="pairs.json")
    assert result.returncode == 0, result.stdout + result.stderr
    output = run_step("dpo_qwen3_8b_4K_lora_ptd", workplace, *CUT_ARGUMENTS, *TRAIN_ARGUMENTS, CKPT_LOAD_DIR="model_from_hf/qwen3_hf")
    assert "rewards/accuracies: " in output and "shared with the policy" in output
    assert (workplace / "ckpt/qwen3-8b-dpo/iter_0000002/peft/adapter_model.safetensors").is_file()
