"""Writing a PEFT adapter folder: ``adapter_config.json`` and ``adapter_model.safetensors`` in peft's names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from mindspeed_lora.files import atomic_file, write_json
from mindspeed_lora.weights.lora_spec import LoraSpec
from mindspeed_lora.weights.table import Row, WeightTable

ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_FILE_NAME = "adapter_model.safetensors"


def peft_target_modules(table: WeightTable, targets: Sequence[str]) -> list[str]:
    """HF leaf module names (``q_proj``, ...) of Megatron targets."""
    names = {name.split(".")[-2] for row in table.rows if row.module in targets for name in row.hf}
    return sorted(names)


def write_peft_adapter(
    folder: Path,
    table: WeightTable,
    lora: LoraSpec,
    tensors: Mapping[tuple[Row, int | None], tuple[torch.Tensor, Sequence[torch.Tensor]]],
    base_path: str | Path,
) -> None:
    """Write ``tensors`` (``(row, layer) -> (A [r, in], [B [out_part, r] per HF name])``) so that peft loads them as they are.

    Parts of a fused module share A; each gets its own copy, as PEFT names one per HF linear.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    named: dict[str, torch.Tensor] = {}
    for (row, layer), (matrix_a, matrices_b) in tensors.items():
        a_row, b_row = table.lora_pair(row)
        named.update({name: matrix_a.detach().cpu().clone(memory_format=torch.contiguous_format) for name in a_row.hf_names(layer)})
        named.update(
            {
                name: part.detach().cpu().clone(memory_format=torch.contiguous_format)
                for name, part in zip(b_row.hf_names(layer), matrices_b, strict=True)
            }
        )
    with atomic_file(folder / ADAPTER_FILE_NAME) as temporary:
        save_file(named, temporary, metadata={"format": "pt"})
    write_json(folder / ADAPTER_CONFIG_NAME, _adapter_config(table, lora, base_path))


def _adapter_config(table: WeightTable, lora: LoraSpec, base_path: str | Path) -> dict[str, object]:
    """Fields that every peft since 0.7 reads; alpha is a whole number where it is one, as peft declares it."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base_path),
        "r": lora.r,
        "lora_alpha": int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": peft_target_modules(table, lora.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "revision": None,
    }
