"""4-bit NormalFloat weights (NF4) from ``bitsandbytes`` (extra ``qlora``), which is imported here and nowhere else.

64 values share one fp32 scale: 4.5 bits a value, without double quantisation (bitsandbytes' own default, and transformers').
Source: Dettmers et al., "QLoRA" (2023), section 3.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from types import ModuleType

import torch

from mindspeed_lora.errors import MindSpeedLoraError, UsageError

BLOCK = 64
BYTES_PER_VALUE = 0.5 + 4.0 / BLOCK


def check_nf4(device_type: str | None = None) -> None:
    """Whether 4-bit weights work here; ``device_type`` None: not known yet.

    Raises:
        MindSpeedLoraError: bitsandbytes is not installed.
        UsageError: it has no kernels for the device.
    """
    if device_type == "npu":
        raise UsageError(
            "--qlora: bitsandbytes has no kernels for Ascend NPUs; use --bf16 with --fsdp-base, or a larger tensor parallel size"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MindSpeedLoraError(
            "--qlora needs bitsandbytes, which is not installed: pip install 'mindspeed_lora[qlora]', or pip install bitsandbytes"
        )


def _functional() -> ModuleType:
    return importlib.import_module("bitsandbytes.functional")


class Nf4:
    """A codec of :mod:`mindspeed_lora.parallel.on_demand`: two codes a byte, one scale a block."""

    block = BLOCK

    def holders(self, size: int, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
        """Codes uint8 ``[size / 2]``, scales float32 ``[size / 64]``."""
        return [torch.empty(size // 2, dtype=torch.uint8, device=device), torch.empty(size // BLOCK, dtype=torch.float32, device=device)]

    def encode(self, values: torch.Tensor, holders: Sequence[torch.Tensor], start: int) -> None:
        """Quantise flat ``values`` and put them at position ``start``; both lengths are multiples of 64."""
        codes, state = _functional().quantize_4bit(values, blocksize=BLOCK, quant_type="nf4", compress_statistics=False)
        holders[0][start // 2 :][: codes.numel()].copy_(codes.view(-1))
        holders[1][start // BLOCK :][: state.absmax.numel()].copy_(state.absmax)

    def decode(self, holders: Sequence[torch.Tensor], into: torch.Tensor) -> None:
        """All values, rounded to ``into``'s dtype."""
        codes, scales = holders
        functional = _functional()
        if into.device.type == "cuda":
            functional.dequantize_4bit(codes.view(-1, 1), absmax=scales, out=into, blocksize=BLOCK, quant_type="nf4")
            return
        state = functional.QuantState(absmax=scales, shape=into.shape, dtype=into.dtype, blocksize=BLOCK, quant_type="nf4")
        into.copy_(functional.dequantize_4bit(codes.view(-1, 1), state).view(-1))  # its CPU kernels have no out=
