"""transformers' own models with PEFT's adapters in float64: what fp32 scores are measured against."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import torch
from helpers import weights_in


def float64_model(folder: Path, adapter: Path) -> Any:
    """Base and adapter, merged in float64; with norms and attention of float64 too, which transformers computes in fp32 whatever the dtype.
    Angles are fp32's on all sides.
    """
    import peft
    import transformers

    transformers.AttentionInterface.register("float64", _attention)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **weights_in(torch.float64)).eval()
    model = peft.PeftModel.from_pretrained(model, adapter).double().merge_and_unload()
    model.config._attn_implementation = "float64"
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = types.MethodType(_norm, module)
    return model


def _norm(self: Any, hidden: torch.Tensor) -> torch.Tensor:
    return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.variance_epsilon) * self.weight


def _attention(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **_: Any) -> Any:
    key, value = (x.repeat_interleave(module.num_key_value_groups, 1) for x in (key, value))
    after = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).triu(1)
    scores = (query @ key.transpose(2, 3) * scaling).masked_fill(after, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2), None
