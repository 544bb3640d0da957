"""The weights that a conversion writes: the base's own, or ``W + scale * B A`` in fp32 and cast once.

What the cast takes away from the adapter is measured: with delta = scale B A and merged the stored result,
share = |merged - (W + delta)| / |delta| in fp32 (Frobenius norms over all tensors of a module kind); 0 where fp32 is stored.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from mindspeed_lora.errors import CheckpointError
from mindspeed_lora.weights.lora_spec import LoraSpec
from mindspeed_lora.weights.sources import Adapter, Base
from mindspeed_lora.weights.table import Row

_BLOCK_BYTES = 1 << 25  # of an embedding or head, in memory at a time


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
        """The HF parts of one row, merged where the adapter targets it, each cast once.

        Raises:
            CheckpointError: one holds NaN or infinity (looked for when a row is read for the first time).
        """
        unseen = (row.megatron, layer) not in self.report.seen
        self.report.seen.add((row.megatron, layer))
        parts = self._parts(row, layer, unseen)
        if unseen:
            for name, part in zip(row.hf_names(layer), parts, strict=True):
                self._check_finite(name, part)
        return parts

    def _check_finite(self, name: str, part: torch.Tensor) -> None:
        smallest, largest = torch.aminmax(part)  # both are NaN where any element is
        if not (math.isfinite(smallest) and math.isfinite(largest)):
            cause = ", or does after the merge or the cast" if self.adapter is not None or self.dtype is not None else ""
            raise CheckpointError(f"{self.base.path}: tensor {name} holds NaN or infinity{cause}; nothing is written")

    def _parts(self, row: Row, layer: int | None, unseen: bool) -> list[torch.Tensor]:
        parts, dtypes = self.base.parts(row, layer), self.part_dtypes(row, layer)
        if self.adapter is None or self.lora is None or row.module not in self.lora.targets:
            return [part.to(dtype) for part, dtype in zip(parts, dtypes, strict=True)]
        matrix_a, matrices_b = self.adapter.lora_parts(row, layer)
        matrix_a = matrix_a.float()
        merged = []
        scales = self.adapter.part_scales(row, layer, self.lora)
        for part, matrix_b, dtype, scale in zip(parts, matrices_b, dtypes, scales, strict=True):
            if not scale:
                merged.append(part.to(dtype))
                continue
            total = (matrix_b.float() @ matrix_a).mul_(scale)  # one buffer: delta, then the sum, then what the cast loses
            delta = _squared_norm(total) if unseen else 0.0
            result = total.add_(part).to(dtype, copy=True)
            if unseen:
                self.report.add(row, delta, _squared_norm(total.sub_(result)))
            merged.append(result)
        return merged

    def vocabulary_blocks(self, row: Row, start: int, stop: int) -> Iterator[torch.Tensor]:
        """Rows ``start`` to ``stop`` of an embedding or head (LoRA targets neither), a block at a time, each cast once."""
        (dtype,) = self.part_dtypes(row, None)
        step = max(_BLOCK_BYTES // (row.part_shapes[0][1] * dtype.itemsize), 1)
        for first in range(start, stop, step):
            block = self.base.vocabulary_rows(row, first, min(first + step, stop)).to(dtype)
            self._check_finite(row.hf_names(None)[0], block)
            yield block


def _squared_norm(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor)) ** 2
