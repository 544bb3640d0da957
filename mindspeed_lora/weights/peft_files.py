"""Writing a PEFT adapter folder: ``adapter_config.json`` and ``adapter_model.safetensors`` in peft's names."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import torch

from mindspeed_lora.files import atomic_file, write_json
from mindspeed_lora.weights.lora_blocks import LoraParts, module_of, split_pairs
from mindspeed_lora.weights.lora_spec import LoraSpec
from mindspeed_lora.weights.table import Row, WeightTable

ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_FILE_NAME = "adapter_model.safetensors"


def peft_gap(table: WeightTable, targets: Collection[str]) -> str | None:
    """What peft over transformers 5 leaves out of an adapter when it loads it; None: nothing (seen with peft 0.21)."""
    if not any(row.module in targets and row.expert is None and ".mlp." in row.megatron for row in table.rows if table.config.experts):
        return None
    return (
        "peft over transformers 5 loads the experts' matrices of a PEFT adapter of this model, but leaves out those of MLPs beside them "
        "(shared expert, dense layers) without a word; serve the merged model there (convert_ckpt.py --lora-load)"
    )


def write_peft_adapter(
    folder: Path, table: WeightTable, lora: LoraSpec, tensors: Mapping[tuple[Row, int | None], LoraParts], base_path: str | Path
) -> None:
    """Write ``tensors``, the fused A and B of every adapted weight, so that peft loads them as they are.

    PEFT names one A for each HF linear: parts with one A get a copy each, others their own rows at their own r.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    named: dict[str, torch.Tensor] = {}
    shapes: dict[str, tuple[int, float]] = {}  # HF linear -> its r and alpha
    for (row, layer), parts in tensors.items():
        module = module_of(lora, row, layer)
        assert module is not None, row
        alphas = module.alphas if len(module.alphas) > 1 else module.alphas * len(row.hf)
        for name, pair, alpha in zip(row.hf_names(layer), split_pairs(module, parts), alphas, strict=True):
            if pair is not None:
                linear = name.removesuffix(".weight")
                shapes[linear] = (pair[0].shape[0], alpha)
                for half, matrix in zip("AB", pair, strict=True):
                    named[f"base_model.model.{linear}.lora_{half}.weight"] = _own(matrix)
    with atomic_file(folder / ADAPTER_FILE_NAME) as temporary:
        try:
            save_file(named, temporary, metadata={"format": "pt"})
        except SafetensorError as error:  # what safetensors makes of an OSError
            raise OSError(str(error)) from error
    write_json(folder / ADAPTER_CONFIG_NAME, _adapter_config(table, lora, shapes, base_path))


def _own(matrix: torch.Tensor) -> torch.Tensor:
    return matrix.detach().cpu().clone(memory_format=torch.contiguous_format)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _target_modules(table: WeightTable, adapted: Collection[str]) -> list[str]:
    """Leaf names (``q_proj``, ...) of HF linears, or their whole names where some linear of such a name is not adapted."""
    leaves = {_leaf(name) for name in adapted}
    every = {name.removesuffix(".weight") for row, layer in table.entries() if row.module for name in row.hf_names(layer)}
    return sorted(leaves if {name for name in every if _leaf(name) in leaves} == set(adapted) else adapted)


def _pattern(values: Mapping[str, float], usual: float) -> dict[str, float]:
    """``rank_pattern`` or ``alpha_pattern``: by leaf name where all linears of that name agree, else from ``layers.`` on."""
    leaves: dict[str, set[float]] = {}
    for name, value in values.items():
        leaves.setdefault(_leaf(name), set()).add(value)
    return {
        _leaf(name) if len(leaves[_leaf(name)]) == 1 else name.removeprefix("model."): _number(value)
        for name, value in values.items()
        if value != usual
    }


def _number(value: float) -> float:
    """A whole number where it is one, as peft declares alpha."""
    return int(value) if float(value).is_integer() else value


def _adapter_config(
    table: WeightTable, lora: LoraSpec, shapes: Mapping[str, tuple[int, float]], base_path: str | Path
) -> dict[str, object]:
    """Fields that every peft since 0.7 reads; ``shapes``: r and alpha of each HF linear."""
    config: dict[str, object] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base_path),
        "r": lora.r,
        "lora_alpha": _number(lora.alpha),
        "lora_dropout": 0.0,
        "target_modules": _target_modules(table, shapes),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": _pattern({name: r for name, (r, _) in shapes.items()}, lora.r),
        "alpha_pattern": _pattern({name: alpha for name, (_, alpha) in shapes.items()}, lora.alpha),
        "revision": None,
    }
    return {**config, "use_rslora": True} if lora.rslora else config
