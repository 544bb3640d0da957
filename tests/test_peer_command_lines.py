"""The peer's full command lines for the five commands, with a model of Qwen3-8B's shape cut to 2 small layers, run on CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_helpers import tiny_tokenizer
from helpers import ROOT, tiny_qwen3

from mindspeed_lora.arguments.cli import main

FLAGS: dict[str, dict[str, int]] = json.loads((ROOT / "tests" / "fixtures" / "qwen3_flags.json").read_text(encoding="utf-8"))

# What the shipped Qwen3 scripts pass with each flag; "" for a switch. Sizes are those of the cut model.
SHAPE = {
    "--num-layers": "2",
    "--hidden-size": "64",
    "--ffn-hidden-size": "96",
    "--num-attention-heads": "8",
    "--num-query-groups": "4",
    "--kv-channels": "16",
    "--padded-vocab-size": "320",
    "--norm-epsilon": "1e-6",
    "--rotary-base": "1000000",
    "--seq-length": "128",
    "--max-position-embeddings": "256",
}
VALUES = {
    **SHAPE,
    "--spec": "mindspeed_llm.tasks.models.spec.qwen3_spec layer_spec",
    "--tensor-model-parallel-size": "1",
    "--pipeline-model-parallel-size": "1",
    "--expert-model-parallel-size": "1",
    "--context-parallel-size": "1",
    "--context-parallel-algo": "ulysses_cp_algo",
    "--make-vocab-size-divisible-by": "1",
    "--position-embedding-type": "rope",
    "--normalization": "RMSNorm",
    "--attention-dropout": "0.0",
    "--hidden-dropout": "0.0",
    "--attention-mask-type": "causal",
    "--transformer-impl": "local",
    "--tokenizer-type": "PretrainedFromHF",
    "--micro-batch-size": "1",
    "--global-batch-size": "2",
    "--lr": "1.25e-6",
    "--min-lr": "1.25e-7",
    "--lr-decay-style": "cosine",
    "--lr-warmup-fraction": "0.01",
    "--weight-decay": "1e-1",
    "--clip-grad": "1.0",
    "--adam-beta1": "0.9",
    "--adam-beta2": "0.95",
    "--init-method-std": "0.01",
    "--initial-loss-scale": "4096",
    "--train-iters": "2",
    "--seed": "42",
    "--split": "100,0,0",
    "--log-interval": "1",
    "--save-interval": "2",
    "--eval-interval": "2",
    "--eval-iters": "0",
    "--distributed-backend": "nccl",
    "--stage": "sft",
    "--prompt-type": "qwen3",
    "--enable-thinking": "none",
    "--model-type-hf": "qwen3",
    "--recompute-granularity": "full",
    "--recompute-method": "block",
    "--recompute-num-layers": "1",
    "--coc-fused-kernel": "",
    "--lora-r": "8",
    "--lora-alpha": "16",
    "--lora-target-modules": "linear_qkv linear_proj linear_fc1 linear_fc2",
    "--workers": "1",
    "--handler-name": "AlpacaStyleInstructionHandler",
    "--json-keys": "text",
    "--task": "mmlu",
    "--max-new-tokens": "4",
    "--model-type": "GPT",
    "--load-model-type": "hf",
    "--save-model-type": "mg",
    "--target-tensor-parallel-size": "1",
    "--target-pipeline-parallel-size": "2",
}
RAW_DATA = {"--pack", "--neat-pack", "--reset-attention-mask", "--handler-name"}  # of the peer's two raw-data scripts only
LEFT_OUT = {"--num-layers-per-virtual-pipeline-stage"}  # needs two stages


def words(command: str, without: set[str] = frozenset(), **changes: str) -> list[str]:  # type: ignore[assignment]
    """Every flag of ``command`` in the peer's scripts with its value; ``changes`` by flag name with underscores."""
    given = {f"--{name.replace('_', '-')}": value for name, value in changes.items()}
    argv = []
    for flag in sorted({*FLAGS[command], *given} - without):
        argv += [flag, *given.get(flag, VALUES.get(flag, "")).split()]
    return argv


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the cut model, its tokenizer, records, and MMLU-like files."""
    folder = tmp_path_factory.mktemp("peer")
    tiny_qwen3(folder / "hf", num_hidden_layers=2, rope_theta=1000000.0)
    tiny_tokenizer(folder / "hf")
    records = [{"instruction": f"Question {index}?", "input": "", "output": f"Answer {index}."} for index in range(8)]
    (folder / "alpaca.json").write_text(json.dumps(records))
    for split, count in (("dev", 5), ("test", 3)):
        (folder / "mmlu" / split).mkdir(parents=True)
        (folder / "mmlu" / split / f"anatomy_{split}.csv").write_text("".join(f"Is it {index}?,a,b,c,d,A\n" for index in range(count)))
    return folder


def test_every_flag_of_the_peers_scripts_is_used_here() -> None:
    assert not [flag for flag in LEFT_OUT if not any(flag in flags for flags in FLAGS.values())]


def test_1_convert(place: Path) -> None:
    lora = {"--lora-load", "--lora-r", "--lora-alpha", "--lora-target-modules"}
    assert main("convert_ckpt.py", words("convert_ckpt.py", lora, load_dir=str(place / "hf"), save_dir=str(place / "mg"))) == 0


def test_2_preprocess(place: Path) -> None:
    paths = {"input": str(place / "alpaca.json"), "output_prefix": str(place / "alpaca"), "tokenizer_name_or_path": str(place / "hf")}
    assert main("preprocess_data.py", words("preprocess_data.py", **paths)) == 0


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_3_tune(place: Path, kind: str) -> None:
    without = LEFT_OUT | RAW_DATA | ({flag for flag in FLAGS["posttrain_gpt.py"] if "--lora" in flag} if kind == "full" else set())
    paths = {
        "load": str(place / "mg"),
        "save": str(place / kind),
        "data_path": str(place / "alpaca"),
        "tokenizer_name_or_path": str(place / "hf"),
    }
    assert main("posttrain_gpt.py", ["--device", "cpu", *words("posttrain_gpt.py", without, **paths)]) == 0
    assert (place / kind / "latest_checkpointed_iteration.txt").read_text().strip() == "2"


def test_3_tune_on_raw_data(place: Path) -> None:
    """All flags at once: records packed at the start of the run, base and tokenizer from Hugging Face's folder."""
    paths = {"load": str(place / "hf"), "save": str(place / "raw" / "save"), "data_path": str(place / "alpaca.json")}
    argv = words("posttrain_gpt.py", LEFT_OUT, **paths, tokenizer_name_or_path=str(place / "hf"))
    assert main("posttrain_gpt.py", ["--device", "cpu", *argv]) == 0
    (manifest,) = (place / "raw" / "data_cache").glob("*/data_mindspeed_lora.json")
    assert json.loads(manifest.read_text())["data"]["packing"] == "neat-pack"
    assert (place / "raw" / "save" / "latest_checkpointed_iteration.txt").read_text().strip() == "2"


@pytest.mark.parametrize("lora", [False, True])
def test_4_generate(place: Path, lora: bool, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = ["--lora-load", str(place / "lora"), "--lora-r", "8", "--lora-alpha", "16", *target_words(), "--lora-fusion"] if lora else []
    paths = {"load": str(place / "mg"), "tokenizer_name_or_path": str(place / "hf")}
    argv = ["--device", "cpu", *words("inference.py", **paths), "--task", "greedy", "--prompt-type", "qwen3", *adapter]
    assert main("inference.py", argv) == 0
    assert "how are you?" in capsys.readouterr().out


@pytest.mark.parametrize("lora", [False, True])
def test_5_evaluate(place: Path, lora: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    adapter = ["--lora-load", str(place / "lora"), "--lora-r", "8", "--lora-alpha", "16", *target_words()] if lora else []
    paths = {"load": str(place / "mg"), "task_data_path": str(place / "mmlu" / "test"), "tokenizer_name_or_path": str(place / "hf")}
    assert main("evaluation.py", ["--device", "cpu", *words("evaluation.py", **paths), *adapter]) == 0
    assert "mmlu acc = " in capsys.readouterr().out


def test_6_merge(place: Path) -> None:
    paths = {
        "load_model_type": "mg",
        "save_model_type": "hf",
        "load_dir": str(place / "mg"),
        "lora_load": str(place / "lora"),
        "save_dir": str(place / "hf"),
    }
    assert main("convert_ckpt.py", words("convert_ckpt.py", **paths, target_pipeline_parallel_size="1")) == 0
    assert (place / "hf" / "mg2hg" / "config.json").is_file() and list((place / "hf" / "mg2hg").glob("*.safetensors"))


def target_words() -> list[str]:
    return ["--lora-target-modules", *VALUES["--lora-target-modules"].split()]
