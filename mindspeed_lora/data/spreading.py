"""Padding-free micro-batches: which records lie behind one another in a row, so that rows are about equally long.

The rows of all ranks together hold the global batch; as the loss is a mean over all of it, which record lies where changes no result.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def spread(lengths: Sequence[int], num_rows: int, most: int) -> list[list[int]]:
    """Record numbers of each row: the longest record first, into the row with the fewest tokens that holds less than ``most`` records.

    ``most`` bounds a row to the tokens of as many full records, the memory of the padded micro-batch. Records keep their order in a row.

    Args:
        lengths: tokens of each record; at most ``num_rows * most`` of them.
        num_rows: rows to fill.
        most: records of a row.
    """
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    open_rows = [(0, row) for row in range(num_rows)]
    for number in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        tokens, row = heapq.heappop(open_rows)
        rows[row].append(number)
        if len(rows[row]) < most:
            heapq.heappush(open_rows, (tokens + lengths[number], row))
    return [sorted(row) for row in rows]


def deal(rows: Sequence[list[int]], lengths: Sequence[int], num_ranks: int) -> list[list[list[int]]]:
    """Each rank's rows: the longest ones first, dealt forwards and backwards in turn, so that all ranks get about the same."""
    order = sorted(rows, key=lambda row: -sum(lengths[number] for number in row))
    hands: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    for turn, start in enumerate(range(0, len(order), num_ranks)):
        ranks = range(num_ranks) if turn % 2 == 0 else range(num_ranks - 1, -1, -1)
        for rank, row in zip(ranks, order[start : start + num_ranks], strict=True):
            hands[rank].append(row)
    return hands
