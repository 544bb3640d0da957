"""Makes a small random model of a family of examples/mcore, with the quickstart's tokenizer, for its scripts' CPU mode.

    python examples/mcore/smoke_model.py FAMILY FOLDER

Everything that makes the family what it is stays: experts and how they are chosen, shared experts, first dense layers, latent attention.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

QUICKSTART = Path(__file__).resolve().parents[1] / "quickstart"
SHAPE: dict[str, Any] = dict(
    vocab_size=640,  # the quickstart's tokenizer
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=1024,
    tie_word_embeddings=False,
)
EXPERTS: dict[str, Any] = dict(num_experts_per_tok=2, moe_intermediate_size=32)
LATENT: dict[str, Any] = dict(
    **EXPERTS,
    num_key_value_heads=4,
    n_routed_experts=8,
    kv_lora_rank=16,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
    first_k_dense_replace=1,
)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {  # folder of scripts: class of transformers, fields beside SHAPE
    "qwen3": ("Qwen3Config", dict(head_dim=32)),
    "qwen25": ("Qwen2Config", {}),
    "llama3": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", dict(sliding_window=None)),
    "mixtral": ("MixtralConfig", dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=None)),
    "qwen2_moe": ("Qwen2MoeConfig", dict(EXPERTS, num_experts=8, shared_expert_intermediate_size=48)),
    "qwen3_moe": ("Qwen3MoeConfig", dict(EXPERTS, num_experts=8, head_dim=32, norm_topk_prob=True)),
    "deepseek2_lite": ("DeepseekV2Config", dict(LATENT, q_lora_rank=None, n_shared_experts=2, topk_method="greedy")),
    "deepseek3": ("DeepseekV3Config", dict(LATENT, q_lora_rank=24, n_shared_experts=1, n_group=4, topk_group=2)),
}


def make_model(family: str, folder: Path) -> int:
    """Save model and tokenizer in bf16; returns the number of parameters."""
    import torch
    import transformers

    name, fields = FAMILIES[family]
    if not hasattr(transformers, name):
        raise SystemExit(f"transformers {transformers.__version__} has no {name}: the smoke mode of {family} needs a newer one")
    folder.mkdir(parents=True, exist_ok=True)
    runpy.run_path(str(QUICKSTART / "make_model.py"))["make_tokenizer"](folder)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**{**SHAPE, **fields}))
    model.to(torch.bfloat16).save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in FAMILIES:
        raise SystemExit(f"usage: {sys.argv[0]} FAMILY FOLDER, with FAMILY one of {', '.join(FAMILIES)}")
    print(f"{sys.argv[2]}: a random {sys.argv[1]} model, {make_model(sys.argv[1], Path(sys.argv[2])):,} parameters")
