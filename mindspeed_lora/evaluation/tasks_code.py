"""HumanEval: the model completes a function, and the benchmark's own tests run on it (see :mod:`sandbox`).

The prompt, the stop texts and what is run are lm_eval's ``humaneval``; its metric would download and run code without limits, so the
metric here is ours: pass@1 with one greedy answer a problem.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mindspeed_lora.errors import DataError
from mindspeed_lora.evaluation.package import TaskSettings, check_fewshot, read_yaml, tasks_folder, with_rows
from mindspeed_lora.evaluation.rows import find_root, json_rows
from mindspeed_lora.evaluation.sandbox import run_program

KEYS = ("task_id", "prompt", "entry_point", "test")
METRIC = "pass_at_1"


def load_humaneval(path: Path, num_fewshot: int, source: str) -> list[TaskSettings]:
    """One task; ``unsafe_code`` in its settings makes lm_eval ask as well."""
    root = find_root(
        "human_eval", path, ("data", "humaneval", "human_eval"), "*.jsonl*", f"HumanEval.jsonl[.gz] ({', '.join(KEYS)})", source
    )
    check_fewshot(num_fewshot, 0, "human_eval")
    file = next((root / name for name in ("HumanEval.jsonl", "HumanEval.jsonl.gz") if (root / name).is_file()), None)
    if file is None:
        raise DataError(f"--task-data-path {path}: holds no HumanEval.jsonl or HumanEval.jsonl.gz; {source}")
    rows = [{key: row[key] for key in KEYS} for _, row in json_rows(file, dict.fromkeys(KEYS, str))]
    settings = {**_settings(), "metric_list": [{"metric": pass_at_1, "aggregation": "mean", "higher_is_better": True}]}
    settings["filter_list"] = [{"name": "create_test", "filter": [{"function": "custom", "filter_fn": build_programs}]}]
    return [with_rows(settings, {"test": rows}, 0)]


def _settings() -> TaskSettings:
    """The package's, less the functions of its module, which downloads when it is imported."""
    content = read_yaml(tasks_folder() / "humaneval" / "humaneval.yaml", lambda folder, name: None)
    return {key: value for key, value in content.items() if key != "dataset_path"}


def build_programs(answers: Sequence[Sequence[str]], docs: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The function as the model completed it, as lm_eval puts it together."""
    return [[doc["prompt"] + answer for answer in own] for own, doc in zip(answers, docs, strict=True)]


def pass_at_1(references: list[str], predictions: list[list[str]]) -> float:
    """Share of the answers whose function passes the tests ``references``; lm_eval calls it item by item."""
    programs = [f"{answer}\n{test}" for test, answers in zip(references, predictions, strict=True) for answer in answers]
    return sum(run_program(program).passed for program in programs) / len(programs)
