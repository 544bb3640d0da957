"""Tiny models and the places of the shared data, for all tests."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


def _shared(variable: str, name: str) -> Path:
    folder = Path(os.environ.get(variable, ROOT.parent / "shared" / name))
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent (set {variable})")
    return folder


def shared_data() -> Path:
    """Folder of real data; skips the calling test where it is absent."""
    return _shared("MINDSPEED_LORA_TEST_DATA", "data")


def golden() -> Path:
    """Folder of the peer's outputs; skips the calling test where it is absent."""
    return _shared("MINDSPEED_LORA_TEST_GOLDEN", "golden")


YARN = {  # of DeepSeek's kind, with temperatures that differ: one scales cos and sin, both the scores
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 1.5,
}


def tiny_config(family: str, **overrides: Any) -> Any:
    """A transformers config of 4 layers with GQA and a head_dim that is not hidden / heads (qwen3)."""
    import transformers

    shape: dict[str, Any] = dict(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=256,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        attention_dropout=0.0,
        tie_word_embeddings=False,
    )
    experts: dict[str, Any] = dict(num_experts_per_tok=2, moe_intermediate_size=32)
    latent: dict[str, Any] = dict(
        experts,
        num_key_value_heads=8,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=12,
        n_routed_experts=8,
        n_shared_experts=2,
        first_k_dense_replace=1,
        routed_scaling_factor=1.5,
        rope_scaling=YARN,
        rms_norm_eps=1e-3,  # not that of the latents' norms
    )
    name, own = {
        "qwen3": ("Qwen3Config", {"head_dim": 16}),
        "llama": ("LlamaConfig", {}),
        "qwen2": ("Qwen2Config", {}),
        "mistral": ("MistralConfig", {}),
        "mixtral": ("MixtralConfig", dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=None)),
        "qwen2_moe": ("Qwen2MoeConfig", dict(experts, num_experts=4, shared_expert_intermediate_size=48)),
        "deepseek_v2_lite": ("DeepseekV2Config", dict(latent, q_lora_rank=None)),
        "deepseek_v2": ("DeepseekV2Config", dict(latent, q_lora_rank=24, topk_method="group_limited_greedy", n_group=4, topk_group=2)),
        "deepseek_v3": ("DeepseekV3Config", dict(latent, q_lora_rank=24, n_group=4, topk_group=2, n_shared_experts=1)),
        "qwen3_moe": ("Qwen3MoeConfig", dict(experts, num_experts=8, head_dim=16, norm_topk_prob=True, mlp_only_layers=[1])),
    }[family]
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    return getattr(transformers, name)(**{**shape, **own, **overrides})


def make_model(path: Path, family: str = "qwen3", dtype: str = "float32", seed: int = 0, **overrides: Any) -> Path:
    """Save a random Hugging Face model (norms and biases too are random, so that a lost one shows) and return its folder."""
    import torch
    import transformers

    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(family, **overrides), attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif name.endswith("gate.weight"):
                parameter.normal_(0.0, 0.5)  # a router that decides: rounding flips no choice
            elif parameter.dim() >= 2:
                parameter.mul_(3.0)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.1)
    model.to(getattr(torch, dtype)).save_pretrained(path)
    return Path(path)


class ModelFolders(dict[str, Path]):
    """Random models by family, made when first asked for: a test is skipped where transformers lacks its own family, and only there."""

    def __init__(self, root: Path, **overrides: Any) -> None:
        super().__init__()
        self.root, self.overrides = root, overrides

    def __missing__(self, family: str) -> Path:
        self[family] = make_model(self.root / family, family, **self.overrides)
        return self[family]


def tiny_qwen3(path: Path, tied: bool = False, **overrides: Any) -> Path:
    """A random Qwen3 folder."""
    return make_model(path, "qwen3", tie_word_embeddings=tied, **overrides)


def tiny_llama(path: Path, tied: bool = False, **overrides: Any) -> Path:
    """A random Llama folder."""
    return make_model(path, "llama", tie_word_embeddings=tied, **overrides)


def weights_in(dtype: Any) -> dict[str, Any]:
    """The argument of transformers' ``from_pretrained`` that sets the weights' dtype; 4.56 renamed it."""
    import transformers
    from packaging.version import Version

    return {"dtype" if Version(transformers.__version__) >= Version("4.56") else "torch_dtype": dtype}
