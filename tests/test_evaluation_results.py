"""What is counted, printed and written, the paired tests, and what an interruption leaves; without a model."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mindspeed_lora.errors import UsageError
from mindspeed_lora.evaluation.jobs import JobResult
from mindspeed_lora.evaluation.results import (
    check_output,
    compare_results,
    comparison_line,
    other_metrics,
    results_content,
    score_line,
    table,
    write_results,
    write_samples,
)
from mindspeed_lora.evaluation.statistics import compare, mcnemar_exact, mean_of, sign_flip
from mindspeed_lora.inference.interrupt import Terminated, interruptible


def result(*values: float, name: str = "mmlu") -> JobResult:
    """Subject a has all but the last item, subject b the last."""
    samples = {
        "mmlu_a": [{"doc_id": index, "acc": value, "filter": "none", "metrics": ["acc"]} for index, value in enumerate(values[:-1])],
        "mmlu_b": [{"doc_id": 0, "acc": values[-1], "filter": "none", "metrics": ["acc"]}],
    }
    samples["mmlu_a"].append({"doc_id": 0, "acc": 1.0, "filter": "another", "metrics": ["acc"]})
    results = {
        "results": {"mmlu_a": {"alias": "a", "acc,none": 0.5}, "mmlu_b": {"alias": "b"}},
        "configs": {"mmlu_a": {"function": result}},
    }
    return JobResult(name, "acc", "none", results, samples)


def test_items_of_the_chosen_filter_are_counted_once_each() -> None:
    assert score_line(result(1.0, 0.0, 1.0)) == f"mmlu acc = 2/3={2 / 3}"
    lines = table(result(1.0, 0.0, 1.0)).splitlines()
    assert lines[0].split() == ["subject", "question_n", "acc", "stderr"]
    assert lines[1].split()[:3] == ["a", "2", "0.500000"] and lines[-1].split() == ["total", "3", "0.666667", "0.333333"]


def test_tasks_without_one_number_per_item_show_lm_evals_aggregates() -> None:
    samples = {"wiki": [{"doc_id": 0, "word_perplexity": (-3.0, 2), "filter": "none", "metrics": ["word_perplexity"]}]}
    found = JobResult("wiki", "word_perplexity", "none", {"results": {"wiki": {"word_perplexity,none": 4.5}}}, samples)
    assert score_line(found) == "wiki: no single score" and "4.5" in other_metrics(found)


def test_files_are_lm_evals_format_over_all_benchmarks(tmp_path: Path) -> None:
    base, adapter = result(1.0, 0.0, 0.0), result(1.0, 1.0, 0.0)
    found = compare_results(base, adapter)
    assert found is not None
    content = results_content([adapter], {"load": "x"}, {"limit": None}, {"mmlu": found})
    path = write_results(tmp_path / "out", "results.json", content)
    written = json.loads(path.read_text())
    assert written["groups"]["mmlu"]["acc,none"] == 2 / 3 and written["results"]["mmlu_a"]["alias"] == "a" and "samples" not in written
    own = written["mindspeed_lora"]
    assert own["load"] == "x" and own["complete"] and own["comparison"]["mmlu"]["gained"] == 1 and own["comparison"]["mmlu"]["lost"] == 0
    assert [path.name for path in write_samples(tmp_path / "out", adapter)] == ["samples_mmlu_a.jsonl", "samples_mmlu_b.jsonl"]
    assert len((tmp_path / "out" / "samples_mmlu_a.jsonl").read_text().splitlines()) == 3
    assert "1 items gained, 0 lost of 3), p = 1 (McNemar's exact test)" in comparison_line("mmlu", found)
    with pytest.raises(UsageError, match=r"results.json is a file"):
        check_output(tmp_path / "out" / "results.json")


def test_a_mean_has_the_standard_error_of_lm_eval() -> None:
    from lm_eval.api.metrics import mean_stderr

    values = [0.0, 1.0, 1.0, 0.5, 1.0]
    assert mean_of(values).stderr == pytest.approx(mean_stderr(values)) and math.isnan(mean_of([1.0]).stderr)


def test_paired_tests_equal_scipys() -> None:
    scipy = pytest.importorskip("scipy.stats")
    for gained, lost in ((0, 0), (5, 1), (1, 9), (12, 12), (30, 11)):
        expected = scipy.binomtest(gained, gained + lost, 0.5).pvalue if gained + lost else 1.0
        assert mcnemar_exact(gained, lost) == pytest.approx(expected)
    differences = [0.3, -0.1, 0.5, 0.2, 0.4, -0.05, 0.25, 0.1]
    exact = sum(abs(sum(s * d for s, d in zip(signs, differences, strict=True))) >= sum(differences) - 1e-12 for signs in _signs(8)) / 256
    assert sign_flip(differences) == pytest.approx(exact, abs=0.015)
    assert compare([0.5, 0.25], [0.5, 0.75]).test.startswith("sign-flip")
    assert compare([0.0] * 9, [1.0] * 9).p_value == pytest.approx(2 / 2**9)


def _signs(count: int) -> list[tuple[int, ...]]:
    return [tuple(1 if number >> bit & 1 else -1 for bit in range(count)) for number in range(2**count)]


def test_an_interruption_counts_only_the_items_that_were_answered() -> None:
    from mindspeed_lora.evaluation.jobs import _answered

    instances = [SimpleNamespace(request_type="loglikelihood", task_name="t", doc_id=doc, idx=idx) for doc in range(3) for idx in range(2)]
    answers: dict[Any, Any] = {("loglikelihood", "t", doc, idx): (0.0, False) for doc, idx in ((0, 0), (0, 1), (1, 0), (2, 0), (2, 1))}
    kept = _answered(SimpleNamespace(answers=answers), SimpleNamespace(instances=instances), [{"doc_id": doc} for doc in range(3)])  # type: ignore[arg-type]
    assert kept == [{"doc_id": 0}, {"doc_id": 2}]


@pytest.mark.parametrize(("kind", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_the_first_signal_interrupts_and_the_next_ones_do_not_disturb_the_writing(
    kind: signal.Signals, raised: type[BaseException]
) -> None:
    before = signal.getsignal(kind)
    written = []
    engine: Any = SimpleNamespace(busy=False, interruption=None)
    with pytest.raises(KeyboardInterrupt, match="scored"), interruptible(engine):
        try:
            signal.raise_signal(kind)
        except KeyboardInterrupt as error:
            assert type(error) is raised and engine.interruption is error
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
            written.append(True)
            raise KeyboardInterrupt("scored") from None
    assert written and signal.getsignal(kind) == before
