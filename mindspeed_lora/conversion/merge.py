"""The weights that a conversion writes: the base's own, or ``W + scale * B A`` in fp32 and cast once.

What the cast takes away from the adapter is measured: with delta = scale B A and merged the stored result,
share = |merged - (W + delta)| / |delta| in fp32 (Frobenius norms over all tensors of a module kind); 0 where fp32 is stored.
|B A|^2 = sum((B^T B) * (A A^T)) needs r x r numbers only; the rest is done in blocks of rows that stay in the processor's cache.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from mindspeed_lora.errors import CheckpointError
from mindspeed_lora.weights.lora_blocks import Pair, module_of, part_scales
from mindspeed_lora.weights.lora_spec import LoraSpec
from mindspeed_lora.weights.sources import Adapter, Base
from mindspeed_lora.weights.table import Row

_BLOCK_BYTES = 1 << 25  # of an embedding or head, in memory at a time
_CACHED_BYTES = 1 << 19  # of each of the two fp32 buffers of a merge: both fit a core's second-level cache


@dataclass
class RoundingReport:
    """Sums of squares per module kind; each base tensor counts once."""

    delta: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    lost: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    seen: set[tuple[str, int | None]] = field(default_factory=set)

    def add(self, row: Row, delta: float, lost: float) -> None:
        """Count one part: squared Frobenius norms of its change and of what the cast took of it."""
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


class WeightStream:
    """Hands out the tensors to write, one row at a time, in the target's dtype."""

    def __init__(self, base: Base, adapter: Adapter | None, lora: LoraSpec | None, dtype: torch.dtype | None) -> None:
        self.base, self.adapter, self.lora, self.dtype = base, adapter, lora, dtype
        self.report = RoundingReport()

    def part_dtypes(self, row: Row, layer: int | None) -> list[torch.dtype]:
        """dtype that each HF part will have."""
        return [self.dtype or dtype for dtype in self.base.part_dtypes(row, layer)]

    def parts(self, row: Row, layer: int | None) -> list[torch.Tensor]:
        """The HF parts of one row, merged where the adapter adapts it, each cast once.

        Raises:
            CheckpointError: one holds NaN or infinity (looked for when a row is read for the first time).
        """
        unseen = (row.megatron, layer) not in self.report.seen
        self.report.seen.add((row.megatron, layer))
        pairs, scales = self._adapter_of(row, layer)
        stored = zip(row.hf_names(layer), self.base.parts(row, layer), self.part_dtypes(row, layer), strict=True)
        parts = []
        for (name, part, dtype), pair, scale in zip(stored, pairs, scales, strict=True):
            if pair is None:
                result = part.to(dtype)
            else:
                result, delta, lost = merged(part, pair, scale, dtype)
                if unseen:
                    self.report.add(row, delta, lost)
            if unseen and (pair is None or not math.isfinite(lost)):  # a finite difference from what is finite: nothing to look for
                self._check_finite(name, result)
            parts.append(result)
        return parts

    def _adapter_of(self, row: Row, layer: int | None) -> tuple[list[Pair | None], list[float]]:
        """A and B of each HF part (None: not adapted) and their scales."""
        module = module_of(self.lora, row, layer) if self.lora is not None else None
        if self.adapter is None or self.lora is None or module is None:
            return [None] * len(row.hf), [0.0] * len(row.hf)
        return self.adapter.pairs(row, layer), part_scales(self.lora, module, len(row.hf))

    def _check_finite(self, name: str, part: torch.Tensor) -> None:
        smallest, largest = torch.aminmax(part)  # both are NaN where any element is
        if not (math.isfinite(smallest) and math.isfinite(largest)):
            cause = ", or does after the merge or the cast" if self.adapter is not None or self.dtype is not None else ""
            raise CheckpointError(f"{self.base.path}: tensor {name} holds NaN or infinity{cause}; nothing is written")

    def vocabulary_blocks(self, row: Row, start: int, stop: int) -> Iterator[torch.Tensor]:
        """Rows ``start`` to ``stop`` of an embedding or head (LoRA targets neither), a block at a time, each cast once."""
        (dtype,) = self.part_dtypes(row, None)
        step = max(_BLOCK_BYTES // (row.part_shapes[0][1] * dtype.itemsize), 1)
        for first in range(start, stop, step):
            block = self.base.vocabulary_rows(row, first, min(first + step, stop)).to(dtype)
            self._check_finite(row.hf_names(None)[0], block)
            yield block


def merged(weight: torch.Tensor, pair: Pair, scale: float, dtype: torch.dtype) -> tuple[torch.Tensor, float, float]:
    """``W + scale * B A`` of one HF part in fp32, cast once to ``dtype``; and the squared norms of the change and of what the cast took.

    The last is infinite or NaN where the result, or the sum before the cast, is.
    """
    matrix_a, matrix_b = (matrix.float() for matrix in pair)
    rows, width = weight.shape
    result = torch.empty(rows, width, dtype=dtype)
    step = max(_CACHED_BYTES // (4 * width), 1)
    sums, casts = torch.empty(2, min(step, rows), width).unbind()
    power_of_two = abs(math.frexp(scale)[0]) == 0.5  # then scaling rounds nothing, and may be one step with the sum
    lost = 0.0
    for own, rows_b, out in zip(weight.split(step), matrix_b.split(step), result.split(step), strict=True):
        total, other = sums[: len(own)], casts[: len(own)]
        torch.mm(rows_b, matrix_a, out=total)
        other.copy_(own)
        if power_of_two:
            torch.add(other, total, alpha=scale, out=total)
        else:
            total.mul_(scale).add_(other)
        flat = total.sub_(other.copy_(out.copy_(total))).view(-1)
        lost += float(torch.dot(flat, flat))
    gram = (matrix_b.T @ matrix_b).double() * (matrix_a @ matrix_a.T).double()
    return result, max(scale * scale * float(gram.sum()), 0.0), lost
