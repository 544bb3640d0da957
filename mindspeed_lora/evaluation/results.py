"""What an evaluation leaves: a table, the line ``mmlu acc = n/N=x``, ``results.json`` and one jsonl of items per subject."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindspeed_lora import __version__
from mindspeed_lora.errors import UsageError
from mindspeed_lora.files import write_json, write_text

RESULTS_NAME = "results.json"


@dataclass(frozen=True)
class SubjectScore:
    """``correct`` of ``count`` questions."""

    subject: str
    correct: int
    count: int

    @property
    def accuracy(self) -> float:
        """0 to 1."""
        return self.correct / self.count


def subject_scores(results: Mapping[str, Any]) -> list[SubjectScore]:
    """Counts from lm_eval's samples, in the tasks' order."""
    scores = []
    for task, samples in results["samples"].items():
        alias = results["results"][task].get("alias", task)
        scores.append(SubjectScore(alias, sum(int(sample["acc"]) for sample in samples), len(samples)))
    return scores


def total(scores: Sequence[SubjectScore]) -> SubjectScore:
    """Every question counts the same."""
    return SubjectScore("total", sum(score.correct for score in scores), sum(score.count for score in scores))


def table(scores: Sequence[SubjectScore]) -> str:
    """Subject, number of questions, accuracy; the last row is the total."""
    rows = [("subject", "question_n", "acc")]
    rows += [(score.subject, str(score.count), f"{score.accuracy:.6f}") for score in (*scores, total(scores))]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}" for row in rows)


def score_line(benchmark: str, scores: Sequence[SubjectScore]) -> str:
    """The peer's line, e.g. ``mmlu acc = 71/100=0.71``."""
    whole = total(scores)
    return f"{benchmark} acc = {whole.correct}/{whole.count}={whole.accuracy}"


def check_output(path: Path | None) -> None:
    """Raises:
    UsageError: results could not be written there.
    """
    if path is None:
        return
    existing = next(parent for parent in (Path(path), *Path(path).parents) if parent.exists())
    if not existing.is_dir():
        raise UsageError(f"--output-path {path}: {existing} is a file; give a folder for {RESULTS_NAME} and the items")


def write_results(folder: Path, benchmark: str, results: Mapping[str, Any], scored: Mapping[str, Any]) -> list[Path]:
    """Write ``results.json`` (lm_eval's format, and under ``mindspeed_lora`` what was scored) and ``samples_<task>.jsonl``.

    Results of an earlier run in the same folder are replaced, each file whole or not at all, ``results.json`` last.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for task, samples in results["samples"].items():
        paths.append(folder / f"samples_{task}.jsonl")
        write_text(paths[-1], "".join(json.dumps(_plain(sample), ensure_ascii=False) + "\n" for sample in samples))
    scores = subject_scores(results)
    whole = total(scores)
    content = {key: value for key, value in results.items() if key != "samples"}
    content["groups"] = {benchmark: {"alias": benchmark, "acc,none": whole.accuracy, "sample_len": whole.count, "correct": whole.correct}}
    content["mindspeed_lora"] = {"version": __version__, "benchmark": benchmark, **scored}
    write_json(folder / RESULTS_NAME, _plain(content))
    return [*paths, folder / RESULTS_NAME]


def _plain(value: Any) -> Any:
    """Only what JSON knows; functions by name, other objects by their text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | bool | int | float):
        return value
    return getattr(value, "__name__", None) or str(value)
