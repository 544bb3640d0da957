"""Adapters that peft writes: parts with their own A, r and alpha."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from helpers import weights_in

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES: dict[str, dict[str, Any]] = {
    "every A its own": dict(target_modules=ALL),
    "q and v only": dict(target_modules=["q_proj", "v_proj"]),
    "up only": dict(target_modules=["up_proj"]),
    "per-module r and alpha": dict(
        target_modules=ALL, rank_pattern={"k_proj": 2, r"layers\.1\.mlp\.up_proj": 7}, alpha_pattern={"v_proj": 32, "o_proj": 1}
    ),
    "rank-stabilised": dict(target_modules=ALL, use_rslora=True, rank_pattern={"q_proj": 9}),
    "one layer": dict(target_modules=["q_proj", "down_proj"], layers_to_transform=[2], layers_pattern="layers"),
    "a regular expression": dict(target_modules=r".*layers\.[03]\..*(k_proj|gate_proj)"),
}


def make_adapter(hf: Path, target: Path, size: float = 0.3, **config: Any) -> Any:
    """A random adapter written by peft, its elements about ``size``; returns peft's model."""
    import peft
    import transformers

    torch.manual_seed(1)
    model = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(hf), peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **config)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(size * torch.randn_like(parameter))
    model.save_pretrained(target)
    return model


def load_peft(hf: Path, adapter: Path, trainable: bool = False) -> Any:
    """transformers + peft with an adapter folder."""
    import peft
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(hf, attn_implementation="eager", **weights_in(torch.float32))
    return peft.PeftModel.from_pretrained(base, str(adapter), is_trainable=trainable).eval()
