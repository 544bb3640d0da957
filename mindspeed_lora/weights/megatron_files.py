"""Names, ``args`` and writing of Megatron V1 checkpoint files (formats.md 1.1, 1.2; Megatron core 0.12.1 checks)."""

from __future__ import annotations

import argparse
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mindspeed_lora.files import atomic_file, write_text
from mindspeed_lora.weights.config import Layout, ModelConfig
from mindspeed_lora.weights.lora_spec import LoraSpec
from mindspeed_lora.weights.placement import expert_tensor_size, experts_of, place_layers
from mindspeed_lora.weights.table import Row, WeightTable
from mindspeed_lora.weights.torch_stream import save_torch_file

TRACKER_NAME = "latest_checkpointed_iteration.txt"
RANK_FILE_NAME = "model_optim_rng.pt"
CHECKPOINT_VERSION = 3.0


def iteration_directory_name(iteration: int) -> str:
    """``iter_0000001``."""
    return f"iter_{iteration:07d}"


def rank_directory_name(tp_rank: int, pp_rank: int, pp_size: int, ep_rank: int = 0, ep_size: int = 1) -> str:
    """``mp_rank_TT[_PPP][_EEE]``: the stage where there is more than one, the expert rank where there is more than one."""
    stage = f"_{pp_rank:03d}" if pp_size > 1 else ""
    return f"mp_rank_{tp_rank:02d}{stage}" + (f"_{ep_rank:03d}" if ep_size > 1 else "")


def model_keys(num_chunks: int) -> list[str]:
    """Top-level keys of the model chunks of one stage."""
    return ["model"] if num_chunks == 1 else [f"model{chunk}" for chunk in range(num_chunks)]


def write_tracker(folder: Path, iteration: int) -> None:
    """Name the complete iteration; the last thing a save writes."""
    write_text(Path(folder) / TRACKER_NAME, str(iteration))


@dataclass(frozen=True)
class GroupRow(Row):
    """A grouped-gemm tensor of a file: the shards of ``members``, transposed, side by side.

    ``experts.weight1`` is a view ``[h, experts * 2f]`` of ``[experts, h, 2f]``, ``experts.weight2`` a view ``[experts * f, h]`` of
    ``[experts, f, h]``.
    """

    members: tuple[Row, ...] = ()


def _group_rows(table: WeightTable, experts: range) -> list[GroupRow]:
    groups = []
    for end, name in (("linear_fc1.weight", "weight1"), ("linear_fc2.weight", "weight2")):
        members = tuple(row for row in table.rows if row.expert is not None and row.expert in experts and row.megatron.endswith(end))
        first = members[0]
        stem = first.megatron.partition("local_experts.")[0]
        hf = tuple(part for row in members for part in row.hf)
        groups.append(GroupRow(stem + name, hf, (), first.axis, "whole", "layer", "never", layers=first.layers, members=members))
    return groups


def _layer_rows(table: WeightTable, layout: Layout, experts: range) -> list[tuple[str, Row]]:
    """(name with ``{layer}`` and the expert's local number, row) of one layer's tensors on one rank."""
    rows: list[tuple[str, Row]] = []
    for row in table.rows:
        if row.place != "layer":
            continue
        if row.expert is None:
            rows.append((row.megatron, row))
        elif row.expert in experts:
            if not layout.grouped_gemm:
                local = row.expert - experts.start
                rows.append((row.megatron.replace(f"local_experts.{row.expert}.", f"local_experts.{local}."), row))
            elif row.expert == experts.start and row.megatron.endswith("fc1.weight"):
                rows += [(group.megatron, group) for group in _group_rows(table, experts)]
    return rows


def chunk_rows(
    table: WeightTable, layout: Layout, stage: int, chunk: int, rank: tuple[int, int] = (0, 0)
) -> Iterator[tuple[str, Row, int | None]]:
    """(name inside the file, row, global layer) of every tensor of one model chunk, in the peer's order; ``rank``: tensor, expert.

    The copy of a tied embedding is there only where the last stage is not the first one.
    """
    stages = place_layers(table.config.num_layers, layout)
    first = stage == 0 and chunk == 0
    last = stage == len(stages) - 1 and chunk == len(stages[stage]) - 1
    if first:
        yield from ((row.megatron, row, None) for row in table.rows if row.place == "embedding")
    count = table.config.experts.count if table.config.experts else 0
    rows = _layer_rows(table, layout, experts_of(layout, *rank, count))
    for local, layer in stages[stage][chunk]:
        yield from ((name.format(layer=local), row, layer) for name, row in rows if row.exists(layer))
    if last:
        alone = len(stages) * len(stages[0]) == 1 or layout.pipeline_parallel_size == 1
        yield from ((row.megatron, row, None) for row in table.rows if row.place == "head" and not (row.alias_of and alone))


def chunk_keys(
    table: WeightTable, layout: Layout, stage: int, chunk: int, rank: tuple[int, int] = (0, 0)
) -> list[tuple[str, Row | None, int | None]]:
    """:func:`chunk_rows` and, with row None, the keys that the peer stores with the value None.

    Those are ``<linear>._extra_state``, after the last tensor of each linear; the head has one even where it is tied away.
    """
    keys: list[tuple[str, Row | None, int | None]] = []
    rows = list(chunk_rows(table, layout, stage, chunk, rank))
    for index, (name, row, layer) in enumerate(rows):
        keys.append((name, row, layer))
        prefix = name.rpartition(".")[0]
        following = rows[index + 1][0].rpartition(".")[0] if index + 1 < len(rows) else ""
        if row.linear and following != prefix:
            keys.append((f"{prefix}._extra_state", None, layer))
    head = [row for row in table.rows if row.place == "head" and row.linear and row.alias_of]
    if head and rows and rows[-1][1].place == "head" and rows[-1][1] not in head:
        keys.append((f"{head[0].megatron.rpartition('.')[0]}._extra_state", None, None))
    return keys


def megatron_args(
    config: ModelConfig, layout: Layout, dtype: torch.dtype, lora: LoraSpec | None = None, iteration: int = 1
) -> argparse.Namespace:
    """The ``args`` that Megatron's ``check_checkpoint_args`` and ``--use-checkpoint-args`` read: plain values only."""
    slots = config.num_layers + len(layout.noop_layers)
    run = dict(
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        params_dtype=dtype,
        ckpt_format="torch",
        use_dist_ckpt=False,
        iteration=iteration,
        consumed_train_samples=0,
        skipped_train_samples=0,
        consumed_valid_samples=0,
        lora_target_modules=list(lora.targets) if lora else [],
        lora_r=lora.r if lora else 16,
        lora_alpha=(lora.scale * lora.r if lora.rslora else lora.alpha) if lora else 32,  # a reader of args knows alpha / r only
    )
    return argparse.Namespace(**_model_args(config, slots), **_layout_args(layout, slots), **run)


def _model_args(config: ModelConfig, slots: int) -> dict[str, Any]:
    return dict(
        num_layers=slots,
        encoder_num_layers=slots,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_query_groups,
        group_query_attention=config.num_query_groups != config.num_attention_heads,
        kv_channels=config.kv_channels,
        vocab_size=config.vocab_size,
        padded_vocab_size=config.padded_vocab_size,
        make_vocab_size_divisible_by=1,
        max_position_embeddings=config.max_position_embeddings,
        seq_length=config.max_position_embeddings,
        norm_epsilon=config.norm_epsilon,
        normalization="RMSNorm",
        apply_layernorm_1p=False,
        apply_query_key_layer_scaling=False,
        qk_layernorm=config.qk_layernorm,
        add_qkv_bias=config.qkv_bias,
        add_bias_linear=False,
        add_position_embedding=True,
        position_embedding_type="rope",
        use_rotary_position_embeddings=True,
        rotary_base=config.rotary_base,
        rotary_percent=1.0,
        rotary_interleaved=False,
        swiglu=True,
        squared_relu=False,
        untie_embeddings_and_output_weights=not config.tied_embeddings,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        **_expert_args(config),
        tokenizer_type="PretrainedFromHF",
        transformer_impl="local",
        use_mcore_models=True,
    )


def _layout_args(layout: Layout, slots: int) -> dict[str, Any]:
    stages = layout.pipeline_parallel_size
    chunks = slots // stages // (layout.layers_per_virtual_stage or slots // stages)
    return dict(
        tensor_model_parallel_size=layout.tensor_parallel_size,
        pipeline_model_parallel_size=stages,
        transformer_pipeline_model_parallel_size=stages,
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        num_layers_per_virtual_pipeline_stage=layout.layers_per_virtual_stage,
        num_layer_list=_joined(layout.num_layer_list),
        noop_layers=_joined(layout.noop_layers),
        expert_model_parallel_size=layout.expert_parallel_size,
        expert_tensor_parallel_size=expert_tensor_size(layout),
        moe_grouped_gemm=layout.grouped_gemm,
        moe_tp_extend_ep=layout.experts_over_tensor_ranks,
        context_parallel_size=1,
        data_parallel_random_init=False,
        world_size=layout.tensor_parallel_size * stages,
    )


def _joined(numbers: tuple[int, ...] | None) -> str | None:
    return ",".join(map(str, numbers)) if numbers else None


def _expert_args(config: ModelConfig) -> dict[str, Any]:
    """The sizes of experts and latent attention, in Megatron's words."""
    experts, latent = config.experts, config.latent
    values: dict[str, Any] = {"num_experts": None}
    if experts is not None:
        values = dict(
            num_experts=experts.count,
            moe_ffn_hidden_size=experts.ffn_hidden_size,
            moe_shared_expert_intermediate_size=experts.shared_ffn_hidden_size or None,
            moe_router_enable_expert_bias=experts.router_bias,
        )
    if latent is not None:
        values |= dict(
            multi_latent_attention=True,
            q_lora_rank=latent.q_rank,
            kv_lora_rank=latent.kv_rank,
            qk_head_dim=latent.nope_head_dim,
            qk_pos_emb_head_dim=latent.rope_head_dim,
            v_head_dim=latent.value_head_dim,
        )
    return values


def checkpoint_content(
    models: Mapping[str, Mapping[str, torch.Tensor | None]],
    args: argparse.Namespace,
    iteration: int,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The dictionary of a rank file, keys and order as the V1 converter writes them."""
    return {
        "args": args,
        "checkpoint_version": CHECKPOINT_VERSION,
        "iteration": iteration,
        **{key: OrderedDict(model) for key, model in models.items()},
        "rerun_state_machine": None,
        "num_floating_point_operations_so_far": 0,
        **(extra or {}),
    }


def write_rank_file(
    iteration_dir: Path,
    tp_rank: int,
    pp_rank: int,
    tp_size: int,
    pp_size: int,
    models: Mapping[str, Mapping[str, torch.Tensor | None]],
    args: argparse.Namespace,
    iteration: int,
    extra: Mapping[str, Any] | None = None,
    expert: tuple[int, int] = (0, 1),
) -> Path:
    """Write one rank's ``model_optim_rng.pt`` from tensors in memory and return its path.

    ``models``: ``{"model": {...}}`` or ``{"model0": {...}, ...}`` with stage-local layer numbers; the tensors are copied to the CPU
    whole, a view takes its storage with it only as far as it reaches. ``expert``: rank and size of expert parallelism.
    """
    if not (0 <= tp_rank < tp_size and 0 <= pp_rank < pp_size):
        raise ValueError(f"rank ({tp_rank}, {pp_rank}) lies outside the layout ({tp_size}, {pp_size})")
    folder = Path(iteration_dir) / rank_directory_name(tp_rank, pp_rank, pp_size, *expert)
    folder.mkdir(parents=True, exist_ok=True)
    compact = {key: {name: _compact(tensor) for name, tensor in model.items()} for key, model in models.items()}
    path = folder / RANK_FILE_NAME
    with atomic_file(path) as temporary:
        save_torch_file(checkpoint_content(compact, args, iteration, extra), temporary)
    return path


def _compact(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """On the CPU, without the rest of the storage that it may be a view of."""
    if tensor is None:
        return None
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
