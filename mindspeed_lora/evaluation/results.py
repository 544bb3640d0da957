"""What an evaluation leaves: tables, the line ``mmlu acc = n/N=x``, ``results.json``, and on request one jsonl of items per task."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mindspeed_lora import __version__
from mindspeed_lora.errors import UsageError
from mindspeed_lora.evaluation.jobs import JobResult
from mindspeed_lora.evaluation.statistics import Comparison, Mean, compare, mean_of
from mindspeed_lora.files import write_json, write_text

RESULTS_NAME = "results.json"
BASE_RESULTS_NAME = "results_base.json"


@dataclass(frozen=True)
class TaskScore:
    """The score of one task (a subject, say) or of a whole benchmark."""

    name: str
    mean: Mean

    @property
    def correct(self) -> str:
        """Sum of the items: a whole number where they are right or wrong."""
        return f"{round(self.mean.value * self.mean.count, 4):g}"


def task_scores(result: JobResult) -> list[TaskScore]:
    """In the tasks' order; tasks without an item that has one number are left out."""
    scores = []
    for task in result.samples:
        items = result.items(task)
        if items:
            scores.append(TaskScore(result.results["results"].get(task, {}).get("alias", task).strip(), mean_of([*items.values()])))
    return scores


def total(result: JobResult) -> TaskScore | None:
    """Every item counts the same; None where no item has one number."""
    values = [value for task in result.samples for value in result.items(task).values()]
    return TaskScore("total", mean_of(values)) if values else None


def table(result: JobResult) -> str:
    """Subject, number of questions, accuracy and its standard error; the last row is the total."""
    whole = total(result)
    rows = [("subject", "question_n", "acc", "stderr")]
    for score in (*task_scores(result), *([whole] if whole else [])):
        rows.append((score.name, str(score.mean.count), f"{score.mean.value:.6f}", f"{score.mean.stderr:.6f}"))
    return _aligned(rows)


def other_metrics(result: JobResult) -> str:
    """lm_eval's own aggregates, for tasks whose items have no single number."""
    rows = [("task", "metric", "value")]
    for task, metrics in result.results["results"].items():
        rows += [(task, name, f"{value:.6f}") for name, value in metrics.items() if isinstance(value, float)]
    return _aligned(rows)


def _aligned(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            f"{text:<{width}}" if column == 0 else f"{text:>{width}}" for column, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def score_line(result: JobResult) -> str:
    """The peer's line, e.g. ``mmlu acc = 71/100=0.71``; what the number is where it is no accuracy of choices."""
    whole = total(result)
    if whole is None:
        return f"{result.name}: no single score"
    return f"{result.name} acc = {whole.correct}/{whole.mean.count}={whole.mean.value}"


def compare_results(base: JobResult, adapter: JobResult) -> Comparison | None:
    """Paired by item; only items that both have."""
    pairs: list[tuple[float, float]] = []
    for task in (task for task in base.samples if task in adapter.samples):
        first, second = base.items(task), adapter.items(task)
        pairs += [(value, second[item]) for item, value in first.items() if item in second]
    return compare([first for first, _ in pairs], [second for _, second in pairs]) if pairs else None


def comparison_line(name: str, found: Comparison) -> str:
    """One sentence."""
    return (
        f"{name}: base {found.first.value:.4f} +- {found.first.stderr:.4f}, adapter {found.second.value:.4f} +- {found.second.stderr:.4f}; "
        f"difference {found.difference.value:+.4f} +- {found.difference.stderr:.4f} ({found.gained} items gained, {found.lost} lost of "
        f"{found.difference.count}), p = {found.p_value:.3g} ({found.test})"
    )


def check_output(path: Path | None) -> None:
    """Raises:
    UsageError: results could not be written there.
    """
    if path is None:
        return
    existing = next(parent for parent in (Path(path), *Path(path).parents) if parent.exists())
    if not existing.is_dir():
        raise UsageError(f"--output-path {path}: {existing} is a file; give a folder for {RESULTS_NAME} and the items")


def results_content(
    results: Sequence[JobResult],
    scored: Mapping[str, Any],
    settings: Mapping[str, Any],
    comparisons: Mapping[str, Comparison] | None = None,
) -> dict[str, Any]:
    """lm_eval's format over all benchmarks, and under ``mindspeed_lora`` what was scored."""
    content: dict[str, Any] = {}
    for result in results:
        for key, value in result.results.items():
            if isinstance(value, Mapping):
                content[key] = {**content.get(key, {}), **value}
    groups, scores = {}, {}
    for result in results:
        whole = total(result)
        scores[result.name] = {"metric": result.metric, "filter": result.filter, "complete": result.complete}
        if whole is not None:
            groups[result.name] = {
                "alias": result.name,
                f"{result.metric},{result.filter}": whole.mean.value,
                f"{result.metric}_stderr,{result.filter}": whole.mean.stderr,
                "sample_len": whole.mean.count,
                "correct": round(whole.mean.value * whole.mean.count, 4),
            }
            scores[result.name] |= asdict(whole.mean)
    content["groups"] = {**content.get("groups", {}), **groups}
    content["config"] = {"model": "mindspeed_lora", **settings}
    content["date"] = time.time()
    own = {"version": __version__, "complete": all(result.complete for result in results), "scores": scores, **scored}
    if comparisons:
        own["comparison"] = {name: asdict(comparison) for name, comparison in comparisons.items()}
    return {**content, "mindspeed_lora": own}


def write_results(folder: Path, name: str, content: Mapping[str, Any]) -> Path:
    """Write one file of results, whole or not at all; an earlier run's is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / name, _plain(content))
    return folder / name


def write_samples(folder: Path, result: JobResult, prefix: str = "samples") -> list[Path]:
    """``samples_<task>.jsonl``: one line an item, as lm_eval logs it."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for task, samples in result.samples.items():
        paths.append(folder / f"{prefix}_{task}.jsonl")
        write_text(paths[-1], "".join(json.dumps(_plain(sample), ensure_ascii=False) + "\n" for sample in samples))
    return paths


def _plain(value: Any) -> Any:
    """Only what JSON knows; functions by name, other objects by their text, no number as null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | bool | int | float):
        return value
    return getattr(value, "__name__", None) or str(value)
