"""Brings together what the checkpoint says and what the user passed; two sources that disagree are an error."""

from __future__ import annotations

from dataclasses import replace

import torch

from mindspeed_lora.arguments.configs import ArchitectureFlags, LoraFlags, ParallelFlags
from mindspeed_lora.checkpoint.resolve_experts import check_special_flags, disagree
from mindspeed_lora.errors import CheckpointError, UsageError
from mindspeed_lora.weights.config import Layout, ModelConfig
from mindspeed_lora.weights.lora_spec import LoraSpec
from mindspeed_lora.weights.placement import check_experts
from mindspeed_lora.weights.sources import Adapter, Base
from mindspeed_lora.weights.table import WeightTable

DEFAULT_R, DEFAULT_ALPHA = 16, 32.0

# Values that change the function: (field of ArchitectureFlags, its flag, Hugging Face's word in config.json).
_COMPARED = (
    ("num_layers", "--num-layers", "num_hidden_layers"),
    ("hidden_size", "--hidden-size", "hidden_size"),
    ("ffn_hidden_size", "--ffn-hidden-size", "intermediate_size"),
    ("num_attention_heads", "--num-attention-heads", "num_attention_heads"),
    ("num_query_groups", "--num-query-groups", "num_key_value_heads"),
    ("kv_channels", "--kv-channels", "head_dim"),
    ("norm_epsilon", "--norm-epsilon", "rms_norm_eps"),
    ("rotary_base", "--rotary-base", "rope_theta"),
    ("qk_layernorm", "--qk-layernorm", "q_norm and k_norm weights"),
    ("vocab_size", "--vocab-size", "vocab_size"),
)


def check_architecture(config: ModelConfig, flags: ArchitectureFlags, source: str) -> None:
    """Compare every flag that was passed and describes the model.

    Raises:
        UsageError: one of them contradicts ``source``.
    """
    for field, flag, word in _COMPARED:
        passed, found = getattr(flags, field), getattr(config, field)
        if field == "qk_layernorm" and config.latent is not None:
            continue  # the peer's word for the norms of the latents, which every such model has
        if passed is not None and found is not None and passed != found:
            raise disagree(flag, passed, source, found, word)
    if flags.untie_embeddings_and_output_weights and config.tied_embeddings:
        raise disagree("--untie-embeddings-and-output-weights", True, source, True, "tie_word_embeddings")
    if flags.add_qkv_bias and not config.qkv_bias:
        raise disagree("--add-qkv-bias", True, source, "none", "qkv bias")
    if flags.padded_vocab_size is not None and flags.padded_vocab_size < config.vocab_size:
        raise disagree("--padded-vocab-size", flags.padded_vocab_size, source, config.vocab_size, "vocab_size")
    check_special_flags(config, flags, source)


def run_layout(parallel: ParallelFlags) -> Layout:
    """The layout of a run, and of what it saves.

    Raises:
        UsageError: experts would have to be both cut and uncut.
    """
    if parallel.experts_over_tensor_ranks and parallel.expert_tensor_parallel_size not in (None, 1):
        raise UsageError(
            f"--moe-tp-extend-ep deals out whole experts, --expert-tensor-parallel-size {parallel.expert_tensor_parallel_size} cuts them; "
            "leave one of the two out"
        )
    return Layout(
        parallel.tensor_parallel_size,
        parallel.pipeline_parallel_size,
        parallel.layers_per_virtual_stage,
        expert_parallel_size=parallel.expert_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        experts_over_tensor_ranks=parallel.experts_over_tensor_ranks,
    )


def resolve_model_config(base: Base, flags: ArchitectureFlags, layout: Layout | None = None) -> ModelConfig:
    """The model's shape: the checkpoint's own, checked against every architecture flag that was passed.

    The vocabulary is padded to a multiple of the tensor-parallel size (padding rows never get any probability).

    Raises:
        UsageError: a passed value contradicts the checkpoint, or the experts cannot be dealt out.
        CheckpointError: nobody knows the sizes or the rotary base.
    """
    config = base.model_config
    layout = layout or Layout()
    check_experts(config, layout, "--expert-model-parallel-size")
    check_architecture(config, flags, f"{base.path}")
    if config.rotary_base is None:
        if flags.rotary_base is None:
            raise CheckpointError(
                f"--load {base.path}: the rotary base is unknown (no config.json, and a checkpoint's args do not hold it); "
                "put the model's config.json there or pass --rotary-base"
            )
        config = replace(config, rotary_base=flags.rotary_base)
    padded = max(config.vocab_size, flags.padded_vocab_size or 0)
    size = layout.tensor_parallel_size
    return replace(config, padded_vocab_size=-(-padded // size) * size)


def router_notes(base: Base, table: WeightTable, dtype: torch.dtype) -> list[str]:
    """What is to be said of the routers' dtype in a run that computes in ``dtype``. No tensor is read.

    Raises:
        CheckpointError: the routers of two layers are of different dtypes: then some of them are not what the others are.
    """
    found: dict[torch.dtype, str] = {}
    for row, layer in table.entries():
        if row.megatron.endswith(".mlp.router.weight"):
            found.setdefault(base.part_dtypes(row, layer)[0], (row.name(layer) if base.kind == "mg" else row.hf_names(layer)[0]))
    if len(found) > 1:
        said = " and ".join(f"{name} is {str(kind).removeprefix('torch.')}" for kind, name in found.items())
        raise CheckpointError(f"{base.path}: the routers differ in dtype: {said}; store all of them in one")
    stored = next(iter(found), dtype)
    if stored.itemsize <= dtype.itemsize:
        return []
    names = [str(kind).removeprefix("torch.") for kind in (stored, dtype)]
    return [f"the routers' weights are {names[0]} in {base.path} and are rounded to {names[1]}, as transformers does; scores are in fp32"]


def resolve_lora(flags: LoraFlags | None, adapter: Adapter | None, table: WeightTable) -> LoraSpec | None:
    """r, alpha and targets: the adapter's own where there is one, else the flags', else r 16 and alpha 32.

    Returns None for a run without LoRA.

    Raises:
        UsageError: a passed value contradicts the adapter, or nothing says a value.
    """
    passed = flags or LoraFlags()
    if adapter is None:
        if flags is None:
            return None
        if not passed.targets:
            raise UsageError(
                "LoRA flags without --lora-target-modules: name the layers to adapt, e.g. linear_qkv linear_proj linear_fc1 linear_fc2"
            )
        _check_shared_experts(passed, table)
        alpha = DEFAULT_ALPHA if passed.alpha is None else passed.alpha
        return LoraSpec(passed.r or DEFAULT_R, alpha, passed.targets, shared_experts=passed.shared_experts)
    known = adapter.spec(table)
    if known is None:
        if passed.r is None or passed.alpha is None or not passed.targets:
            raise UsageError(
                f"--lora-load {adapter.path} does not record r, alpha and targets; pass --lora-r, --lora-alpha and --lora-target-modules"
            )
        known = LoraSpec(passed.r, passed.alpha, passed.targets)
    if passed.shared_experts and not known.shared_experts:
        raise disagree("--lora-shared-experts", True, f"--lora-load {adapter.path}", "of its own", "that each expert has an A and B")
    for flag, value, found in (("--lora-r", passed.r, known.r), ("--lora-alpha", passed.alpha, known.alpha)):
        if value is not None and value != found:
            said = f"{found:g}" + (" (and others in some of its linears)" if known.modules else "")
            raise disagree(flag, value, f"--lora-load {adapter.path}", said, flag.removeprefix("--lora-"))
    if passed.targets and set(passed.targets) != set(known.targets):
        raise disagree("--lora-target-modules", " ".join(passed.targets), f"--lora-load {adapter.path}", " ".join(known.targets), "targets")
    return known


def _check_shared_experts(passed: LoraFlags, table: WeightTable) -> None:
    if passed.shared_experts and not any(row.expert is not None and row.module in (passed.targets or ()) for row in table.rows):
        raise UsageError(
            "--lora-shared-experts: no expert would get an adapter, as the model has none or --lora-target-modules leaves them out; "
            "add linear_fc1 linear_fc2, or leave the flag out"
        )


def check_adapter_base(adapter: Adapter, base: Base) -> None:
    """Refuse an adapter that was trained on another base (by fingerprint, where the adapter records one).

    Raises:
        CheckpointError: the fingerprints differ.
    """
    reference = adapter.base_reference
    if reference is None or not reference.get("fingerprint"):
        return
    found = base.fingerprint()
    if reference["fingerprint"] != found:
        raise CheckpointError(
            f"--lora-load {adapter.path} was trained on {reference.get('path')} (fingerprint {reference['fingerprint']}), "
            f"but --load {base.path} has fingerprint {found}; load the base it was trained on"
        )
