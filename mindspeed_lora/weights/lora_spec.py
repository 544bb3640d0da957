"""What defines a LoRA adapter's function besides its tensors."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LoraSpec:
    """``y = W x + scale * B (A x)`` with A ``[r, in]``, B ``[out, r]``, on the modules named by ``targets`` (Megatron names)."""

    r: int
    alpha: float
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        """Factor of the adapter's contribution."""
        return self.alpha / self.r
