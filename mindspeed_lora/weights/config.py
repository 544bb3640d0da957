"""The shape of a model, read once from ``config.json`` (or a peer checkpoint's ``args``) and passed on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only model in Megatron's words; Hugging Face's word beside each where it differs.

    ```
    query group = num_attention_heads / num_query_groups query heads + one key head + one value head
    ```
    """

    family: str  # row set of the weight table: "qwen3", "llama", ...
    hidden_size: int
    ffn_hidden_size: int  # intermediate_size
    num_layers: int  # num_hidden_layers
    num_attention_heads: int
    num_query_groups: int  # num_key_value_heads
    kv_channels: int  # head_dim; not always hidden_size / num_attention_heads
    vocab_size: int
    padded_vocab_size: int  # rows of the embedding; vocab_size where nothing was padded
    norm_epsilon: float  # rms_norm_eps
    rotary_base: float | None  # rope_theta; None: nobody said (a peer's args do not know it)
    rope_scaling: Mapping[str, Any] | None = None  # HF's rope parameters where rope_type is not "default"
    qk_layernorm: bool = False
    qkv_bias: bool = False
    tied_embeddings: bool = False  # tie_word_embeddings
    max_position_embeddings: int | None = None
    dtype: str = "bfloat16"  # of the source's weights: "float32", "bfloat16", "float16"
