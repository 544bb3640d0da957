"""Planning forward passes, batches and replicas, without a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mindspeed_lora.evaluation.batching import BatchRule, Room
from mindspeed_lora.evaluation.lm import cut_at
from mindspeed_lora.evaluation.replicas import Replicas
from mindspeed_lora.evaluation.scoring import RowBatch, RowScores, answers_of, make_batches, plan_rows, share_prefixes


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
