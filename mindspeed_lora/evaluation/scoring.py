"""Log-likelihoods with as few forward passes as possible.

Requests whose inputs are the same but for the last token of the continuation share one row: the four letters of a
multiple-choice question are read off one position's logits. Rows are sorted by length, longest first, so that memory
runs out at the start or not at all, and little is padded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from mindspeed_lora.inference.engine import Engine


@dataclass
class ScoreRow:
    """``tokens``: the input; the last ``num_scored`` positions are scored. ``last_tokens``: what may follow the input."""

    tokens: list[int]
    num_scored: int
    last_tokens: list[int]


@dataclass(frozen=True)
class RowScores:
    """``log_probs`` float32 ``[k, c]``: of the input's own next token (column 0), at the last position of each of the last tokens;
    ``best`` int64 ``[k]``: the most likely token.
    """

    log_probs: torch.Tensor
    best: torch.Tensor


@dataclass
class _Plan:
    rows: list[ScoreRow] = field(default_factory=list)
    members: list[list[tuple[int, int, int]]] = field(default_factory=list)  # per row: (request, continuation length, last token)


def plan_rows(requests: Sequence[tuple[list[int], list[int]]], max_length: int) -> tuple[_Plan, int]:
    """Turn (context, continuation) ids into rows, longest first; contexts that are too long lose tokens on the left.

    Returns:
        The plan, and how many requests were cut.
    """
    groups: dict[tuple[int, ...], list[tuple[int, int, int]]] = {}
    num_cut = 0
    for index, (context, continuation) in enumerate(requests):
        whole = context + continuation
        num_cut += len(whole) > max_length + 1
        tokens = tuple(whole[-(max_length + 1) :][:-1])
        groups.setdefault(tokens, []).append((index, min(len(continuation), len(tokens)), whole[-1]))
    plan = _Plan()
    for tokens in sorted(groups, key=lambda tokens: (-len(tokens), tokens)):
        members = groups[tokens]
        last_tokens = list(dict.fromkeys(last for _, _, last in members))
        plan.rows.append(ScoreRow(list(tokens), max(length for _, length, _ in members), last_tokens))
        plan.members.append(members)
    return plan, num_cut


def collect_answers(plan: _Plan, scores: Sequence[RowScores], num_requests: int) -> list[tuple[float, bool]]:
    """(log-likelihood, whether greedy decoding would say it) per request, in the requests' order."""
    answers: list[tuple[float, bool]] = [(0.0, False)] * num_requests
    for row, members, score in zip(plan.rows, plan.members, scores, strict=True):
        for index, length, last in members:
            inner = score.log_probs[row.num_scored - length : -1, 0]
            final = score.log_probs[-1, row.last_tokens.index(last)]
            expected = [*row.tokens[len(row.tokens) - length + 1 :], last]
            is_greedy = score.best[row.num_scored - length :].tolist() == expected
            answers[index] = (float(inner.sum() + final), is_greedy)
    return answers


def _batch(rows: Sequence[ScoreRow]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids ``[b, s]`` padded on the right, wanted ``[b, k]``, targets ``[b, k, c]``; padding is 0 and its scores are ignored."""
    length = max(len(row.tokens) for row in rows)
    scored = max(row.num_scored for row in rows)
    choices = max(len(row.last_tokens) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    wanted = torch.zeros(len(rows), scored, dtype=torch.int64)
    targets = torch.zeros(len(rows), scored, choices, dtype=torch.int64)
    for index, row in enumerate(rows):
        end, k = len(row.tokens), row.num_scored
        tokens = torch.tensor(row.tokens, dtype=torch.int64)
        ids[index, :end] = tokens
        wanted[index, :k] = torch.arange(end - k, end)
        targets[index, : k - 1] = tokens[end - k + 1 :].unsqueeze(-1)
        targets[index, k - 1, : len(row.last_tokens)] = torch.tensor(row.last_tokens, dtype=torch.int64)
    return ids, wanted, targets


def score_batches(engine: Engine, batches: Sequence[Sequence[ScoreRow]]) -> Iterator[list[RowScores]]:
    """The scores of each batch of rows, one forward pass each."""
    for rows, scores in zip(batches, engine.score(_batch(rows) for rows in batches), strict=True):
        yield [
            RowScores(
                scores.log_probs[index, : row.num_scored, : len(row.last_tokens)].clone(), scores.best[index, : row.num_scored].clone()
            )
            for index, row in enumerate(rows)
        ]
