"""The weight table: what a shard means, round trips, adapter rows, refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import golden
from hypothesis import given, settings
from hypothesis import strategies as st

from mindspeed_lora.errors import CheckpointError, UsageError
from mindspeed_lora.weights.config import Layout, ModelConfig, stage_layers
from mindspeed_lora.weights.megatron_files import chunk_keys, chunk_rows
from mindspeed_lora.weights.table import Row, WeightTable, unshard

CONFIG = ModelConfig(
    family="qwen3",
    hidden_size=12,
    ffn_hidden_size=20,
    num_layers=4,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=3,
    vocab_size=22,
    padded_vocab_size=22,
    norm_epsilon=1e-6,
    rotary_base=10000.0,
    qk_layernorm=True,
    qkv_bias=True,
)
QKV = "decoder.layers.{layer}.self_attention.linear_qkv."
TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


def random_parts(row: Row, r: int = 2, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn([r if size < 0 else size for size in shape], generator=generator) for shape in row.part_shapes]


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_a_rank_s_qkv_computes_the_projections_of_the_heads_it_owns(tp_size: int) -> None:
    table = WeightTable(CONFIG)
    weight_row, bias_row = table.row(QKV.format(layer=1) + "weight"), table.row(QKV.format(layer=1) + "bias")
    weights, biases = random_parts(weight_row), random_parts(bias_row, seed=1)
    named = {**dict(zip(weight_row.hf, weights, strict=True)), **dict(zip(bias_row.hf, biases, strict=True))}
    stem = "model.layers.{layer}.self_attn."
    x = torch.randn(5, 12)
    query, key, value = (
        torch.nn.functional.linear(x, named[f"{stem}{name}_proj.weight"], named[f"{stem}{name}_proj.bias"]).view(5, -1, 3) for name in "qkv"
    )
    for rank in range(tp_size):
        shard = table.shard(weight_row, weights, rank, tp_size)
        bias = table.shard(bias_row, biases, rank, tp_size)
        # Megatron reads its output as [tokens, query group, (query heads of the group, key, value), head dim].
        mixed = torch.nn.functional.linear(x, shard, bias).view(5, 4 // tp_size, 8 // 4 + 2, 3)
        heads, groups = 8 // tp_size, 4 // tp_size
        torch.testing.assert_close(mixed[:, :, :2].reshape(5, heads, 3), query[:, rank * heads : (rank + 1) * heads])
        torch.testing.assert_close(mixed[:, :, 2], key[:, rank * groups : (rank + 1) * groups])
        torch.testing.assert_close(mixed[:, :, 3], value[:, rank * groups : (rank + 1) * groups])


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_the_ranks_mlp_shards_together_compute_the_gated_mlp(tp_size: int) -> None:
    table = WeightTable(CONFIG)
    fc1, fc2 = table.row("decoder.layers.0.mlp.linear_fc1.weight"), table.row("decoder.layers.0.mlp.linear_fc2.weight")
    parts, (down,) = random_parts(fc1), random_parts(fc2, seed=1)
    named = dict(zip(fc1.hf, parts, strict=True))
    gate, up = (named["model.layers.{layer}.mlp." + name] for name in ("gate_proj.weight", "up_proj.weight"))
    x = torch.randn(5, 12)
    total = torch.zeros(5, 12)
    for rank in range(tp_size):
        own_gate, own_up = (x @ table.shard(fc1, parts, rank, tp_size).T).chunk(2, dim=-1)
        size = 20 // tp_size
        torch.testing.assert_close(own_gate, (x @ gate.T)[:, rank * size : (rank + 1) * size])
        total += (torch.nn.functional.silu(own_gate) * own_up) @ table.shard(fc2, [down], rank, tp_size).T
    torch.testing.assert_close(total, (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T, rtol=1e-4, atol=1e-4)


@st.composite
def models(draw: st.DrawFn) -> tuple[ModelConfig, int]:
    tp_size = draw(st.sampled_from([1, 2, 3, 4]))
    groups = tp_size * draw(st.integers(1, 2))
    config = replace(
        CONFIG,
        hidden_size=draw(st.integers(1, 5)),
        ffn_hidden_size=tp_size * draw(st.integers(1, 3)),
        num_attention_heads=groups * draw(st.integers(1, 3)),
        num_query_groups=groups,
        kv_channels=draw(st.integers(1, 3)),
        vocab_size=draw(st.integers(1, 9)),
        qkv_bias=draw(st.booleans()),
        tied_embeddings=draw(st.booleans()),
        num_layers=1,
    )
    return config.with_padded_vocabulary(draw(st.integers(1, 3)), tp_size), tp_size


@settings(max_examples=60, deadline=None)
@given(models())
def test_every_row_survives_both_ways_and_agrees_with_its_shards(case: tuple[ModelConfig, int]) -> None:
    config, tp_size = case
    table = WeightTable(config)
    table.check_tensor_parallel(tp_size)
    for row in [*table.rows, *table.lora_rows(TARGETS)]:
        parts = random_parts(row)
        fused = table.fuse(row, parts, tp_size)
        assert tuple(fused.shape) == table.shape(row, 2)
        shards = [table.shard(row, parts, rank, tp_size) for rank in range(tp_size)]
        for rank, shard in enumerate(shards):
            assert tuple(shard.shape) == table.local_shape(row, tp_size, 2)
            assert shard.is_contiguous()
            expected = fused if row.axis is None else fused.chunk(tp_size, row.axis)[rank]
            assert torch.equal(shard, expected)
        for back in (table.unfuse(row, fused, tp_size), unshard(row, shards)):
            assert len(back) == len(parts) and all(torch.equal(a, b) for a, b in zip(back, parts, strict=True))


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_an_adapter_s_contribution_is_cut_like_the_weight_it_adds_to(tp_size: int) -> None:
    table = WeightTable(CONFIG)
    for base in (row for row in table.rows if row.module):
        a_row, b_row = table.lora_pair(base)
        (matrix_a,), matrices_b = random_parts(a_row), random_parts(b_row, seed=1)
        deltas = [matrix_b @ matrix_a for matrix_b in (matrices_b if base.axis == 0 else [matrices_b[0]])]
        for rank in range(tp_size):
            local = table.shard(b_row, matrices_b, rank, tp_size) @ table.shard(a_row, [matrix_a], rank, tp_size)
            torch.testing.assert_close(local, table.shard(base, deltas, rank, tp_size))


def test_gradients_that_are_partial_over_tensor_ranks() -> None:
    table = WeightTable(CONFIG)
    found = {row.megatron.split("}.")[-1]: row.grad_sum for row in table.rows}
    assert found["input_layernorm.weight"] == found["pre_mlp_layernorm.weight"] == found["decoder.final_layernorm.weight"] == "sp"
    assert found["self_attention.q_layernorm.weight"] == found["self_attention.k_layernorm.weight"] == "always"
    lora = {name: table.lora_row(f"decoder.layers.0.{name}.default.weight").grad_sum for name in _lora_names()}
    assert {name: "always" if kind == "qkv A" else "sp" if kind == "proj B" else "never" for name, kind in _lora_names().items()} == lora
    assert all(row.grad_sum == "never" for row in table.rows if row.axis is not None)


def _lora_names() -> dict[str, str]:
    return {
        "self_attention.linear_qkv.lora_A": "qkv A",
        "self_attention.linear_qkv.lora_B": "qkv B",
        "self_attention.linear_proj.lora_A": "proj A",
        "self_attention.linear_proj.lora_B": "proj B",
    }


def test_vocabulary_padding_repeats_the_last_row_and_is_cut_off_again() -> None:
    table = WeightTable(replace(CONFIG, vocab_size=5, padded_vocab_size=12))
    row = table.row("embedding.word_embeddings.weight")
    (part,) = random_parts(row)
    shards = [table.shard(row, [part], rank, 4) for rank in range(4)]
    assert torch.equal(torch.cat(shards), torch.cat([part, part[-1:].expand(7, -1)]))
    assert torch.equal(unshard(row, shards)[0], part)
    assert CONFIG.with_padded_vocabulary(128, 2).padded_vocab_size == 256


def test_names_of_the_peer_s_lora_model() -> None:
    stored = json.loads((golden() / "lora_state_dict_keys_qwen3_tp2pp2.json").read_text())
    config = replace(
        CONFIG,
        hidden_size=64,
        ffn_hidden_size=96,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=32,
        vocab_size=320,
        qkv_bias=False,
    ).with_padded_vocabulary(1, 2)
    table = WeightTable(config)
    for rank, keys in stored.items():
        stage = int(rank[-1])
        expected = {name: shape for name, shape in keys.items() if shape is not None}
        found: dict[str, Any] = {}
        for name, row, _ in chunk_rows(table, Layout(2, 2), stage, 0):
            stem = name.removesuffix("weight")
            found[f"{stem}base_layer.weight" if row.module else name] = table.local_shape(row, 2)
            if row.module:
                for adapter in table.lora_pair(row):
                    found[f"{stem}lora_{adapter.matrix}.default.weight"] = table.local_shape(adapter, 2, 8)
        assert {name: tuple(shape) for name, (shape, _) in expected.items()} == found


def test_stages_and_chunks() -> None:
    assert stage_layers(8, 2, 2) == [[range(0, 2), range(4, 6)], [range(2, 4), range(6, 8)]]
    assert stage_layers(4, 2) == [[range(0, 2)], [range(2, 4)]]
    for layers, stages, chunk in ((5, 2, None), (8, 2, 3), (8, 1, 2)):
        with pytest.raises(UsageError):
            stage_layers(layers, stages, chunk)


def test_a_tied_head_is_stored_on_the_last_of_several_stages_only() -> None:
    table = WeightTable(replace(CONFIG, tied_embeddings=True))
    names = {stages: [name for name, _, _ in chunk_rows(table, Layout(1, stages), stages - 1, 0)] for stages in (1, 2)}
    assert "output_layer.weight" not in names[1] and "output_layer.weight" in names[2]
    assert ("output_layer._extra_state", None, None) in chunk_keys(table, Layout(1, 1), 0, 0)
    assert table.row("output_layer.weight").hf == ("model.embed_tokens.weight",)


@pytest.mark.parametrize("tp_size", [0, 3, 8])
def test_tensor_parallel_sizes_that_do_not_fit(tp_size: int) -> None:
    with pytest.raises(UsageError, match=f"tensor parallel size {tp_size}"):
        WeightTable(CONFIG).check_tensor_parallel(tp_size)


def test_unknown_names_and_targets() -> None:
    table = WeightTable(CONFIG)
    for name in ("decoder.layers.4.input_layernorm.weight", "decoder.layers.0.mlp.router.weight", "lm_head.weight"):
        with pytest.raises(CheckpointError, match="no tensor of this name"):
            table.row(name)
    with pytest.raises(CheckpointError, match="no adapter tensor"):
        table.lora_row("decoder.layers.0.mlp.linear_fc3.lora_A.default.weight")
    with pytest.raises(UsageError, match="linear_typo matches nothing"):
        table.lora_rows(["linear_typo"])
    assert table.row("decoder.layers.3.mlp.linear_fc1.base_layer.weight").module == "linear_fc1"


def test_the_printed_table_names_every_row() -> None:
    table = WeightTable(CONFIG)
    text = table.describe()
    assert all(row.megatron in text for row in table.rows)
    assert len(text.splitlines()) == len(table.rows) + 1
