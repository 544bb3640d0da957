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
_GATE_UP = r".*\.gate_up_proj"  # the experts' parameter in transformers 5, for peft's rank_pattern


def peft_gap(table: WeightTable, lora: LoraSpec) -> str | None:
    """What peft leaves out of an adapter without a word, over which versions, and what to do; None: it loads all of it."""
    if not _adapts_experts(table, lora.targets):
        return None
    instead = "serve the merged model there (convert_ckpt.py --lora-load)"
    if lora.modules:
        return (
            f"peft over transformers 5 has one r and alpha for all experts of a layer, and this adapter's linears differ in them; {instead}"
        )
    if "linear_fc2" not in lora.targets:
        return f"peft over transformers 5 leaves out expert adapters on linear_fc1 alone; {instead}, or adapt linear_fc2 too"
    if _beside_experts(table, lora.targets) and table.config.family != "qwen2_moe":
        return f"MLPs beside the experts (shared experts, dense layers) load in peft 0.17 or newer, older ones leave them out; {instead}"
    return None


def _adapts_experts(table: WeightTable, targets: Collection[str]) -> bool:
    return any(row.expert is not None and row.module in targets for row in table.rows)


def _beside_experts(table: WeightTable, targets: Collection[str]) -> bool:
    return any(row.expert is None and row.module in targets and ".mlp." in row.megatron for row, _ in table.entries())


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


def _target_fields(table: WeightTable, lora: LoraSpec, shapes: Mapping[str, tuple[int, float]]) -> dict[str, object]:
    """What is adapted, and where r and alpha are not the usual ones."""
    ranks, alphas = {name: r for name, (r, _) in shapes.items()}, {name: alpha for name, (_, alpha) in shapes.items()}
    if lora.modules or not _adapts_experts(table, lora.targets):
        return {
            "target_modules": _target_modules(table, shapes),
            "rank_pattern": _pattern(ranks, lora.r),
            "alpha_pattern": _pattern(alphas, lora.alpha),
        }
    return _expert_fields(table, lora, shapes)


def _expert_fields(table: WeightTable, lora: LoraSpec, adapted: Collection[str]) -> dict[str, object]:
    """The fields of an adapter on all experts, for transformers 4 (a linear each) and 5 (a layer's experts in two parameters) alike.

    Over transformers 5, peft makes parameters of the experts of all targets that end in gate_proj, up_proj or down_proj, and forgets
    the MLPs beside the experts that have such names too: those are named as parameters themselves (peft 0.17), and nothing else.
    For Qwen2-MoE, which its list of families lacks, it does not: there the experts are named as parameters, gate and up of one being a
    block-diagonal pair of twice the rows.
    """
    beside = {name for name in adapted if ".mlp." in name and ".experts." not in name}
    fields: dict[str, object] = {"lora_alpha": _number(_plain_alpha(lora)), "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    if table.config.family == "qwen2_moe":
        fused = {"linear_fc1": "mlp.experts.gate_up_proj", "linear_fc2": "mlp.experts.down_proj"}
        fields |= {
            "target_modules": _target_modules(table, adapted),
            "target_parameters": [name for module, name in fused.items() if module in lora.targets],
        }
        if "linear_fc1" in lora.targets:
            fields |= {"rank_pattern": {_GATE_UP: 2 * lora.r}, "alpha_pattern": {_GATE_UP: _number(2 * _plain_alpha(lora))}}
    elif beside:
        experts = {f"experts.{name.partition('.experts.')[2]}" for name in adapted if ".experts." in name}
        others = [name for name in adapted if ".mlp." not in name]
        fields |= {
            "target_modules": [*_target_modules(table, others), *sorted(experts)],
            "target_parameters": sorted({f"mlp.{name.partition('.mlp.')[2]}.weight" for name in beside}),
        }
    else:
        fields["target_modules"] = _target_modules(table, adapted)
    return fields


def _plain_alpha(lora: LoraSpec) -> float:
    """The alpha that gives the same scale by alpha / r: with twice the rows in gate and up, alpha / sqrt(r) would be another."""
    return lora.scale * lora.r


def _adapter_config(
    table: WeightTable, lora: LoraSpec, shapes: Mapping[str, tuple[int, float]], base_path: str | Path
) -> dict[str, object]:
    """Fields that every peft since 0.7 reads; ``shapes``: r and alpha of each HF linear."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base_path),
        "r": lora.r,
        "lora_alpha": _number(lora.alpha),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "revision": None,
        **({"use_rslora": True} if lora.rslora else {}),
        **_target_fields(table, lora, shapes),
    }
