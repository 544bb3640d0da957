"""Tiny models with experts, and the oracle of their LoRA gradients: transformers' gradients of the merged weights.

``W' = W + s B A`` in transformers gives dL/dW', and with it exactly ``dB = s dW' A^T`` and ``dA = s B^T dW'`` of each linear.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from engine_helpers import SPEC, batch, lora_b_parts
from helpers import weights_in

from mindspeed_lora.lora.inject import kaiming_uniform
from mindspeed_lora.weights.families import model_config_from_hf
from mindspeed_lora.weights.lora_spec import LoraSpec
from mindspeed_lora.weights.sources import open_base
from mindspeed_lora.weights.table import Row, WeightTable

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe")


def reference(folder: Path) -> Any:
    """transformers' model, fp32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **weights_in(torch.float32)).eval()


def adapter_parts(row: Row, layer: int | None, r: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A and the B of each part, as ``build_engine(..., lora=SPEC)`` makes them."""
    a_name = row.name(layer).removesuffix("weight") + "lora_A.default.weight"
    return kaiming_uniform(a_name, 7, r, row.part_shapes[0][1]), lora_b_parts(row, layer, r)


def merged_folder(folder: Path, target: Path, spec: LoraSpec = SPEC) -> Path:
    """A Hugging Face folder of the same model with the test's adapter merged in."""
    from safetensors.torch import save_file

    base, table = open_base(folder), WeightTable(model_config_from_hf(folder))
    tensors = {}
    for row, layer in table.entries():
        parts = [part.clone() for part in base.parts(row, layer)]
        if row.module in spec.targets:
            a, b_parts = adapter_parts(row, layer, spec.r)
            parts = [part + spec.scale * b @ a for part, b in zip(parts, b_parts, strict=True)]
        tensors |= dict(zip(row.hf_names(layer), parts, strict=True))
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def _by_file_name(name: str, gradient: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradient of a parameter under the names of the files; transformers 5 holds all experts of a layer in two parameters."""
    stem, _, last = name.rpartition(".")
    if last not in ("gate_up_proj", "down_proj") or not stem.endswith(".experts"):
        return {name: gradient}
    found = {}
    for expert, whole in enumerate(gradient):
        parts = whole.chunk(2) if last == "gate_up_proj" else (whole,)
        for leaf, part in zip(("gate_proj", "up_proj") if last == "gate_up_proj" else ("down_proj",), parts, strict=True):
            found[f"{stem}.{expert}.{leaf}.weight"] = part
    return found


def usual_name(name: str) -> str:
    """Mixtral's names in the form that the other families have."""
    for ours, theirs in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
        name = name.replace(f".{ours}.weight", f".{theirs}.weight")
    return name.replace("block_sparse_moe", "mlp")


def reference_gradients(folder: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss, and the gradient of every weight by the name in the files."""
    model = reference(folder)
    ids, labels, weights = batch()
    logits = model(input_ids=ids).logits
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none")
    loss = (losses.view_as(labels).sum(dim=1) * weights).sum()
    loss.backward()
    gradients: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        gradients |= {usual_name(key): value for key, value in _by_file_name(name, gradient).items()}
    return loss.item(), gradients


def expected_lora_gradients(merged: Path, table: WeightTable, spec: LoraSpec = SPEC) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss, and dA, dB by our names, whole: dA is the sum over the fused parts, dB the parts' rows behind one another."""
    loss, by_name = reference_gradients(merged)
    expected = {}
    for row, layer in table.target_entries(spec.targets):
        a, b_parts = adapter_parts(row, layer, spec.r)
        gradients = [by_name[usual_name(name)] for name in row.hf_names(layer)]
        stem = row.name(layer).removesuffix("weight")
        expected[f"{stem}lora_A.default.weight"] = spec.scale * sum(
            b.t() @ gradient for b, gradient in zip(b_parts, gradients, strict=True)
        )
        expected[f"{stem}lora_B.default.weight"] = spec.scale * torch.cat([gradient @ a.t() for gradient in gradients])
    return loss, expected
