"""What a rank puts into its Megatron file, and the PEFT folder made from all ranks' files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch

from mindspeed_lora.weights.adapters import MegatronAdapter
from mindspeed_lora.weights.lora_blocks import adapted_entries
from mindspeed_lora.weights.lora_spec import LoraSpec
from mindspeed_lora.weights.megatron_files import model_keys
from mindspeed_lora.weights.peft_files import write_peft_adapter
from mindspeed_lora.weights.table import WeightTable, named_slices

_GLOBAL_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")


class SavedStage(Protocol):
    """A model chunk (see :class:`mindspeed_lora.model.stage.GPTStage`)."""

    layer_range: range

    @property
    def experts(self) -> range:
        """Global numbers of the experts in its stacks; a file counts a rank's own from 0."""
        ...

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Name -> tensor."""
        ...


def local_name(name: str, first_layer: int) -> str:
    """Global layer number -> the chunk's own numbering from 0."""
    return _GLOBAL_LAYER.sub(lambda match: f"decoder.layers.{int(match[1]) - first_layer}.", name)


def rank_models(stages: Sequence[SavedStage], lora_only: bool) -> dict[str, dict[str, torch.Tensor]]:
    """``model`` (or ``model0``...) -> stage-local name -> tensor, as the peer's training saves them."""
    models = {}
    for key, stage in zip(model_keys(len(stages)), stages, strict=True):
        named = named_slices(stage.state_dict().items(), range(len(stage.experts)))
        tensors = {name: value for name, value in named if not lora_only or ".lora_" in name}
        models[key] = {local_name(name, stage.layer_range.start): value for name, value in tensors.items()}
    return models


def write_peft_folder(folder: Path, written: Path, table: WeightTable, lora: LoraSpec, base_path: Path) -> None:
    """PEFT's form of an adapter that was just ``written`` in Megatron's, read back whole and in HF order."""
    adapter = MegatronAdapter(written, lora)
    tensors = {(row, layer): adapter.lora_parts(row, layer) for row, layer, _ in adapted_entries(table, lora)}
    write_peft_adapter(folder, table, lora, tensors, base_path)
