"""What a conversion will read: the base, its configuration, the adapter; everything that can be refused is refused here."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from mindspeed_lora.arguments.configs import ConvertConfig
from mindspeed_lora.checkpoint.resolve import check_adapter_base, resolve_lora
from mindspeed_lora.errors import CheckpointError, UsageError
from mindspeed_lora.manifest import verify_parts
from mindspeed_lora.weights.config import Layout, ModelConfig
from mindspeed_lora.weights.families import check_model_type, model_config_from_hf
from mindspeed_lora.weights.lora_spec import LoraSpec
from mindspeed_lora.weights.placement import check_experts, place_layers
from mindspeed_lora.weights.sources import Adapter, Base, MegatronBase, open_adapter, open_base
from mindspeed_lora.weights.table import WeightTable

PARAMS_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TYPES = ("hf", "mg")


@dataclass(frozen=True)
class Plan:
    """A conversion whose inputs are open and checked."""

    base: Base
    model: ModelConfig  # vocabulary padded for the target
    table: WeightTable
    config_dir: Path
    layout: Layout
    adapter: Adapter | None
    lora: LoraSpec | None
    dtype: torch.dtype | None  # None: every tensor keeps its own


def check_flags(config: ConvertConfig) -> None:
    """Values that are wrong whatever the files say.

    Raises:
        UsageError: a flag's value is unknown or contradicts another flag.
    """
    for flag, value in (("--load-model-type", config.load_model_type), ("--save-model-type", config.save_model_type)):
        if value not in TYPES:
            raise UsageError(f"{flag} {value} is unknown; use hf or mg")
    for flag, size in (
        ("--target-tensor-parallel-size", config.target_tensor_parallel_size),
        ("--target-pipeline-parallel-size", config.target_pipeline_parallel_size),
        ("--target-expert-parallel-size", config.target_expert_parallel_size),
    ):
        if size < 1:
            raise UsageError(f"{flag} {size} must be at least 1")
        if config.save_model_type == "hf" and size != 1:
            raise UsageError(f"{flag} {size} with --save-model-type hf: a Hugging Face folder is not cut; leave the flag out or pass 1")
    if config.save_model_type == "hf" and config.make_vocab_size_divisible_by != 1:
        raise UsageError("--make-vocab-size-divisible-by with --save-model-type hf: padding is cut off there; leave the flag out")
    if config.params_dtype is not None and config.params_dtype not in PARAMS_DTYPES:
        raise UsageError(f"--params-dtype {config.params_dtype} is unknown; use {', '.join(PARAMS_DTYPES)}")
    if config.save_lora_to_hf and config.save_model_type != "hf":
        raise UsageError("--save-lora-to-hf writes a PEFT folder; it needs --save-model-type hf")


def make_plan(config: ConvertConfig) -> Plan:
    """Open and check everything; nothing has been written when this fails.

    Raises:
        UsageError: flags contradict the files.
        CheckpointError: a file is missing, damaged, or of another model.
    """
    base = open_base(config.load_dir, config.load_model_type)
    if config.verify and base.manifest is not None:
        verify_parts(manifest_folder(base), base.manifest)
    model, config_dir = find_model_config(config, base)
    base.config = model
    check_model_type(config.model_type_hf, model)
    if config.add_qkv_bias and not model.qkv_bias:
        raise UsageError(f"--add-qkv-bias, but a {model.family} model has no qkv bias; leave the flag out")
    _check_dense_layers(config, model)
    layout = target_layout(config) if config.save_model_type == "mg" else Layout()
    if config.save_model_type == "mg":
        model = model.with_padded_vocabulary(config.make_vocab_size_divisible_by, layout.tensor_parallel_size)
    else:
        _check_source_layout(config, base)
    table = WeightTable(model)
    table.check_tensor_parallel(layout.tensor_parallel_size)
    place_layers(model.num_layers, layout)
    check_experts(model, layout)
    base.check_coverage(table)
    adapter, lora = find_adapter(config, base, table)
    dtype = PARAMS_DTYPES[config.params_dtype] if config.params_dtype else None
    return Plan(base, model, table, config_dir, layout, adapter, lora, dtype)


def target_layout(config: ConvertConfig) -> Layout:
    """The layout that the flags describe."""
    return Layout(
        tensor_parallel_size=config.target_tensor_parallel_size,
        pipeline_parallel_size=config.target_pipeline_parallel_size,
        layers_per_virtual_stage=config.layers_per_virtual_stage,
        num_layer_list=config.num_layer_list,
        noop_layers=config.noop_layers or (),
        expert_parallel_size=config.target_expert_parallel_size,
        expert_tensor_parallel_size=config.expert_tensor_parallel_size,
        experts_over_tensor_ranks=config.moe_tp_extend_ep,
        grouped_gemm=config.moe_grouped_gemm,
    )


def _check_source_layout(config: ConvertConfig, base: Base) -> None:
    """Flags that describe a Megatron source (the peer's V2 converter asks for them again) must say what its files say.

    Raises:
        UsageError: they do not, or there is no Megatron source.
    """
    found: Layout | None = base.folder.layout if isinstance(base, MegatronBase) else None
    grouped = isinstance(base, MegatronBase) and base.folder.grouped
    said = (
        ("--num-layers-per-virtual-pipeline-stage", config.layers_per_virtual_stage, None),
        ("--num-layer-list", config.num_layer_list, None),
        ("--noop-layers", config.noop_layers and tuple(sorted(config.noop_layers)), found and found.noop_layers),
        ("--moe-grouped-gemm", config.moe_grouped_gemm, grouped),
        ("--moe-tp-extend-ep", config.moe_tp_extend_ep, found and found.experts_over_tensor_ranks),
    )
    for flag, value, own in said:
        if value and value != own:
            raise UsageError(f"{flag} with --save-model-type hf: {base.path} is not laid out so, and what is written has no layout")


def _check_dense_layers(config: ConvertConfig, model: ModelConfig) -> None:
    """--first-k-dense-replace repeats what config.json says; Raises UsageError where it differs."""
    if config.first_k_dense_replace is None:
        return
    first = next((layer for layer in range(model.num_layers) if model.has_experts(layer)), model.num_layers)
    if config.first_k_dense_replace != first:
        raise UsageError(f"--first-k-dense-replace {config.first_k_dense_replace}, but config.json makes the first {first} layers dense")


def manifest_folder(base: Base) -> Path:
    """The folder that the parts of a base's manifest are relative to."""
    iteration_dir = getattr(getattr(base, "folder", None), "iteration_dir", None)
    if iteration_dir is not None and (iteration_dir / "mindspeed_lora.json").is_file():
        return Path(iteration_dir)
    return base.path


def config_candidates(config: ConvertConfig, own: Path | None) -> list[tuple[str, Path]]:
    """Folders that may hold the model's config.json, with the flag that names each; an explicit one first."""
    named = [("--hf-cfg-dir", config.hf_cfg_dir), ("--load-dir", own), ("--save-dir", config.save_dir)]
    return [(flag, folder) for flag, folder in named if folder is not None and (folder / "config.json").is_file()]


def find_model_config(config: ConvertConfig, base: Base) -> tuple[ModelConfig, Path]:
    """config.json from --hf-cfg-dir, --load-dir or --save-dir; where several exist they must describe one model.

    Raises:
        CheckpointError: there is none (a checkpoint's args do not hold the rotary base), or two differ.
    """
    if config.hf_cfg_dir is not None and not (config.hf_cfg_dir / "config.json").is_file():
        raise CheckpointError(f"--hf-cfg-dir {config.hf_cfg_dir}: has no config.json")
    candidates = config_candidates(config, base.config_dir)
    if not candidates:
        raise CheckpointError(
            f"{config.load_dir}: has no config.json, and a Megatron checkpoint's args do not hold the rotary base; "
            "put the model's config.json there, or name the original Hugging Face folder with --hf-cfg-dir (or --save-dir)"
        )
    (flag, folder), *others = candidates
    model = model_config_from_hf(folder)
    for other_flag, other_folder in others:
        _check_same_model(f"{flag} {folder}", model, f"{other_flag} {other_folder}", model_config_from_hf(other_folder))
    return model, folder


def _check_same_model(first: str, model: ModelConfig, second: str, other: ModelConfig) -> None:
    neutral = dict(dtype="", max_position_embeddings=None)
    one, two = replace(model, **neutral), replace(other, **neutral)  # type: ignore[arg-type]
    for field in fields(ModelConfig):
        if getattr(one, field.name) != getattr(two, field.name):
            raise CheckpointError(
                f"{first}/config.json says {field.name} {getattr(one, field.name)}, "
                f"but {second}/config.json says {getattr(two, field.name)}; they describe different models"
            )


def find_adapter(config: ConvertConfig, base: Base, table: WeightTable) -> tuple[Adapter | None, LoraSpec | None]:
    """The adapter to merge: --lora-load, or the one inside a unified checkpoint.

    Raises:
        UsageError: LoRA flags without an adapter, or values unlike the adapter's.
        CheckpointError: the adapter does not fit the base.
    """
    if config.lora_load is not None:
        adapter = open_adapter(config.lora_load)
    elif base.unified:
        adapter = open_adapter(base.path)
    elif config.lora is not None and (config.lora.r or config.lora.alpha or config.lora.targets):
        raise UsageError(
            f"--lora-r, --lora-alpha or --lora-target-modules, but {base.path} holds no LoRA tensors; name the adapter with --lora-load"
        )
    else:
        return None, None
    lora = adapter_values(config, adapter, table)
    check_adapter_base(adapter, base)
    return adapter, lora


def adapter_values(config: ConvertConfig, adapter: Adapter, table: WeightTable) -> LoraSpec:
    """r, alpha and targets, agreed between flags and adapter, and with the adapter's tensors.

    Raises:
        UsageError: they disagree, or nobody says them.
        CheckpointError: the adapter does not fit the model of ``table``.
    """
    lora = resolve_lora(config.lora, adapter, table)
    if lora is None:
        raise UsageError(
            f"--lora-load {adapter.path}: r, alpha and targets are unknown; pass --lora-r, --lora-alpha and --lora-target-modules"
        )
    if lora.r != adapter.found_r:
        raise UsageError(f"--lora-r {lora.r}, but the tensors of {adapter.path} have r {adapter.found_r}")
    if set(lora.targets) != set(adapter.found_targets):
        raise UsageError(
            f"--lora-target-modules {' '.join(lora.targets)}, but the tensors of {adapter.path} are of {' '.join(adapter.found_targets)}"
        )
    adapter.check_coverage(table)
    return lora
