"""Log-likelihoods with as few forward passes, over as few tokens, as possible.

```
requests (context, continuation)
   | same input but for the last token: one row        the letters of a question are read off one position
rows                    aaaaaaaaaaaaaaaaaaaaQ1         solved examples a, questions Q
   |                    aaaaaaaaaaaaaaaaaaaaQ2222
   | a beginning that is shared: computed once, its keys and values kept
prefix, rows behind it  aaaaaaaaaaaaaaaaaaaa | Q1, Q2222
   | longest first, as many together as fit
batches
```

Longest first means that memory runs out at the start or not at all, and that little is padded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from mindspeed_lora.inference.engine import Engine, ScoreBatch

SHORTEST_PREFIX = 16  # tokens; a pass of its own for fewer would cost more than it saves

Fits = Callable[[int, int, int, int], bool]
"""(rows, prefix length, length behind it, scored positions) -> whether such a batch may be made."""


@dataclass(frozen=True)
class ScoreRow:
    """``tokens``: the input; the last ``num_scored`` positions are scored. ``last_tokens``: what may follow the input.

    ``members``: (request, continuation length, last token) of the requests that this row answers.
    """

    tokens: tuple[int, ...]
    num_scored: int
    last_tokens: tuple[int, ...]
    members: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class RowBatch:
    """``rows`` that are scored together; their first ``len(prefix)`` tokens are ``prefix``."""

    prefix: tuple[int, ...]
    rows: tuple[ScoreRow, ...]


@dataclass(frozen=True)
class RowScores:
    """``log_probs`` float64 ``[k, c]``: of the input's own next token (column 0), at the last position of each of the last tokens;
    ``best`` int64 ``[k]``: the most likely token.
    """

    log_probs: torch.Tensor
    best: torch.Tensor


def plan_rows(requests: Sequence[tuple[list[int], list[int]]], max_length: int) -> tuple[list[ScoreRow], int]:
    """Turn (context, continuation) ids into rows; contexts that are too long lose tokens on the left.

    Returns:
        The rows, and how many requests were cut.
    """
    groups: dict[tuple[int, ...], list[tuple[int, int, int]]] = {}
    num_cut = 0
    for index, (context, continuation) in enumerate(requests):
        whole = context + continuation
        num_cut += len(whole) > max_length + 1
        tokens = tuple(whole[-(max_length + 1) :][:-1])
        groups.setdefault(tokens, []).append((index, min(len(continuation), len(tokens)), whole[-1]))
    rows = []
    for tokens, members in groups.items():
        last_tokens = tuple(dict.fromkeys(last for _, _, last in members))
        rows.append(ScoreRow(tokens, max(length for _, length, _ in members), last_tokens, tuple(members)))
    return rows, num_cut


def share_prefixes(rows: Sequence[ScoreRow]) -> list[tuple[int, list[ScoreRow]]]:
    """Cut the rows into groups that begin alike: (length of the shared beginning, or 0; rows).

    Rows are taken in the order of their tokens, so that those that begin alike are neighbours. A row joins the group before it
    where that saves tokens: n rows that share p tokens save (n - 1) p, with one more that shares p' of them n p'.
    A prefix ends before the first scored position. Rows that share nothing come last, together.
    """
    groups: list[tuple[int, list[ScoreRow]]] = []
    for row in sorted(rows, key=lambda row: row.tokens):
        room = len(row.tokens) - row.num_scored
        if groups:
            prefix, members = groups[-1]
            shared = min(prefix, room, _shared(members[-1].tokens, row.tokens))
            if shared >= SHORTEST_PREFIX and (len(members) == 1 or len(members) * shared > (len(members) - 1) * prefix):
                members.append(row)
                groups[-1] = (shared, members)
                continue
        groups.append((room, [row]))
    alone = [members[0] for _, members in groups if len(members) == 1]
    return [group for group in groups if len(group[1]) > 1] + ([(0, alone)] if alone else [])


def _shared(first: tuple[int, ...], second: tuple[int, ...]) -> int:
    """Length of the beginning that both have."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(first), len(second)))


def make_batches(rows: Sequence[ScoreRow], fits: Fits) -> list[RowBatch]:
    """Batches of rows that begin alike, the largest first but for what shares a prefix, which stays together."""
    groups = [(prefix, sorted(members, key=lambda row: (-len(row.tokens), row.tokens))) for prefix, members in share_prefixes(rows)]
    batches = []
    for prefix, members in sorted(groups, key=lambda group: -len(group[1][0].tokens)):
        start = 0
        while start < len(members):
            longest = len(members[start].tokens) - prefix
            end = start + 1
            while end < len(members) and fits(end + 1 - start, prefix, longest, max(row.num_scored for row in members[start : end + 1])):
                end += 1
            batches.append(RowBatch(members[start].tokens[:prefix], tuple(members[start:end])))
            start = end
    return batches


def answers_of(batch: RowBatch, scores: Sequence[RowScores]) -> Iterator[tuple[int, tuple[float, bool]]]:
    """(request, (log-likelihood, whether greedy decoding would say it)) of every request that the batch answers."""
    for row, score in zip(batch.rows, scores, strict=True):
        for index, length, last in row.members:
            inner = score.log_probs[row.num_scored - length : -1, 0]
            final = score.log_probs[-1, row.last_tokens.index(last)]
            expected = [*row.tokens[len(row.tokens) - length + 1 :], last]
            is_greedy = score.best[row.num_scored - length :].tolist() == expected
            yield index, (float(inner.sum() + final), is_greedy)


def _tensors(batch: RowBatch) -> ScoreBatch:
    """Tokens behind the prefix, padded on the right with 0; the padding's scores are ignored."""
    skipped = len(batch.prefix)
    length = max(len(row.tokens) for row in batch.rows) - skipped
    scored = max(row.num_scored for row in batch.rows)
    choices = max(len(row.last_tokens) for row in batch.rows)
    ids = torch.zeros(len(batch.rows), length, dtype=torch.int64)
    wanted = torch.zeros(len(batch.rows), scored, dtype=torch.int64)
    targets = torch.zeros(len(batch.rows), scored, choices, dtype=torch.int64)
    for index, row in enumerate(batch.rows):
        end, k = len(row.tokens) - skipped, row.num_scored
        tokens = torch.tensor(row.tokens[skipped:], dtype=torch.int64)
        ids[index, :end] = tokens
        wanted[index, :k] = torch.arange(end - k, end)
        targets[index, : k - 1] = tokens[end - k + 1 :].unsqueeze(-1)
        targets[index, k - 1, : len(row.last_tokens)] = torch.tensor(row.last_tokens, dtype=torch.int64)
    return ScoreBatch(ids, wanted, targets, batch.prefix)


def score_batches(engine: Engine, batches: Sequence[RowBatch]) -> Iterator[list[RowScores]]:
    """The scores of each batch's rows, one forward pass each, and one for a prefix where it changes."""
    for batch, scores in zip(batches, engine.score(map(_tensors, batches)), strict=True):
        yield [
            RowScores(
                scores.log_probs[index, : row.num_scored, : len(row.last_tokens)].clone(), scores.best[index, : row.num_scored].clone()
            )
            for index, row in enumerate(batch.rows)
        ]
