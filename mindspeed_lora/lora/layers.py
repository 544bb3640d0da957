"""The LoRA layer that peft puts around a parallel linear layer: peft's names and bookkeeping, our arithmetic."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn.functional import linear

from mindspeed_lora import ops
from mindspeed_lora.lora.functions import ColumnLora, KeepBlocks, RowLora, Scale, scaled
from mindspeed_lora.parallel.layers import EVERY, ColumnParallelLinear, ReplicatedLinear, RowParallelLinear, enter_column, leave_row


class ParallelLoraLinear(nn.Module, LoraLayer):
    """``base(x) + scale * B (A x)`` over the tensor-parallel group.

    | base   | A per rank     | B per rank     |
    |--------|----------------|----------------|
    | column | [r, in] whole  | [out/t, r] cut |
    | row    | [r, in/t] cut  | [out, r] whole |

    The parts of a fused base may each have their own block of B, see :meth:`set_blocks`.
    ``fusion`` takes the functions of :mod:`mindspeed_lora.lora.functions`; without it autograd runs the same formula
    plainly. peft calls the constructor and passes more keywords than are used here.

    ``reference``: frozen (A, B) that :func:`as_reference` puts in the adapter's place; None: it leaves the base alone.
    """

    reference: tuple[torch.Tensor, torch.Tensor] | None = None
    is_reference = False

    def __init__(self, base_layer: nn.Module, adapter_name: str, r: int = 0, lora_alpha: float = 1, **_peft: Any) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Unsupported layer type")  # peft reads in_features and out_features all the same
            LoraLayer.__init__(self, base_layer)
        self.fusion = False
        self.update_layer(adapter_name, r, lora_alpha)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, **_peft: Any) -> None:  # type: ignore[override]
        """Add an adapter's A and B, and make it the active one; peft calls this for a second adapter of the same base."""
        if r <= 0:
            raise ValueError(f"LoRA rank must be positive, got {r}")
        weight = self.get_base_layer().weight
        assert isinstance(weight, torch.Tensor)
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.scaling[adapter_name] = lora_alpha / r
        self.lora_dropout[adapter_name] = nn.Identity()
        self.lora_A[adapter_name] = nn.Linear(weight.shape[1], r, bias=False, device=weight.device, dtype=weight.dtype)
        self.lora_B[adapter_name] = nn.Linear(r, weight.shape[0], bias=False, device=weight.device, dtype=weight.dtype)
        nn.init.zeros_(self._weight(self.lora_B, adapter_name))
        self.set_adapter([adapter_name])

    @staticmethod
    def _weight(matrices: nn.ModuleDict, adapter_name: str) -> torch.Tensor:
        weight = matrices[adapter_name].weight
        assert isinstance(weight, torch.Tensor)
        return weight

    def set_blocks(self, adapter_name: str, scale: float | list[float], mask: torch.Tensor | None) -> None:
        """Scale (one, or of each column of B), and where B ``[out, r]`` may differ from zero (None: everywhere)."""
        device = self._weight(self.lora_B, adapter_name).device
        columns = torch.tensor(scale, dtype=torch.float32, device=device) if isinstance(scale, list) else None
        self.scaling[adapter_name] = scale if isinstance(scale, float) else 1.0
        self.register_buffer(f"{adapter_name}_scale", columns, persistent=False)
        self.register_buffer(f"{adapter_name}_mask", None if mask is None else mask.to(device), persistent=False)

    def _adapter(self, name: str) -> tuple[torch.Tensor, torch.Tensor, Scale]:
        """A, B and scale as the arithmetic takes them."""
        a, b = self._weight(self.lora_A, name), self._weight(self.lora_B, name)
        scale, mask = getattr(self, f"{name}_scale", None), getattr(self, f"{name}_mask", None)
        return a, b if mask is None else KeepBlocks.apply(b, mask), self.scaling[name] if scale is None else scale

    def _in_use(self) -> tuple[torch.Tensor, torch.Tensor, Scale] | None:
        """A, B and scale of this pass; None: the base alone, as adapters are disabled or the one in use leaves this layer alone."""
        if self.disable_adapters or not self.active_adapters:
            return None
        (name,) = self.active_adapters
        if name not in self.lora_A or (self.is_reference and self.reference is None):
            return None
        a, b, scale = self._adapter(name)
        return (*self.reference, scale) if self.is_reference and self.reference is not None else (a, b, scale)

    def low_rank(self) -> tuple[torch.Tensor, torch.Tensor, Scale] | None:
        """See :meth:`mindspeed_lora.parallel.layers.ColumnParallelLinear.low_rank`."""
        return self._in_use()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the base layer's, plus the active adapter's part (none while adapters are disabled)."""
        base, used = self.get_base_layer(), self._in_use()
        if used is None:
            return base(x)
        a, b, scale = used
        fusion = self.fusion and x.shape[0] > 1  # for one token there is nothing to fuse but the row layer's two collectives
        if isinstance(base, ColumnParallelLinear):
            if fusion:
                return ColumnLora.apply(x, base.weight, base.bias, a, b, scale, base.context)
            whole = enter_column(x, base.context)
            return ops.linear(whole, base.weight, base.bias) + _low_rank(linear(whole, a), b, scale)
        assert isinstance(base, RowParallelLinear)
        if fusion or (self.fusion and base.context.tp_group is not None):
            return RowLora.apply(x, base.weight, a, b, scale, base.context)
        return base(x) + _low_rank(leave_row(linear(x, a), base.context), b, scale)

    def freeze_reference(self) -> None:
        """Keep the adapter's present values as those of the reference."""
        (name,) = self.active_adapters
        self.reference = (self._weight(self.lora_A, name).detach().clone(), self._weight(self.lora_B, name).detach().clone())


class ReplicatedLoraLinear(ParallelLoraLinear):
    """The same around a :class:`mindspeed_lora.parallel.layers.ReplicatedLinear`: A and B whole on every rank, no collective."""

    def forward(self, x: torch.Tensor, outputs: slice = EVERY) -> torch.Tensor:
        """As the base layer's, plus the adapter's part of those outputs."""
        base, used = self.get_base_layer(), self._in_use()
        assert isinstance(base, ReplicatedLinear)
        if used is None:
            return base(x, outputs)
        a, b, scale = used
        if self.fusion:
            return ColumnLora.apply(x, base.weight[outputs], None, a, b[outputs], scale, base.context)
        return base(x, outputs) + _low_rank(linear(x, a), b[outputs], scale)


@contextmanager
def as_reference(stages: Sequence[nn.Module]) -> Iterator[None]:
    """The model that LoRA training started from: its frozen adapter, or none.

    peft's own ``enable_adapters`` would also switch ``requires_grad``, which the gradient buffers' hooks hang on.
    """
    modules = [module for stage in stages for module in stage.modules() if isinstance(module, ParallelLoraLinear)]
    for module in modules:
        module.is_reference = True
    try:
        yield
    finally:
        for module in modules:
            module.is_reference = False


def _low_rank(u: torch.Tensor, b: torch.Tensor, scale: Scale) -> torch.Tensor:
    """``scale * u b^T``; u ``[..., r]``, b ``[out, r]``."""
    return scale * linear(u, b) if isinstance(scale, float) else linear(scaled(u, scale), b)
