"""Reading MMLU's files, planning forward passes, and what is written, without a model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from helpers import shared_data
from hypothesis import given, settings
from hypothesis import strategies as st

from mindspeed_lora.errors import DataError, UsageError
from mindspeed_lora.evaluation.batching import BatchRule, Room
from mindspeed_lora.evaluation.lm import cut_at
from mindspeed_lora.evaluation.replicas import Replicas
from mindspeed_lora.evaluation.results import check_output, score_line, subject_scores, table, write_results
from mindspeed_lora.evaluation.scoring import RowBatch, RowScores, answers_of, make_batches, plan_rows, share_prefixes
from mindspeed_lora.evaluation.tasks_mmlu import find_root, mmlu_tasks, read_questions

ROW = 'What is 1, "really"?,"a,b",b,c,d,C\n'.replace('What is 1, "really"?', '"What is 1, ""really""?"')


def make_files(root: Path, subject: str = "sums", test: str = ROW * 3, dev: str = ROW * 5) -> Path:
    for name, text in (("test", test), ("dev", dev)):
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name / f"{subject}_{name}.csv").write_text(text)
    return root


def test_the_published_files_have_the_published_sizes() -> None:
    root = shared_data() / "mmlu" / "data"
    tasks = mmlu_tasks(root, None)
    assert len(tasks) == 57 and tasks[0]["task"] == "mmlu_abstract_algebra" and tasks[0]["num_fewshot"] == 5
    assert sum(len(read_questions(path)) for path in (root / "test").glob("*.csv")) == 14042
    assert find_root(root / "test") == root


def test_rows_may_hold_commas_quotes_and_line_breaks(tmp_path: Path) -> None:
    root = make_files(tmp_path, test='"two\nlines, and ""quotes""",1,2,3,4,b\n')
    (question,) = read_questions(root / "test" / "sums_test.csv")
    assert question.question == 'two\nlines, and "quotes"' and question.choices == ("1", "2", "3", "4") and question.answer == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (ROW + '"a\nb",1,2,3,4,B\nonly,five,columns,here,A\n', ("line 4", "5 columns")),
        (ROW + "q,1,2,3,4,E\n", ("line 2", "'E'")),
        (ROW + '"never closed,1,2,3,4,A\n', ("line 2", "quotes")),
        ("", ("no rows",)),
    ],
)
def test_malformed_rows_are_named_by_file_and_line(tmp_path: Path, text: str, words: tuple[str, ...]) -> None:
    root = make_files(tmp_path, test=text)
    with pytest.raises(DataError) as caught:
        mmlu_tasks(root, None)
    assert "sums_test.csv" in str(caught.value) and all(word in str(caught.value) for word in words), caught.value


def test_missing_files_say_what_was_expected_and_where(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such folder; expected .*_test.csv"):
        mmlu_tasks(tmp_path / "absent", None)
    with pytest.raises(DataError, match=r"holds no MMLU files; expected .*test/<subject>_test.csv"):
        mmlu_tasks(tmp_path, None)
    make_files(tmp_path / "data")
    with pytest.raises(DataError, match=f"did you mean {tmp_path / 'data'}"):
        mmlu_tasks(tmp_path, None)
    (tmp_path / "data" / "dev" / "sums_dev.csv").unlink()
    with pytest.raises(DataError, match=r"sums_dev.csv: missing"):
        mmlu_tasks(tmp_path / "data", None)
    assert mmlu_tasks(tmp_path / "data", 0)[0]["num_fewshot"] == 0


def test_more_examples_than_there_are_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--num-fewshot 6: .*has only 5 rows"):
        mmlu_tasks(make_files(tmp_path), 6)


def test_choices_of_one_question_share_a_row_and_long_contexts_lose_their_beginning() -> None:
    context = [1, 2, 3]
    requests = [(context, [letter]) for letter in (7, 8, 9, 7)] + [([1, 2], [3, 8]), ([4], [5, 6])]
    rows, num_cut = plan_rows(requests, 10)
    assert num_cut == 0
    assert [(row.tokens, row.num_scored, row.last_tokens) for row in rows] == [((1, 2, 3), 2, (7, 8, 9)), ((4, 5), 2, (6,))]
    scores = [
        RowScores(torch.tensor([[-1.0, -1.0, -1.0], [-2.0, -3.0, -4.0]]), torch.tensor([3, 8])),
        RowScores(torch.tensor([[-5.0], [-6.0]]), torch.tensor([5, 0])),
    ]
    answers = dict(answers_of(RowBatch((), tuple(rows)), scores))
    assert [answers[index] for index in range(6)] == [
        (-2.0, False),
        (-3.0, True),
        (-4.0, False),
        (-2.0, False),
        (-4.0, True),
        (-11.0, False),
    ]
    rows, num_cut = plan_rows([(list(range(20)), [50])], 4)
    assert num_cut == 1 and rows[0].tokens == (16, 17, 18, 19)


def test_rows_that_begin_alike_share_their_beginning_and_batches_follow_the_rule() -> None:
    examples, other = list(range(100, 140)), list(range(200, 240))
    requests = [(examples + [index] * (3 + index), [7]) for index in range(4)] + [([*other, 1], [2, 3, 4]), ([*other, 1], [5, 6])]
    rows, _ = plan_rows([*requests, ([1, 2, 3], [4])], 100)
    groups = [(prefix, len(members)) for prefix, members in share_prefixes(rows)]
    assert groups == [(40, 4), (40, 2), (0, 1)], "the shared beginning ends before the first position that is scored"
    batches = make_batches(rows, lambda count, prefix, behind, scored: count * behind <= 12)
    assert sorted(index for batch in batches for row in batch.rows for index, _, _ in row.members) == list(range(7))
    assert all(row.tokens[: len(batch.prefix)] == batch.prefix for batch in batches for row in batch.rows)
    sizes = [(len(batch.prefix), [len(row.tokens) for row in batch.rows]) for batch in batches]
    assert sizes == [(40, [46, 45]), (40, [44, 43]), (40, [43, 42]), (0, [3])]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 30), st.integers(1, 3)), min_size=1, max_size=12), st.integers(1, 5))
def test_sharing_loses_no_request_and_costs_no_tokens(shapes: list[tuple[int, int, int]], most: int) -> None:
    starts = [list(range(20)), list(range(18)) + [99] * 9, []]
    requests = [(starts[kind] + [50 + length % 3] * length, list(range(scored))) for kind, length, scored in shapes]
    rows, _ = plan_rows(requests, 1000)
    batches = make_batches(rows, lambda count, prefix, behind, scored: count <= most)
    assert sorted(index for batch in batches for row in batch.rows for index, _, _ in row.members) == list(range(len(requests)))
    for batch in batches:
        assert all(row.tokens[: len(batch.prefix)] == batch.prefix for row in batch.rows)
        assert all(len(batch.prefix) <= len(row.tokens) - row.num_scored for row in batch.rows)
    shared = {batch.prefix: 0 for batch in batches}
    behind = sum(len(row.tokens) - len(batch.prefix) for batch in batches for row in batch.rows)
    assert sum(map(len, shared)) + behind <= sum(len(row.tokens) for row in rows)


def test_results_reach_the_taker_with_their_numbers() -> None:
    replicas, taken = Replicas({"double": lambda items: (2 * item for item in items)}, None, 0, 1), {}
    replicas.map("double", [3, 1, 2], taken.__setitem__)
    assert taken == {0: 6, 1: 2, 2: 4}


def test_batches_are_as_large_as_the_estimate_allows_and_never_tried_out() -> None:
    room = Room(free=1000.0, token=1.0, layer_cache=0.5, stage_cache=2.0, logits=10.0, most_tokens=400)
    auto = BatchRule(None, room)
    assert auto.scoring(10, 0, 20, 1) and not auto.scoring(25, 0, 20, 1), "25 rows would take 1000 bytes and more"
    assert not auto.scoring(10, 0, 41, 0), "more tokens than are of use"
    assert auto.scoring(1, 10**6, 10**6, 10**6), "one row must go somehow"
    assert not auto.scoring(10, 200, 20, 1), "the shared prefix counts as well"
    assert auto.generating(4, 50, 40) and not auto.generating(5, 50, 40)
    assert BatchRule(3, room).scoring(3, 0, 10**6, 1) and not BatchRule(3, room).generating(4, 1, 1)
    small = room.common(Room(10.0, 0.1, 0.1, 9.0, 0.1, 5))
    assert small == Room(10.0, 1.0, 0.5, 9.0, 10.0, 5)


def test_after_an_error_amid_the_work_nothing_more_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other drivers wait for this one's share and would not read it: the process would hang instead of failing."""
    from mindspeed_lora.evaluation import replicas as module

    sent: list[object] = []
    monkeypatch.setattr(module, "broadcast_object", lambda value, source, group: sent.append(value))

    def out_of_memory(items: Sequence[int]) -> Iterator[int]:
        yield items[0]
        raise RuntimeError("out of memory")

    work = Replicas({"good": iter, "bad": out_of_memory}, None, 0, 1)
    work.map("good", [1, 2], lambda index, result: None)
    work.release()
    assert sent == [("good", [1, 2]), None]
    with pytest.raises(RuntimeError, match="out of memory"):
        work.map("bad", [1, 2], lambda index, result: None)
    work.release()
    assert sent[2:] == [("bad", [1, 2])]


def test_a_generation_ends_at_the_first_stop_text() -> None:
    assert cut_at("answer\n\nQuestion: x", ["Question:", "\n\n"]) == "answer" and cut_at("all", ["\n"]) == "all"


def test_what_is_printed_and_written(tmp_path: Path) -> None:
    results = {
        "results": {"mmlu_a": {"alias": "a", "acc,none": 0.5}, "mmlu_b": {"alias": "b", "acc,none": 1.0}},
        "configs": {"mmlu_a": {"function": test_rows_may_hold_commas_quotes_and_line_breaks}},
        "samples": {"mmlu_a": [{"doc_id": 0, "acc": 1.0}, {"doc_id": 1, "acc": 0.0}], "mmlu_b": [{"doc_id": 0, "acc": 1.0}]},
    }
    scores = subject_scores(results)
    assert score_line("mmlu", scores) == f"mmlu acc = 2/3={2 / 3}"
    assert table(scores).splitlines()[0].split() == ["subject", "question_n", "acc"]
    assert table(scores).splitlines()[-1].split() == ["total", "3", "0.666667"]
    paths = write_results(tmp_path / "out", "mmlu", results, {"load": "x"})
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert content["groups"]["mmlu"]["acc,none"] == 2 / 3 and content["mindspeed_lora"]["load"] == "x" and "samples" not in content
    assert [path.name for path in paths] == ["samples_mmlu_a.jsonl", "samples_mmlu_b.jsonl", "results.json"]
    assert [json.loads(line)["acc"] for line in paths[0].read_text().splitlines()] == [1.0, 0.0]
    with pytest.raises(UsageError, match=r"results.json is a file"):
        check_output(tmp_path / "out" / "results.json")
