"""Merging an adapter: ``W + scale * B A`` in fp32, cast once.

What the cast takes away from the adapter is measured: with delta = scale B A and merged the stored result,
share = |merged - (W + delta)| / |delta| in fp32 (Frobenius norms over all tensors of a module kind); 0 where fp32 is stored.
|B A|^2 = sum((B^T B) * (A A^T)) needs r x r numbers only; the rest is done in blocks of rows that stay in the processor's cache.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from mindspeed_lora.ops.products import goes_to_onednn, product
from mindspeed_lora.weights.table import Row

_CACHED_BYTES = 1 << 21  # of the fp32 sums of a piece: with smaller ones, threads hand Python's lock to and fro more often
# Where MKL's kernels for AMD add a product in place with the bits of one that is added afterwards; on Intel's CPUs it saves no time.
_FEWEST_ROWS, _FEWEST_COLUMNS, _LARGEST_R = 16, 16, 128


class Workspace(threading.local):
    """A thread's buffers: the system would clear new ones for each block."""

    def __init__(self) -> None:
        self._kept: dict[str, torch.Tensor] = {}

    def rows(self, use: str, count: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        """``[count, width]``, undefined; the same memory for the same ``use``."""
        kept = self._kept.get(use)
        if kept is None or kept.dtype != dtype or kept.numel() < count * width:
            kept = self._kept[use] = torch.empty(max(count * width, _CACHED_BYTES // 4), dtype=dtype)
        return kept[: count * width].view(count, width)


@dataclass
class RoundingReport:
    """Sums of squares per module kind; each block of the base counts once, however many ranks get it."""

    blocks: dict[Hashable, tuple[str, float, float]] = field(default_factory=dict)

    def add(self, block: Hashable, row: Row, delta: float, lost: float) -> None:
        """Count one block: squared Frobenius norms of its change and of what the cast took of it. Threads may meet here."""
        self.blocks.setdefault(block, (str(row.module), delta, lost))

    def shares(self) -> dict[str, float]:
        """Share lost in [0, ..] per module kind and in ``total``; an adapter that changes nothing loses nothing."""
        found = list(self.blocks.values())
        kinds = {kind: [sums for sums in found if sums[0] == kind] for kind in sorted({kind for kind, _, _ in found})}
        return {kind: _share(sums) for kind, sums in (*kinds.items(), ("total", found))}

    @property
    def changes_nothing(self) -> bool:
        """Whether the adapter's contribution is zero everywhere."""
        return bool(self.blocks) and all(delta == 0.0 for _, delta, _ in self.blocks.values())


def _share(sums: Sequence[tuple[str, float, float]]) -> float:
    delta, lost = math.fsum(delta for _, delta, _ in sums), math.fsum(lost for _, _, lost in sums)  # the same in any order
    return math.sqrt(lost / delta) if delta else 0.0


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

    def added_to(self, base: torch.Tensor, first: int, dtype: torch.dtype, workspace: Workspace) -> Iterator[tuple[torch.Tensor, float]]:
        """Yield the rows of W that ``base`` holds, from row ``first`` on, changed and cast once to ``dtype``, and what the cast took.

        They come in pieces that share their memory. What the cast took is a squared norm; it is infinite or NaN where the result, or the
        sum before the cast, is.
        """
        rows, width = base.shape
        step = min(max(_CACHED_BYTES // (4 * width), 1), rows)
        sums, back = (workspace.rows(use, step, width, torch.float32) for use in ("sums", "back"))
        result = workspace.rows("result", step, width, dtype)
        # Few calls, and nothing cut inside the loop: each call gives Python's lock away, waits for it again, and another thread is at it.
        for part, stored in zip(self.matrix_b[first : first + rows].split(step), base.split(step), strict=True):
            if len(part) < len(sums):
                sums, back, result = sums[: len(part)], back[: len(part)], result[: len(part)]
            sums.copy_(stored)
            self._add_to(sums, part)
            result.copy_(sums)
            back.copy_(result)
            flat = sums.sub_(back).view(-1)
            yield result, float(torch.dot(flat, flat))

    def _add_to(self, sums: torch.Tensor, part: torch.Tensor) -> None:
        """``sums += scale * part A``, the product rounded before it is scaled, and scaled before it is added."""
        power_of_two = abs(math.frexp(self.scale)[0]) == 0.5  # then scaling rounds nothing
        large = len(part) >= _FEWEST_ROWS and sums.shape[1] >= _FEWEST_COLUMNS and part.shape[1] <= _LARGEST_R
        if power_of_two and large and goes_to_onednn(part) and torch.backends.mkl.is_available():
            sums.addmm_(part, self.matrix_a, alpha=self.scale)
        else:
            sums.add_(product(part, self.matrix_a).mul_(self.scale))

    def squared_norm(self, first: int, last: int) -> float:
        """|scale B A|^2 of rows [first, last)."""
        matrix_b = self.matrix_b[first:last]
        return self.scale * self.scale * max(float(((matrix_b.T @ matrix_b).double() * self.gram).sum()), 0.0)
