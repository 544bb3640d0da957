"""Experts and latent attention: what one rank's shard means, placement over ranks, and that such models are refused for running."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mindspeed_lora.arguments.configs import ArchitectureFlags
from mindspeed_lora.checkpoint.resolve import resolve_model_config
from mindspeed_lora.errors import CheckpointError, UsageError
from mindspeed_lora.weights.config import ExpertShape, LatentShape, Layout, ModelConfig, Routing
from mindspeed_lora.weights.families import model_config_from_dict
from mindspeed_lora.weights.megatron_files import GroupRow, chunk_rows
from mindspeed_lora.weights.placement import block_ranks, check_experts, experts_of, place_layers, stage_ranks
from mindspeed_lora.weights.table import Row, WeightTable

EXPERTS = ModelConfig(
    family="qwen2_moe",
    hidden_size=8,
    ffn_hidden_size=12,
    num_layers=3,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=4,
    vocab_size=20,
    padded_vocab_size=20,
    norm_epsilon=1e-6,
    rotary_base=1e4,
    qkv_bias=True,
    experts=ExpertShape(4, 6, 10, shared_gate=True, dense_layers=(0,)),
)
LATENT = replace(
    EXPERTS,
    family="deepseek_v3",
    qkv_bias=False,
    num_query_groups=4,
    kv_channels=5,
    latent=LatentShape(q_rank=7, kv_rank=6, nope_head_dim=3, rope_head_dim=2, value_head_dim=4),
    experts=ExpertShape(4, 6, 12, router_bias=True, dense_layers=(0,)),
)


def test_rows_exist_in_the_layers_that_have_them() -> None:
    table = WeightTable(EXPERTS)
    names = {row.name(layer) for row, layer in table.entries()}
    assert "decoder.layers.0.mlp.linear_fc1.weight" in names and "decoder.layers.0.mlp.router.weight" not in names
    assert "decoder.layers.1.mlp.linear_fc1.weight" not in names and "decoder.layers.2.mlp.shared_experts.gate_weight" in names
    assert sum(".local_experts." in name for name in names) == 2 * 4 * 2
    row, layer = table.parse("decoder.layers.2.mlp.experts.local_experts.3.linear_fc1.weight")
    assert layer == 2 and row.hf == tuple(f"model.layers.{{layer}}.mlp.experts.3.{name}_proj.weight" for name in ("gate", "up"))


@pytest.mark.parametrize("tp_size", [1, 2])
def test_each_rank_s_expert_shards_compute_the_expert_with_that_number(tp_size: int) -> None:
    """A rank's file, grouped or not, holds for its i-th expert what the Hugging Face expert of that global number computes."""
    from mindspeed_lora.conversion.hf_to_megatron import _RankWriter
    from mindspeed_lora.conversion.stream import WeightStream

    table = WeightTable(EXPERTS)
    weights = {name: torch.randn(shape) for name, shape in table.hf_keys().items()}
    base: Any = SimpleNamespace(
        pieces=lambda row, layer: [[weights[name]] for name in row.hf_names(layer)],
        part_dtypes=lambda row, layer: [torch.float32] * len(row.hf),
    )
    stream = WeightStream(base, None, None, None)

    def read(writer: _RankWriter, row: Row, layer: int | None) -> torch.Tensor:
        blocks = list(writer._blocks(row, layer))
        return torch.cat([piece.flatten() for block in blocks if block.make for piece in block.make()]).view(writer._spec(row, layer).shape)

    x = torch.randn(5, 8)

    def reference(expert: int) -> torch.Tensor:
        gate, up, down = (weights[f"model.layers.1.mlp.experts.{expert}.{name}_proj.weight"] for name in ("gate", "up", "down"))
        return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T

    def gated(hidden: torch.Tensor) -> torch.Tensor:
        gate, up = hidden.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up

    for grouped in (False, True):
        layout = Layout(tensor_parallel_size=tp_size, expert_parallel_size=2, grouped_gemm=grouped)
        for ep_rank in range(2):
            total = [torch.zeros(5, 8), torch.zeros(5, 8)]
            for tp_rank in range(tp_size):
                writer = _RankWriter(stream, table, layout, 0, (tp_rank, ep_rank))
                rank = {name: read(writer, row, layer) for name, row, layer in chunk_rows(table, layout, 0, 0, (tp_rank, ep_rank))}
                prefix = "decoder.layers.1.mlp.experts."
                for local in range(2):
                    if grouped:  # Megatron's GroupedMLP: weight.view(experts, h, -1), x @ weight
                        first = rank[prefix + "weight1"].view(2, 8, -1)[local]
                        second = rank[prefix + "weight2"].view(2, -1, 8)[local]
                        total[local] += gated(x @ first) @ second
                    else:
                        first = rank[f"{prefix}local_experts.{local}.linear_fc1.weight"]
                        second = rank[f"{prefix}local_experts.{local}.linear_fc2.weight"]
                        total[local] += gated(x @ first.T) @ second.T
            for local in range(2):
                torch.testing.assert_close(total[local], reference(2 * ep_rank + local), rtol=1e-4, atol=1e-4)


def test_latent_attention_is_whole_on_every_rank_and_its_heads_are_cut() -> None:
    table = WeightTable(LATENT)
    stem = "decoder.layers.0.self_attention."
    down, queries, keys = (table.row(stem + name) for name in ("linear_qkv.weight", "linear_q_up_proj.weight", "linear_kv_up_proj.weight"))
    parts = [torch.randn(shape) for shape in down.part_shapes]
    assert all(torch.equal(table.shard(down, parts, rank, 2), torch.cat(parts)) for rank in range(2))
    for row, head_size in ((queries, 5), (keys, 7)):
        (whole,) = (torch.randn(shape) for shape in row.part_shapes)
        per_head = whole.view(4, head_size, -1)
        for rank in range(2):
            assert torch.equal(table.shard(row, [whole], rank, 2).view(2, head_size, -1), per_head[2 * rank : 2 * rank + 2])
    a_row, b_row = table.lora_pair(down)
    assert a_row.axis is None and b_row.axis is None, "the adapter of a replicated weight is replicated"


def test_ranks_and_blocks_of_experts() -> None:
    uncut = Layout(tensor_parallel_size=2, expert_parallel_size=2, expert_tensor_parallel_size=1)
    assert stage_ranks(uncut) == [(0, 0), (1, 1)]
    assert stage_ranks(replace(uncut, tensor_parallel_size=4)) == [(0, 0), (1, 1), (2, 0), (3, 1)]
    assert stage_ranks(replace(uncut, expert_parallel_size=4)) == [(0, 0), (0, 2), (1, 1), (1, 3)]
    assert stage_ranks(Layout(2, expert_parallel_size=2)) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    extended = Layout(2, expert_parallel_size=2, experts_over_tensor_ranks=True)
    assert [experts_of(extended, tp, ep, 8) for tp, ep in stage_ranks(extended)] == [range(0, 2), range(4, 6), range(2, 4), range(6, 8)]
    for layout in (uncut, extended, Layout(2, expert_parallel_size=4)):
        blocks = 4 if layout is not uncut else 2
        held = [experts_of(layout, *block_ranks(layout, block)[0], 8) for block in range(blocks)]
        assert [expert for experts in held for expert in experts] == list(range(8))


def test_lists_and_empty_slots() -> None:
    assert place_layers(4, Layout(pipeline_parallel_size=2, num_layer_list=(1, 3))) == [[[(0, 0)]], [[(0, 1), (1, 2), (2, 3)]]]
    assert place_layers(3, Layout(pipeline_parallel_size=2, noop_layers=(0,))) == [[[(1, 0)]], [[(0, 1), (1, 2)]]]
    assert place_layers(7, Layout(pipeline_parallel_size=2, layers_per_virtual_stage=2, noop_layers=(7,))) == [
        [[(0, 0), (1, 1)], [(0, 4), (1, 5)]],
        [[(0, 2), (1, 3)], [(0, 6)]],
    ]
    for layout, message in (
        (Layout(pipeline_parallel_size=2, num_layer_list=(1, 2)), "adds up to 3; the model has 4"),
        (Layout(pipeline_parallel_size=2, num_layer_list=(4,)), "has 1 numbers; the pipeline parallel size is 2"),
        (Layout(pipeline_parallel_size=2, num_layer_list=(1, 3), noop_layers=(1,)), "cannot be combined"),
        (Layout(noop_layers=(5,)), r"must differ and lie in 0\.\.4"),
        (Layout(pipeline_parallel_size=2, noop_layers=(4,)), "does not divide the model's 5 layers"),
    ):
        with pytest.raises(UsageError, match=message):
            place_layers(4, layout)


def test_experts_that_cannot_be_dealt_out() -> None:
    for layout, message in (
        (Layout(expert_parallel_size=3), "4 experts cannot be dealt out evenly over 3"),
        (Layout(4), "does not divide the model's moe_intermediate_size 6"),
        (Layout(2, expert_parallel_size=4, experts_over_tensor_ranks=True), "over 8 blocks"),
        (Layout(4, expert_tensor_parallel_size=2), "use 1 or the tensor parallel size 4"),
    ):
        with pytest.raises(UsageError, match=message):
            check_experts(EXPERTS, layout)
    with pytest.raises(UsageError, match="has no experts"):
        check_experts(replace(EXPERTS, family="qwen3", experts=None), Layout(expert_parallel_size=2))


def test_experts_that_a_layout_cannot_cut_are_refused_with_a_sentence() -> None:
    base: Any = SimpleNamespace(model_config=EXPERTS, path="folder")
    with pytest.raises(UsageError, match="tensor parallel size 5 does not divide the model's moe_intermediate_size"):
        resolve_model_config(base, ArchitectureFlags(), Layout(5))


def test_which_layers_are_dense() -> None:
    qwen = dict(
        model_type="qwen3_moe",
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=6,
        num_attention_heads=4,
        vocab_size=20,
        num_experts=4,
        moe_intermediate_size=6,
        decoder_sparse_step=2,
        mlp_only_layers=[3],
        num_experts_per_tok=2,
    )
    config = model_config_from_dict(qwen)
    assert config.experts is not None and config.experts.dense_layers == (0, 2, 3, 4)
    with pytest.raises(CheckpointError, match="num_experts_per_tok of at most 4"):
        model_config_from_dict({**qwen, "num_experts_per_tok": 5})
    deepseek = {
        **qwen,
        "model_type": "deepseek_v2",
        "n_routed_experts": 4,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 6,
        "q_lora_rank": None,
        "qk_nope_head_dim": 3,
        "qk_rope_head_dim": 2,
        "v_head_dim": 4,
        "num_nextn_predict_layers": 1,
    }
    lite = model_config_from_dict(deepseek)
    assert lite.experts == ExpertShape(4, 6, 12, dense_layers=(0,), routing=Routing(2)) and lite.latent == LatentShape(None, 6, 3, 2, 4)
    table = WeightTable(lite)
    assert table.row("decoder.layers.0.self_attention.linear_qkv.weight").part_shapes == ((20, 8), (8, 8))
    assert table.is_dropped("model.layers.6.enorm.weight") and not table.is_dropped("model.layers.7.enorm.weight")
    assert not any(isinstance(row, GroupRow) for row in table.rows)
