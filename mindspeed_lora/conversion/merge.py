"""Merging an adapter: ``W + scale * B A`` in fp32, cast once.

What the cast takes away from the adapter is measured: with delta = scale B A and merged the stored result,
share = |merged - (W + delta)| / |delta| in fp32 (Frobenius norms over all tensors of a module kind); 0 where fp32 is stored.
|B A|^2 = sum((B^T B) * (A A^T)) needs r x r numbers only; the rest is done in blocks of rows that stay in the processor's cache.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass, field

import torch

from mindspeed_lora.weights.table import Row

_CACHED_BYTES = 1 << 19  # of each of the two fp32 buffers of a merge: both fit a core's second-level cache


@dataclass
class RoundingReport:
    """Sums of squares per module kind; each block of the base counts once, however many ranks get it."""

    delta: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    lost: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    seen: set[Hashable] = field(default_factory=set)

    def add(self, block: Hashable, row: Row, delta: float, lost: float) -> None:
        """Count one block: squared Frobenius norms of its change and of what the cast took of it."""
        if block not in self.seen:
            self.seen.add(block)
            self.delta[str(row.module)] += delta
            self.lost[str(row.module)] += lost

    def shares(self) -> dict[str, float]:
        """Share lost in [0, ..] per module kind and in ``total``; an adapter that changes nothing loses nothing."""
        sums = {name: (self.lost[name], self.delta[name]) for name in self.delta}
        sums["total"] = (sum(self.lost.values()), sum(self.delta.values()))
        return {name: math.sqrt(lost / delta) if delta else 0.0 for name, (lost, delta) in sums.items()}

    @property
    def changes_nothing(self) -> bool:
        """Whether the adapter's contribution is zero everywhere."""
        return bool(self.delta) and sum(self.delta.values()) == 0.0


@dataclass(frozen=True)
class Change:
    """``scale * B A`` of one HF part: ``matrix_a`` [r, in] and ``matrix_b`` [out, r] in fp32, ``gram`` = A A^T in fp64."""

    matrix_a: torch.Tensor
    matrix_b: torch.Tensor
    scale: float
    gram: torch.Tensor

    @classmethod
    def of(cls, matrix_a: torch.Tensor, matrix_b: torch.Tensor, scale: float) -> Change:
        """From A and B in the adapter's dtype."""
        matrix_a, matrix_b = matrix_a.float(), matrix_b.float()
        return cls(matrix_a, matrix_b, scale, (matrix_a @ matrix_a.T).double())

    def added_to(self, weight: torch.Tensor, first: int, dtype: torch.dtype) -> tuple[torch.Tensor, float, float]:
        """Rows of W from ``first`` on, changed and cast once to ``dtype``; squared norms of the change and of what the cast took.

        The last is infinite or NaN where the result, or the sum before the cast, is.
        """
        rows, width = weight.shape
        matrix_b = self.matrix_b[first : first + rows]
        result = torch.empty(rows, width, dtype=dtype)
        step = max(_CACHED_BYTES // (4 * width), 1)
        sums, casts = torch.empty(2, min(step, rows), width).unbind()
        power_of_two = abs(math.frexp(self.scale)[0]) == 0.5  # then scaling rounds nothing, and may be one step with the sum
        lost = 0.0
        for own, rows_b, out in zip(weight.split(step), matrix_b.split(step), result.split(step), strict=True):
            total, other = sums[: len(own)], casts[: len(own)]
            torch.mm(rows_b, self.matrix_a, out=total)
            other.copy_(own)
            if power_of_two:
                torch.add(other, total, alpha=self.scale, out=total)
            else:
                total.mul_(self.scale).add_(other)
            flat = total.sub_(other.copy_(out.copy_(total))).view(-1)
            lost += float(torch.dot(flat, flat))
        delta = float(((matrix_b.T @ matrix_b).double() * self.gram).sum())
        return result, max(self.scale * self.scale * delta, 0.0), lost
