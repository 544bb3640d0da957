"""What users get wrong, through the entry points: one message, the exit code, and nothing left on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from data_helpers import tiny_tokenizer
from helpers import tiny_qwen3

from mindspeed_lora.arguments.cli import main

TARGETS = ["--lora-target-modules", "linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]


@dataclass(frozen=True)
class World:
    """What good steps left behind, for bad ones to start from."""

    root: Path

    def __getattr__(self, name: str) -> str:
        return str(self.root / name)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A Qwen3 folder with tokenizer, its data, an adapter trained for one step, and broken things beside them."""
    here = World(tmp_path_factory.mktemp("world"))
    tiny_qwen3(here.root / "hf")
    tiny_tokenizer(here.root / "hf")
    tiny_qwen3(here.root / "other", seed=5)
    tiny_tokenizer(here.root / "other")
    tokenizer = json.loads((here.root / "other" / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][-1], "id": 319, "content": "<other>"})
    (here.root / "other" / "tokenizer.json").write_text(json.dumps(tokenizer))
    records = [{"instruction": f"Question {index}?", "input": "", "output": f"Answer {index}."} for index in range(8)]
    (here.root / "records.json").write_text(json.dumps(records))
    (here.root / "empty.json").write_text("[]")
    assert main("preprocess_data.py", preprocess(here)) == 0
    assert main("preprocess_data.py", preprocess(here, "--output-prefix", here.foreign, "--tokenizer-name-or-path", here.other)) == 0
    assert main("posttrain_gpt.py", train(here, *TARGETS, "--lora-r", "4", "--lora-alpha", "8", "--save", here.adapter)) == 0
    for suffix in ("input_ids", "labels", "attention_mask"):
        for ending in ("bin", "idx"):
            source = here.root / f"data_packed_{suffix}_document.{ending}"
            (here.root / f"torn_packed_{suffix}_document.{ending}").write_bytes(source.read_bytes()[: 20 if ending == "idx" else None])
    return here


def preprocess(world: World, *changes: str) -> list[str]:
    good = ["--input", world.records_json, "--output-prefix", world.data, "--tokenizer-name-or-path", world.hf, "--prompt-type", "qwen3"]
    return [word.replace("records_json", "records.json") for word in (*good, *changes)]


def train(world: World, *changes: str) -> list[str]:
    return [
        "--device",
        "cpu",
        "--load",
        world.hf,
        "--data-path",
        world.data,
        "--train-iters",
        "1",
        "--seq-length",
        "64",
        "--eval-iters",
        "0",
        "--split",
        "100,0,0",
        "--global-batch-size",
        "2",
        *changes,
    ]


def convert(world: World, *changes: str) -> list[str]:
    return ["--load-model-type", "hf", "--save-model-type", "mg", "--load-dir", world.hf, "--save-dir", world.new, *changes]


def ask(world: World, *changes: str) -> list[str]:
    return ["--device", "cpu", "--load", world.hf, "--task", "greedy", "--max-new-tokens", "2", *changes]


def score(world: World, *changes: str) -> list[str]:
    return ["--device", "cpu", "--load", world.hf, "--task", "mmlu", "--task-data-path", world.root.as_posix(), *changes]


Bad = tuple[str, Callable[[World], list[str]], int, list[str], int]
CASES: dict[str, Bad] = {
    # name: command, argv, exit code, what the message names, number of processes that torchrun would have started
    "missing path": ("convert_ckpt.py", lambda w: convert(w, "--load-dir", w.nowhere), 2, ["--load-dir", "nowhere"], 1),
    "missing data": ("posttrain_gpt.py", lambda w: train(w, "--data-path", w.nothing), 2, ["--data-path", "nothing"], 1),
    "missing base": ("inference.py", lambda w: ask(w, "--load", w.nowhere), 2, ["--load", "nowhere"], 1),
    "unknown flag": ("posttrain_gpt.py", lambda w: train(w, "--lora-rr", "4"), 2, ["--lora-rr", "--lora-r"], 1),
    "abbreviated flag": ("posttrain_gpt.py", lambda w: train(w, "--micro-batch", "4"), 2, ["--micro-batch", "--micro-batch-size"], 1),
    "TP and query groups": (
        "posttrain_gpt.py",
        lambda w: train(w, *TARGETS, "--tensor-model-parallel-size", "8"),
        2,
        ["8", "num_query_groups 4"],
        8,
    ),
    "TP and query groups, convert": (
        "convert_ckpt.py",
        lambda w: convert(w, "--target-tensor-parallel-size", "3"),
        2,
        ["3", "num_query_groups 4"],
        1,
    ),
    "layers and PP": ("posttrain_gpt.py", lambda w: train(w, *TARGETS, "--pipeline-model-parallel-size", "3"), 2, ["3", "4"], 3),
    "layers and PP, convert": ("convert_ckpt.py", lambda w: convert(w, "--target-pipeline-parallel-size", "3"), 2, ["3", "4"], 1),
    "grid and processes": (
        "posttrain_gpt.py",
        lambda w: train(w, *TARGETS, "--tensor-model-parallel-size", "2"),
        2,
        ["--tensor-model-parallel-size 2", "number of processes, 1"],
        1,
    ),
    "target that is none": (
        "posttrain_gpt.py",
        lambda w: train(w, "--lora-target-modules", "q_proj"),
        2,
        ["--lora-target-modules", "q_proj", "linear_qkv"],
        1,
    ),
    "LoRA without targets": ("posttrain_gpt.py", lambda w: train(w, "--lora-r", "4"), 2, ["--lora-target-modules"], 1),
    "adapter's r": ("inference.py", lambda w: ask(w, "--lora-load", w.adapter, "--lora-r", "8", *TARGETS), 2, ["--lora-r 8", "4"], 1),
    "adapter's alpha": (
        "inference.py",
        lambda w: ask(w, "--lora-load", w.adapter, "--lora-alpha", "16", *TARGETS),
        2,
        ["--lora-alpha 16", "8"],
        1,
    ),
    "adapter's targets": (
        "inference.py",
        lambda w: ask(w, "--lora-load", w.adapter, *TARGETS[:2]),
        2,
        ["--lora-target-modules", "linear_fc1"],
        1,
    ),
    "adapter's r, merge": ("convert_ckpt.py", lambda w: merge(w, "--lora-r", "8"), 2, ["--lora-r 8", "4"], 1),
    "adapter of another base": (
        "inference.py",
        lambda w: ask(w, "--load", w.other, "--tokenizer-name-or-path", w.hf, "--lora-load", w.adapter),
        1,
        ["fingerprint", "other"],
        1,
    ),
    "data of another tokenizer": ("posttrain_gpt.py", lambda w: train(w, "--data-path", w.foreign), 2, ["tokenizer", "other"], 1),
    "torn index": ("posttrain_gpt.py", lambda w: train(w, "--data-path", w.torn), 1, ["torn_packed", ".idx"], 1),
    "empty dataset": (
        "preprocess_data.py",
        lambda w: preprocess(w, "--input", f"{w.root}/empty.json", "--output-prefix", w.new),
        1,
        ["empty.json"],
        1,
    ),
    "map keys": (
        "preprocess_data.py",
        lambda w: preprocess(w, "--map-keys", "{'prompt': 'instruction'}", "--output-prefix", w.new),
        2,
        ["--map-keys", "JSON"],
        1,
    ),
    "thinking without a template for it": (
        "preprocess_data.py",
        lambda w: preprocess(w, "--prompt-type", "default", "--enable-thinking", "true", "--output-prefix", w.new),
        2,
        ["--enable-thinking true", "default"],
        1,
    ),
    "adapter without base": (
        "posttrain_gpt.py",
        lambda w: ["--lora-load", w.adapter, "--data-path", w.data],
        2,
        ["--lora-load", "--load"],
        1,
    ),
    "adapter without base, inference": ("inference.py", lambda w: ["--lora-load", w.adapter], 2, ["--lora-load", "--load"], 1),
    "TP 2 when writing HF": (
        "convert_ckpt.py",
        lambda w: merge(w, "--target-tensor-parallel-size", "2"),
        2,
        ["--target-tensor-parallel-size 2", "hf"],
        1,
    ),
    "wrong architecture": ("posttrain_gpt.py", lambda w: train(w, *TARGETS, "--hidden-size", "128"), 2, ["--hidden-size 128", "64"], 1),
    "fp16 and bf16": ("posttrain_gpt.py", lambda w: train(w, *TARGETS, "--fp16", "--bf16"), 2, ["--fp16", "--bf16"], 1),
    "dropout": ("posttrain_gpt.py", lambda w: train(w, *TARGETS, "--hidden-dropout", "0.1"), 2, ["--hidden-dropout", "0.1"], 1),
    "global batch": (
        "posttrain_gpt.py",
        lambda w: train(w, *TARGETS, "--micro-batch-size", "2", "--global-batch-size", "3"),
        2,
        ["--global-batch-size 3", "--micro-batch-size 2"],
        1,
    ),
    "used save folder": ("posttrain_gpt.py", lambda w: train(w, *TARGETS, "--save", w.adapter), 2, ["--save", "adapter"], 1),
    "benchmark files": ("evaluation.py", lambda w: score(w), 1, ["--task-data-path", "_test.csv"], 1),
    "unknown task": ("evaluation.py", lambda w: score(w, "--task", "mnlu"), 2, ["--task", "mmlu"], 1),
    "empty prompt": ("inference.py", lambda w: ask(w, "--prompt", ""), 2, ["--prompt"], 1),
    "prompt too long": ("inference.py", lambda w: ask(w, "--prompt", "word " * 400), 2, ["256"], 1),
}


def merge(world: World, *changes: str) -> list[str]:
    return [
        "--load-model-type",
        "hf",
        "--save-model-type",
        "hf",
        "--load-dir",
        world.hf,
        "--lora-load",
        world.adapter,
        "--save-dir",
        world.new,
        *changes,
    ]


def tree(folder: Path) -> dict[str, int]:
    """Every file below ``folder`` with its time of change."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", CASES)
def test_one_message_the_exit_code_and_nothing_left(
    world: World, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    command, argv, code, named, processes = CASES[name]
    monkeypatch.chdir(tmp_path)
    if processes > 1:
        monkeypatch.setenv("WORLD_SIZE", str(processes))
    before = tree(world.root)
    assert main(command, argv(world)) == code
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, captured.err
    assert "Traceback" not in captured.err
    for word in named:
        assert word in errors[0], errors[0]
    assert tree(world.root) == before and not (world.root / "new").exists()
    assert not list(tmp_path.iterdir())
