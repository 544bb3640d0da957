"""Products of rows that lie group after group with one matrix per group: the experts of a rank, each with its own tokens.

| function       | per group e                            | shapes                                       |
|----------------|----------------------------------------|----------------------------------------------|
| grouped_linear | ``y_e = x_e W_e^T``                    | ``[n, in], [E, out, in] -> [n, out]``        |
| grouped_matmul | ``y_e = x_e W_e``                      | ``[n, out], [E, out, in] -> [n, in]``        |
| grouped_outer  | ``W_e = y_e^T x_e``                    | ``[n, out], [n, in] -> [E, out, in]``        |

An empty group gives no rows, and a zero matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True, eq=False)
class RowGroups:
    """``counts`` ``[E]`` int64: rows of each group, in order; their sum is the number of rows."""

    counts: torch.Tensor

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """The counts on the host: waits for the device, once."""
        return tuple(self.counts.tolist())

    def split(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Views ``[n_e, ...]`` of ``rows``, one per group."""
        return rows.split(self.lengths)


def grouped_linear(x: torch.Tensor, weight: torch.Tensor, groups: RowGroups) -> torch.Tensor:
    """x ``[n, in]``, weight ``[E, out, in]`` -> ``[n, out]``."""
    return grouped_matmul(x, weight.transpose(1, 2), groups)


def grouped_matmul(x: torch.Tensor, weight: torch.Tensor, groups: RowGroups) -> torch.Tensor:
    """x ``[n, k]``, weight ``[E, k, m]`` -> ``[n, m]``."""
    y = x.new_empty(x.shape[0], weight.shape[2])
    for rows, matrix, out in zip(groups.split(x), weight, groups.split(y), strict=True):
        if rows.shape[0]:
            torch.mm(rows, matrix, out=out)
    return y


def add_grouped_matmul(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, groups: RowGroups, scale: float = 1.0) -> torch.Tensor:
    """``y += scale * grouped_matmul(x, weight)`` in place; returns y."""
    for out, rows, matrix in zip(groups.split(y), groups.split(x), weight, strict=True):
        if rows.shape[0]:
            out.addmm_(rows, matrix, alpha=scale)
    return y


def grouped_outer(y: torch.Tensor, x: torch.Tensor, groups: RowGroups) -> torch.Tensor:
    """y ``[n, out]``, x ``[n, in]`` -> ``[E, out, in]``."""
    result = y.new_zeros(len(groups.lengths), y.shape[1], x.shape[1])
    for out, left, right in zip(result, groups.split(y), groups.split(x), strict=True):
        if left.shape[0]:
            torch.mm(left.t(), right, out=out)
    return result
