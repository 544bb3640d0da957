"""What defines a LoRA adapter's function besides its tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ModuleLora:
    """Rank and alpha in one Megatron linear: one entry, one A for all of it; else one entry for each HF part, rank 0: not adapted."""

    ranks: tuple[int, ...]
    alphas: tuple[float, ...]

    @property
    def width(self) -> int:
        """Rows of the whole A."""
        return sum(self.ranks)


@dataclass(frozen=True)
class LoraSpec:
    """``y = W x + scale * B (A x)`` with A ``[r, in]``, B ``[out, r]``, on the modules named by ``targets`` (Megatron names).

    ``rslora``: scale is alpha / sqrt(r) in place of alpha / r. ``modules``: for an adapter trained elsewhere, the linears that it
    adapts (``decoder.layers.0.mlp.linear_fc1``), each with its own ranks; empty: every target linear, r and alpha in all of them.
    ``shared_experts``: the routed experts of a layer have one A and B; files hold it once for each of them.
    """

    r: int
    alpha: float
    targets: tuple[str, ...]
    rslora: bool = False
    modules: Mapping[str, ModuleLora] = field(default_factory=dict, hash=False)
    shared_experts: bool = False

    @property
    def scale(self) -> float:
        """Factor of the adapter's contribution, where ``modules`` is empty."""
        return self._scale(self.r, self.alpha)

    @property
    def widest(self) -> int:
        """Rows of the largest A."""
        return max((module.width for module in self.modules.values()), default=self.r)

    def _scale(self, r: int, alpha: float) -> float:
        return alpha / math.sqrt(r) if self.rslora else alpha / r

    @property
    def uniform(self) -> ModuleLora:
        """What every linear has where ``modules`` is empty."""
        return ModuleLora((self.r,), (self.alpha,))

    def module(self, name: str) -> ModuleLora | None:
        """Ranks of a linear, by its name or its weight's; None: it is not adapted. The caller has looked at ``targets``."""
        return self.modules.get(name.removesuffix(".weight")) if self.modules else self.uniform

    def scales(self, module: ModuleLora) -> tuple[float, ...]:
        """Factor of each entry's contribution; 0 where it has none."""
        return tuple(self._scale(r, alpha) if r else 0.0 for r, alpha in zip(module.ranks, module.alphas, strict=True))

    def entry(self) -> dict[str, Any]:
        """The ``lora`` field of a manifest."""
        entry: dict[str, Any] = {"r": self.r, "alpha": self.alpha, "targets": list(self.targets)}
        if self.rslora:
            entry["use_rslora"] = True
        if self.shared_experts:
            entry["shared_experts"] = True
        if self.modules:
            entry["per_module"] = {name: {"r": list(each.ranks), "alpha": list(each.alphas)} for name, each in self.modules.items()}
        return entry

    @staticmethod
    def from_entry(entry: Mapping[str, Any]) -> LoraSpec:
        """Inverse of :meth:`entry`; Raises KeyError, TypeError or ValueError where it is damaged."""
        modules = {
            name: ModuleLora(tuple(map(int, each["r"])), tuple(map(float, each["alpha"])))
            for name, each in (entry.get("per_module") or {}).items()
        }
        rslora, shared = bool(entry.get("use_rslora")), bool(entry.get("shared_experts"))
        return LoraSpec(int(entry["r"]), float(entry["alpha"]), tuple(entry["targets"]), rslora, modules, shared)

    def describe(self) -> str:
        """``r 8, alpha 16 on linear_qkv linear_proj``, and what is out of the ordinary."""
        text = f"r {self.r}, alpha {self.alpha:g}{' (scale alpha / sqrt(r))' if self.rslora else ''} on {' '.join(self.targets)}"
        if self.shared_experts:
            text += "; one A and B for all experts of a layer, written once for each"
        if self.modules:
            own = sum(len(each.ranks) > 1 for each in self.modules.values())
            text += f"; {len(self.modules)} linears with r and alpha of their own, {own} of them with an A for each of their parts"
        return text
