"""The shape of a model, read once from ``config.json`` (or a peer checkpoint's ``args``) and passed on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mindspeed_lora.errors import UsageError


@dataclass(frozen=True)
class Routing:
    """How a token's experts are chosen and weighted; scores come from the router's logits in fp32.

    ``groups`` > 1: only the experts of the ``top_groups`` best groups compete, a group counting as its best score ("max") or as the
    sum of its two best ("top2").
    """

    top_k: int  # num_experts_per_tok
    normalize: bool = False  # norm_topk_prob: the chosen weights of a token sum to one
    score: str = "softmax"  # | "sigmoid"
    scale: float = 1.0  # routed_scaling_factor
    groups: int = 1  # n_group
    top_groups: int = 1  # topk_group
    group_score: str = "max"  # | "top2"


@dataclass(frozen=True)
class ExpertShape:
    """The mixture of experts in a model's MLPs; every layer has one except ``dense_layers``."""

    count: int  # routed experts
    ffn_hidden_size: int  # of one routed expert (moe_intermediate_size)
    shared_ffn_hidden_size: int = 0  # of all shared experts together; 0: there are none
    shared_gate: bool = False  # a gate scales the shared expert
    router_bias: bool = False  # e_score_correction_bias
    dense_layers: tuple[int, ...] = ()
    routing: Routing = Routing(top_k=1)


@dataclass(frozen=True)
class LatentShape:
    """Multi-head latent attention: queries, keys and values come from low-rank latents."""

    q_rank: int | None  # q_lora_rank; None: queries come straight from the hidden state
    kv_rank: int  # kv_lora_rank
    nope_head_dim: int  # qk_nope_head_dim
    rope_head_dim: int  # qk_rope_head_dim
    value_head_dim: int  # v_head_dim
    interleaved: bool = True  # rope_interleave: rotary pairs lie side by side, (0, 1), (2, 3), ...; else half the size apart

    @property
    def query_head_dim(self) -> int:
        """Size of one query head."""
        return self.nope_head_dim + self.rope_head_dim


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
    kv_channels: int  # head_dim; not always hidden_size / num_attention_heads; with latent attention nope + rope
    vocab_size: int
    padded_vocab_size: int  # rows of the embedding; vocab_size where nothing was padded
    norm_epsilon: float  # rms_norm_eps
    rotary_base: float | None  # rope_theta; None: nobody said (a peer's args do not know it)
    rope_scaling: Mapping[str, Any] | None = None  # HF's rope parameters where rope_type is not "default"
    qk_layernorm: bool = False
    qkv_bias: bool = False
    tied_embeddings: bool = False  # tie_word_embeddings
    sliding_window: int | None = None  # a position attends to this many, itself included; None: to all before it
    max_position_embeddings: int | None = None
    dtype: str = "bfloat16"  # of the source's weights: "float32", "bfloat16", "float16"
    experts: ExpertShape | None = None
    latent: LatentShape | None = None
    left_out_layers: int = 0  # multi-token-prediction layers that follow the model's own in the files, and are not converted

    @property
    def value_channels(self) -> int:
        """Size of one value head; query and key heads have ``kv_channels``."""
        return self.latent.value_head_dim if self.latent else self.kv_channels

    @property
    def cached_per_token(self) -> int:
        """Numbers that attention remembers of a position in one layer, of all heads together."""
        latent = self.latent
        return latent.kv_rank + latent.rope_head_dim if latent else 2 * self.num_query_groups * self.kv_channels

    @property
    def ffn_per_token(self) -> int:
        """MLP width that one token passes through, in the widest layer."""
        if self.experts is None:
            return self.ffn_hidden_size
        mixture = self.experts.routing.top_k * self.experts.ffn_hidden_size + self.experts.shared_ffn_hidden_size
        return max(mixture, self.ffn_hidden_size if self.experts.dense_layers else 0)

    def has_experts(self, layer: int) -> bool:
        """Whether the MLP of a layer is a mixture of experts."""
        return self.experts is not None and layer not in self.experts.dense_layers

    def with_padded_vocabulary(self, divisor: int, tensor_parallel_size: int) -> ModelConfig:
        """The same model with ``padded_vocab_size`` the next multiple of ``divisor * tensor_parallel_size``.

        Raises:
            UsageError: the divisor is not positive.
        """
        if divisor < 1:
            raise UsageError(f"--make-vocab-size-divisible-by {divisor} must be at least 1")
        multiple = divisor * tensor_parallel_size
        return replace(self, padded_vocab_size=-(-self.vocab_size // multiple) * multiple)


@dataclass(frozen=True)
class Layout:
    """How a checkpoint's tensors are cut over files. ``layers_per_virtual_stage`` None: one model chunk per stage.

    ``expert_tensor_parallel_size`` None: as large as the tensor parallel size.
    """

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    layers_per_virtual_stage: int | None = None
    num_layer_list: tuple[int, ...] | None = None  # layers of each stage
    noop_layers: tuple[int, ...] = ()  # empty slots, in the numbering that counts them
    expert_parallel_size: int = 1
    expert_tensor_parallel_size: int | None = None
    experts_over_tensor_ranks: bool = False  # --moe-tp-extend-ep: experts are dealt out over tensor ranks too, uncut
    grouped_gemm: bool = False  # the experts of a rank lie in one transposed tensor


def stage_layers(num_layers: int, pipeline_parallel_size: int, layers_per_virtual_stage: int | None = None) -> list[list[range]]:
    """Global layer numbers as ``[stage][chunk] -> range``; chunk v of stage p follows chunk v of stage p - 1.

    Raises:
        UsageError: the layers do not divide evenly.
    """
    if pipeline_parallel_size < 1 or num_layers % pipeline_parallel_size:
        divisors = [size for size in range(1, num_layers + 1) if num_layers % size == 0]
        raise UsageError(
            f"pipeline parallel size {pipeline_parallel_size} does not divide the model's {num_layers} layers; use one of {divisors}"
        )
    per_stage = num_layers // pipeline_parallel_size
    per_chunk = layers_per_virtual_stage or per_stage
    if per_chunk < 1 or per_stage % per_chunk:
        raise UsageError(
            f"--num-layers-per-virtual-pipeline-stage {per_chunk} does not divide the {per_stage} layers of a stage "
            f"({num_layers} layers / pipeline parallel size {pipeline_parallel_size})"
        )
    if layers_per_virtual_stage and pipeline_parallel_size == 1 and per_chunk != per_stage:
        raise UsageError(f"--num-layers-per-virtual-pipeline-stage {per_chunk} needs a pipeline parallel size of at least 2")
    return [
        [range(start, start + per_chunk) for start in range(stage * per_chunk, num_layers, pipeline_parallel_size * per_chunk)]
        for stage in range(pipeline_parallel_size)
    ]
