"""Real tokenizer, real records, real trained weights, through the entry points. Minutes each: run with ``pytest -m slow``."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from evaluation_helpers import config_for, reference_items, written_items
from helpers import ROOT, make_model, shared_data, weights_in

pytestmark = pytest.mark.slow

LORA = ["--lora-target-modules", "linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "--lora-fusion"]
QUESTIONS = {
    "Who guards the tower": "Mila the owl guards the tower.",
    "What is in the box": "There is a red key in the box.",
    "Where does Tom sleep": "Tom sleeps under the big tree.",
    "What color is the boat": "The boat is green and old.",
    "Who found the map": "Sara found the map at noon.",
    "What did the fox eat": "The fox ate a sweet plum.",
}


def run(script: str, *arguments: object, processes: int = 1, timeout_s: int = 1500) -> str:
    """Run an entry point (under torchrun for several processes); its output. Fails with the output where it fails."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = (
        [*launcher, str(ROOT / script), "--device", "cpu", *map(str, arguments)]
        if script not in ("convert_ckpt.py", "preprocess_data.py")
        else [*launcher, str(ROOT / script), *map(str, arguments)]
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment, stdin=subprocess.DEVNULL)
    assert result.returncode == 0, " ".join(command) + "\n" + result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


def losses(folder: Path) -> list[float]:
    """``lm_loss`` of each iteration that the run recorded."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record["lm_loss"] for record in records if "lm_loss" in record]


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Qwen3 with the real vocabulary and tokenizer."""
    data = shared_data()
    folder = make_model(
        tmp_path_factory.mktemp("real") / "qwen3",
        vocab_size=151936,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        rope_theta=1e6,
        bos_token_id=151643,
        eos_token_id=151645,
        pad_token_id=151643,
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        (folder / name).write_bytes((data / "qwen3-tokenizer" / name).read_bytes())
    return folder


def test_all_alpaca_records_and_the_real_vocabulary_at_tp2_pp2(qwen3: Path, tmp_path: Path) -> None:
    parquet = next((shared_data() / "alpaca").glob("*.parquet"))
    run(
        "convert_ckpt.py",
        "--load-model-type",
        "hf",
        "--save-model-type",
        "mg",
        "--load-dir",
        qwen3,
        "--save-dir",
        tmp_path / "mg",
        "--target-tensor-parallel-size",
        1,
        "--target-pipeline-parallel-size",
        2,
    )
    report = run(
        "preprocess_data.py",
        "--input",
        parquet,
        "--output-prefix",
        tmp_path / "data" / "alpaca",
        "--tokenizer-name-or-path",
        qwen3,
        "--prompt-type",
        "qwen3",
        "--seq-length",
        4096,
        "--workers",
        2,
    )
    assert "52002" in report.replace(",", "")
    run(
        "posttrain_gpt.py",
        "--load",
        tmp_path / "mg",
        "--data-path",
        tmp_path / "data" / "alpaca",
        "--save",
        tmp_path / "lora",
        *LORA,
        "--tensor-model-parallel-size",
        2,
        "--pipeline-model-parallel-size",
        2,
        "--sequence-parallel",
        "--micro-batch-size",
        2,
        "--global-batch-size",
        8,
        "--train-iters",
        50,
        "--lr",
        1e-3,
        "--seq-length",
        512,
        "--no-pad-to-seq-lengths",
        "--prompt-type",
        "qwen3",
        "--eval-iters",
        2,
        processes=4,
    )
    curve = losses(tmp_path / "lora")
    assert len(curve) == 50 and sum(curve[-10:]) < sum(curve[:10]), curve
    answer = run(
        "inference.py",
        "--load",
        tmp_path / "mg",
        "--lora-load",
        tmp_path / "lora",
        "--task",
        "greedy",
        "--prompt",
        "Name a fruit.",
        "--max-new-tokens",
        4,
        "--tensor-model-parallel-size",
        2,
        processes=2,
    )
    assert "MindSpeed-LLM:" in answer


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """stories260k LoRA-tuned on QUESTIONS at TP2 PP1 DP2: (base folder, adapter folder)."""
    folder, base = tmp_path_factory.mktemp("stories"), shared_data() / "stories260k" / "hf"
    # This model was trained with <s> between stories; its </s> has an untrained embedding row, tied to the head, that no adapter can raise.
    records = [{"instruction": question, "input": "", "output": answer + "<s>"} for question, answer in QUESTIONS.items()]
    (folder / "facts.json").write_text(json.dumps(records))
    run(
        "preprocess_data.py",
        "--input",
        folder / "facts.json",
        "--output-prefix",
        folder / "facts",
        "--tokenizer-name-or-path",
        base,
        "--prompt-type",
        "default",
    )
    run(
        "posttrain_gpt.py",
        "--load",
        base,
        "--data-path",
        folder / "facts",
        "--save",
        folder / "lora",
        *LORA,
        "--lora-r",
        16,
        "--lora-alpha",
        32,
        "--tensor-model-parallel-size",
        2,
        "--micro-batch-size",
        1,
        "--global-batch-size",
        6,
        "--train-iters",
        150,
        "--lr",
        1e-2,
        "--split",
        "100,0,0",
        "--lr-decay-style",
        "cosine",
        "--seq-length",
        128,
        "--no-pad-to-seq-lengths",
        "--prompt-type",
        "default",
        processes=2,
    )
    return base, folder / "lora"


def test_stories260k_reproduces_what_it_was_taught_at_another_layout(taught: tuple[Path, Path]) -> None:
    base, adapter = taught
    printed = run(
        "inference.py",
        "--load",
        base,
        "--lora-load",
        adapter,
        "--task",
        "greedy",
        "--prompt",
        *QUESTIONS,
        "--max-new-tokens",
        64,
        "--add-eos-token",
        "<s>",
        "--pipeline-model-parallel-size",
        2,
        processes=2,
    )
    answers = [answer.strip() for answer in re.findall(r"MindSpeed-LLM:\n(.*)", printed)]
    assert answers == list(QUESTIONS.values()), printed


def test_mmlu_on_the_unmerged_adapter_equals_lm_evals_backend_on_the_merged_model(taught: tuple[Path, Path], tmp_path: Path) -> None:
    """5 subjects x 20 items, item by item."""
    from transformers import AutoModelForCausalLM

    base, adapter = taught
    subjects = ["anatomy", "astronomy", "business_ethics", "college_biology", "virology"]
    for split in ("dev", "test"):
        (tmp_path / "mmlu" / split).mkdir(parents=True)
        for subject in subjects:
            source = shared_data() / "mmlu" / "data" / split / f"{subject}_{split}.csv"
            (tmp_path / "mmlu" / split / source.name).write_bytes(source.read_bytes())
    options = [
        "--task",
        "mmlu",
        "--task-data-path",
        tmp_path / "mmlu" / "test",
        "--max-eval-samples",
        20,
        "--num-fewshot",
        0,
        "--log-samples",
    ]
    run(
        "evaluation.py",
        "--load",
        base,
        "--lora-load",
        adapter,
        *options,
        "--output-path",
        tmp_path / "ours",
        "--pipeline-model-parallel-size",
        2,
        "--max-position-embeddings",
        512,
        processes=2,
    )
    run(
        "convert_ckpt.py",
        "--load-model-type",
        "hf",
        "--save-model-type",
        "hf",
        "--load-dir",
        base,
        "--lora-load",
        adapter,
        "--save-dir",
        tmp_path / "merged",
    )
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", **weights_in(torch.float32)).eval()
    job = config_for(tmp_path / "merged", tmp_path / "mmlu" / "test", num_fewshot=0, max_eval_samples=20)
    theirs, _ = reference_items(job, merged)
    mine = written_items(tmp_path / "ours")
    assert mine.keys() == theirs.keys() and len(mine) == 100
    for item, values in theirs.items():
        assert mine[item] == pytest.approx(values, abs=1e-4), item
