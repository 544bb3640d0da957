"""Model families as data: what their ``config.json`` says about a model. The tensors they have are in ``rows.py``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mindspeed_lora.errors import CheckpointError, UsageError
from mindspeed_lora.weights.config import ExpertShape, ModelConfig
from mindspeed_lora.weights.families_moe import deepseek_experts, latent_shape, mixtral_experts, qwen_experts
from mindspeed_lora.weights.placement import listed_numbers

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Family:
    """What distinguishes one ``model_type`` from another. ``layouts``: values of ``--model-type-hf`` that name it."""

    name: str
    layouts: tuple[str, ...]
    qk_layernorm: bool = False
    qkv_bias: bool = False
    default_rotary_base: float = 10000.0  # of the transformers config class, where config.json does not say
    default_kv_channels: int | None = None  # likewise; None: hidden size / heads
    windowed: bool = False  # sliding_window of config.json holds in every layer
    default_sliding_window: int | None = None  # of the transformers config class
    experts: Callable[[Mapping[str, Any]], ExpertShape | None] | None = None  # reads a config.json; None: a dense family
    latent: bool = False  # multi-head latent attention


FAMILIES = {
    family.name: family
    for family in (
        Family("qwen3", ("qwen3",), qk_layernorm=True, default_kv_channels=128),
        Family("llama", ("llama2", "llama", "llama3")),
        Family("qwen2", ("llama2", "qwen2", "qwen25"), qkv_bias=True),
        Family("mistral", ("llama2", "mistral"), windowed=True, default_sliding_window=4096),
        Family("mixtral", ("mixtral",), windowed=True, experts=mixtral_experts),
        Family("qwen2_moe", ("qwen2-moe",), qkv_bias=True, experts=qwen_experts),
        Family("qwen3_moe", ("qwen3-moe",), qk_layernorm=True, default_kv_channels=128, experts=qwen_experts),
        Family("deepseek_v2", ("deepseek2", "deepseek2-lite"), experts=deepseek_experts, latent=True),
        Family("deepseek_v3", ("deepseek3",), experts=deepseek_experts, latent=True),
    )
}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file; a Hugging Face model folder has a config.json") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: holds {type(values).__name__}, expected a JSON object")
    return values


def model_config_from_hf(folder: Path) -> ModelConfig:
    """Read ``folder/config.json``.

    Raises:
        CheckpointError: it is missing, not JSON, of another family, or has a field this program does not compute.
    """
    path = Path(folder) / "config.json"
    return model_config_from_dict(_read_json(path), str(path))


def model_config_from_dict(values: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
    """Turn the contents of a ``config.json`` (transformers 4 or 5) into a :class:`ModelConfig`.

    Raises:
        CheckpointError: as for :func:`model_config_from_hf`; ``source`` is named in the message.
    """
    model_type = values.get("model_type")
    if model_type not in FAMILIES:
        raise CheckpointError(f"{source}: model_type {model_type!r} is not supported; supported are {', '.join(sorted(FAMILIES))}")
    family = FAMILIES[model_type]
    _refuse_unsupported(values, source)
    heads = _integer(values, "num_attention_heads", source)
    hidden = _integer(values, "hidden_size", source)
    latent = latent_shape(values) if family.latent else None
    kv_channels = latent.query_head_dim if latent else values.get("head_dim") or family.default_kv_channels or hidden // heads
    groups = heads if latent else values.get("num_key_value_heads") or heads
    if heads % groups:
        raise CheckpointError(f"{source}: num_attention_heads {heads} is no multiple of num_key_value_heads {groups}")
    rotary_base, rope_scaling = _rope(values, family, source)
    vocab_size = _integer(values, "vocab_size", source)
    dtype = str(values.get("dtype") or values.get("torch_dtype") or "float32").removeprefix("torch.")
    return ModelConfig(
        family=family.name,
        hidden_size=hidden,
        ffn_hidden_size=_integer(values, "intermediate_size", source),
        num_layers=_integer(values, "num_hidden_layers", source),
        num_attention_heads=heads,
        num_query_groups=int(groups),
        kv_channels=int(kv_channels),
        vocab_size=vocab_size,
        padded_vocab_size=vocab_size,
        norm_epsilon=float(values.get("rms_norm_eps", 1e-6)),
        rotary_base=rotary_base,
        rope_scaling=rope_scaling,
        qk_layernorm=family.qk_layernorm,
        qkv_bias=bool(values.get("qkv_bias", True)) and family.qkv_bias,
        tied_embeddings=bool(values.get("tie_word_embeddings", False)),
        max_position_embeddings=values.get("max_position_embeddings"),
        sliding_window=values.get("sliding_window", family.default_sliding_window) if family.windowed else None,
        dtype=dtype if dtype in DTYPES else "float32",
        experts=_experts(values, family, source),
        latent=latent,
        left_out_layers=int(values.get("num_nextn_predict_layers") or 0),
    )


def _experts(values: Mapping[str, Any], family: Family, source: str) -> ExpertShape | None:
    try:
        return family.experts(values) if family.experts else None
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: a {family.name} model needs {error} there, as a whole number") from error


def _integer(values: Mapping[str, Any], key: str, source: str) -> int:
    value = values.get(key)
    if not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{source}: {key} is {value!r}, expected a positive whole number")
    return value


def _refuse_unsupported(values: Mapping[str, Any], source: str) -> None:
    """Fields that change what the model computes and that no row or layer here represents."""
    wanted: dict[str, tuple[Any, ...]] = {
        "hidden_act": ("silu", "swish", None),
        "attention_bias": (False, None),
        "mlp_bias": (False, None),
        "quantization_config": (None,),
    }
    for key, accepted in wanted.items():
        if values.get(key) not in accepted:
            raise CheckpointError(f"{source}: {key} is {values[key]!r}, which is not supported; supported: {accepted[0]!r}")
    if values.get("use_sliding_window") and values.get("sliding_window"):
        raise CheckpointError(f"{source}: use_sliding_window is on for some layers only, which is not supported; set it to false")


def _rope(values: Mapping[str, Any], family: Family, source: str) -> tuple[float, dict[str, Any] | None]:
    """transformers 5 writes ``rope_parameters``, 4 writes ``rope_theta`` and ``rope_scaling``."""
    parameters = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
    base = parameters.get("rope_theta", values.get("rope_theta", family.default_rotary_base))
    if not isinstance(base, int | float) or base <= 0:
        raise CheckpointError(f"{source}: rope_theta is {base!r}, expected a positive number")
    kind = parameters.get("rope_type", parameters.pop("type", "default"))
    if kind == "default":
        return float(base), None
    return float(base), {**parameters, "rope_type": kind, "rope_theta": float(base)}


def check_model_type(model_type_hf: str | None, config: ModelConfig) -> None:
    """Whether ``--model-type-hf`` names a layout that this model has; None: the user did not say.

    Raises:
        UsageError: it names another one.
    """
    layouts = FAMILIES[config.family].layouts
    if model_type_hf is not None and model_type_hf not in layouts:
        raise UsageError(
            f"--model-type-hf {model_type_hf} does not fit config.json, whose model_type is {config.family!r}; "
            f"use --model-type-hf {layouts[0]}"
        )


def model_config_from_megatron_args(args: SimpleNamespace, source: str = "args") -> ModelConfig:
    """What a peer's checkpoint says about its model; V1 names and V2's Hugging Face names are both known.

    ``rotary_base`` is None: the V1 converter stores Megatron's default whatever the model says.

    Raises:
        CheckpointError: a size is missing.
    """
    values = vars(args)

    def size(*names: str) -> int:
        for name in names:
            if isinstance(values.get(name), int) and values[name] > 0:
                return int(values[name])
        raise CheckpointError(f"{source}: the stored args have no {names[0]}; put the model's config.json beside the checkpoint")

    if values.get("num_experts") or values.get("multi_latent_attention"):
        raise CheckpointError(
            f"{source}: the stored args describe a model with experts or latent attention only in part; put its config.json there"
        )
    heads, hidden = size("num_attention_heads"), size("hidden_size")
    noops = len(listed_numbers(values.get("noop_layers")))
    grouped = values.get("group_query_attention") or "num_key_value_heads" in values
    padded = size("padded_vocab_size", "vocab_size")
    qk_layernorm, qkv_bias = bool(values.get("qk_layernorm")), bool(values.get("add_qkv_bias"))
    vocab_size = values.get("vocab_size")
    return ModelConfig(
        family="qwen3" if qk_layernorm else "qwen2" if qkv_bias else "llama",
        hidden_size=hidden,
        ffn_hidden_size=size("ffn_hidden_size", "intermediate_size"),
        num_layers=size("num_layers") - noops,
        num_attention_heads=heads,
        num_query_groups=size("num_key_value_heads", "num_query_groups") if grouped else heads,
        kv_channels=int(values.get("kv_channels") or values.get("head_dim") or hidden // heads),
        vocab_size=vocab_size if isinstance(vocab_size, int) and 0 < vocab_size <= padded else padded,
        padded_vocab_size=padded,
        norm_epsilon=float(values.get("norm_epsilon") or values.get("rms_norm_eps") or 1e-5),
        rotary_base=None,
        qk_layernorm=qk_layernorm,
        qkv_bias=qkv_bias,
        tied_embeddings=not values.get("untie_embeddings_and_output_weights", False),
        max_position_embeddings=values.get("max_position_embeddings"),
        dtype=str(values.get("params_dtype", "float32")).removeprefix("torch."),
    )
