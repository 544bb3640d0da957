"""The generate, chat and evaluate scripts of Llama-3 and Qwen2.5, run on CPU with models of their families cut to 2 layers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from evaluation_helpers import peft_adapter, small_benchmarks
from helpers import ROOT, make_model, shared_data

pytestmark = pytest.mark.slow
CUT = dict(num_layers=2, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, num_query_groups=2)
CUT_ARGUMENTS = [word for name, value in CUT.items() for word in (f"--{name.replace('_', '-')}", str(value))]
OWN_CONFIG: dict[str, dict[str, Any]] = {
    "llama3": dict(family="llama", vocab_size=128256, rope_theta=500000.0, rms_norm_eps=1e-5, max_position_embeddings=8192),
    "qwen25": dict(family="qwen2", vocab_size=152064, rope_theta=1000000.0, rms_norm_eps=1e-6, max_position_embeddings=32768),
}
TOKENIZERS = {"llama3": "llama3-tokenizer", "qwen25": "qwen2.5-tokenizer"}
SIZES = {"llama3": "8b", "qwen25": "7b"}


@pytest.fixture(scope="module", params=["llama3", "qwen25"])
def workplace(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The family, and a folder with a model, its tokenizer, an adapter and MMLU where the scripts look for them."""
    family, folder = request.param, tmp_path_factory.mktemp("family")
    model = folder / "model_from_hf" / f"{family}_hf"
    make_model(
        model,
        dtype="bfloat16",
        num_hidden_layers=CUT["num_layers"],
        hidden_size=CUT["hidden_size"],
        intermediate_size=CUT["ffn_hidden_size"],
        num_attention_heads=CUT["num_attention_heads"],
        num_key_value_heads=CUT["num_query_groups"],
        **OWN_CONFIG[family],
    )
    for file in (shared_data() / TOKENIZERS[family]).glob("*.json"):
        (model / file.name).write_bytes(file.read_bytes())
    adapter = folder / "ckpt" / f"{family}-{SIZES[family]}-lora"
    peft_adapter(model, adapter)
    (folder / "model_weights").mkdir()
    (folder / "model_weights" / f"{family}_mcore").symlink_to(model)
    small_benchmarks(folder / "data")
    (folder / "mmlu").symlink_to(folder / "data" / "mmlu")
    return family, folder


def run_script(workplace: tuple[str, Path], kind: str, *arguments: str, typed: str = "", **variables: str) -> str:
    """Output of ``<kind>_<model>_ptd.sh`` with two processes on CPU; exit code 0 required."""
    family, folder = workplace
    name = kind.replace("*", f"{family}_{SIZES[family]}")
    own = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "NPUS_PER_NODE": "2", "PP": "2", "TP": "1"}
    environment = {**os.environ, **own, "MASTER_PORT": str(20000 + os.getpid() % 20000), **variables}
    command = ["bash", str(ROOT / "examples" / "mcore" / family / f"{name}.sh"), "--device", "cpu", *CUT_ARGUMENTS, *arguments]
    result = subprocess.run(command, cwd=folder, env=environment, input=typed, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    return result.stdout


LORA = ("--lora-r", "4", "--lora-alpha", "8")


def test_generate(workplace: tuple[str, Path]) -> None:
    output = run_script(workplace, "generate_*_ptd", "--max-new-tokens", "4")
    assert "Greedy Search" in output and "Do Sample" in output and output.count("MindSpeed-LLM:") == 2, output


def test_generate_with_the_adapter(workplace: tuple[str, Path]) -> None:
    output = run_script(workplace, "generate_*_lora_ptd", "--max-new-tokens", "4", *LORA, TASK="greedy", TP="2", PP="1")
    assert "MindSpeed-LLM:" in output and "adapter tensors, 0 missing" in output, output


def test_chat(workplace: tuple[str, Path]) -> None:
    family, _ = workplace
    output = run_script(
        workplace, "chat_*_ptd", "--max-new-tokens", "4", "--lora-r", "4", "--lora-alpha", "8", typed="Hello there\nclear\nAnd now?\nq\n",
        CHECKPOINT_LORA=f"./ckpt/{family}-{SIZES[family]}-lora",
    )  # fmt: skip
    assert output.count("MindSpeed-LLM:") == 2, output


@pytest.mark.parametrize("kind", ["evaluate_*_ptd", "evaluate_*_lora_ptd"])
def test_evaluate(workplace: tuple[str, Path], kind: str) -> None:
    more = (*LORA, "--compare-base") if "lora" in kind else ()
    output = run_script(workplace, kind, "--max-eval-samples", "2", "--num-fewshot", "1", *more)
    assert "mmlu acc = " in output and "/4=" in output and ("mmlu: base " in output) == ("lora" in kind), output
