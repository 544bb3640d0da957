"""Any family in any layout, to any other layout, and back: every bit, and pad rows as the peer makes them."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from conversion_helpers import assert_same_tensors, run_convert
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from mindspeed_lora.weights.families import FAMILIES, model_config_from_dict
from mindspeed_lora.weights.megatron_folder import MegatronFolder
from mindspeed_lora.weights.table import WeightTable

EXPERTS = {
    "mixtral": dict(num_local_experts=4),
    "qwen2_moe": dict(num_experts=4, moe_intermediate_size=8, shared_expert_intermediate_size=12),
    "qwen3_moe": dict(num_experts=4, moe_intermediate_size=8),
    "deepseek_v2": dict(n_routed_experts=4, moe_intermediate_size=8, n_shared_experts=2),
    "deepseek_v3": dict(n_routed_experts=4, moe_intermediate_size=8, n_shared_experts=1),
}
LATENT = dict(kv_lora_rank=6, qk_nope_head_dim=3, qk_rope_head_dim=2, v_head_dim=4)


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    """A config.json of a tiny model of any family."""
    family = draw(st.sampled_from(sorted(FAMILIES)))
    layers = draw(st.integers(2, 5))
    values: dict[str, Any] = dict(
        model_type=family,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=draw(st.sampled_from([2, 4])),
        head_dim=3,
        vocab_size=draw(st.integers(5, 9)),
        tie_word_embeddings=draw(st.booleans()),
        dtype="float32",
    )
    values |= EXPERTS.get(family, {})
    if family.startswith("deepseek"):
        rank = draw(st.sampled_from([5, None]))
        values |= {**LATENT, "first_k_dense_replace": draw(st.integers(0, layers - 1)), "q_lora_rank": rank}
    elif family.startswith("qwen") and family in EXPERTS:
        values |= {"decoder_sparse_step": draw(st.sampled_from([1, 2])), "mlp_only_layers": draw(st.sampled_from([[], [1]]))}
    return values


@st.composite
def layouts(draw: st.DrawFn, values: dict[str, Any]) -> dict[str, Any]:
    """Options of a conversion to Megatron that fit the model."""
    layers = values["num_hidden_layers"]
    options: dict[str, Any] = dict(
        target_tensor_parallel_size=draw(st.sampled_from([1, 2])), make_vocab_size_divisible_by=draw(st.sampled_from([1, 4]))
    )
    kind = draw(st.sampled_from(["even", "list", "empty slots", "virtual"]))
    stages = draw(st.integers(1, 2))
    if kind == "list" and stages == 2:
        first = draw(st.integers(1, layers - 1))
        options |= dict(target_pipeline_parallel_size=2, num_layer_list=(first, layers - first))
    elif kind != "list":
        multiple = 4 if kind == "virtual" else stages
        slots = -(-layers // multiple) * multiple
        noops = draw(st.permutations(range(slots)))[: slots - layers]
        options["noop_layers"] = tuple(noops)
        options["target_pipeline_parallel_size"] = 2 if kind == "virtual" else stages
        if kind == "virtual":
            options["layers_per_virtual_stage"] = slots // 4
    if values["model_type"] in EXPERTS:
        options |= dict(
            target_expert_parallel_size=draw(st.sampled_from([1, 2])),
            expert_tensor_parallel_size=draw(st.sampled_from([None, 1])),
            moe_grouped_gemm=draw(st.booleans()),
            moe_tp_extend_ep=draw(st.booleans()),
        )
    return options


def write_model(folder: Path, values: dict[str, Any]) -> WeightTable:
    table = WeightTable(model_config_from_dict(values))
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in table.hf_keys().items()}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(values))
    return table


def check_padding(folder: Path) -> None:
    """The rows behind the vocabulary are copies of its last row (formats.md 1.4)."""
    read = MegatronFolder(folder)
    config = json.loads((folder / "config.json").read_text())
    whole = torch.cat(read.shards(read.index()["embedding.word_embeddings.weight"][0]))
    pads = whole[config["vocab_size"] :]
    assert torch.equal(pads, whole[config["vocab_size"] - 1].expand_as(pads))
    assert whole.shape[0] % read.tp_size == 0


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_every_family_survives_every_change_of_layout(data: st.DataObject) -> None:
    values = data.draw(configurations())
    first, second = data.draw(layouts(values)), data.draw(layouts(values))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "hf", values)
        run_convert("hf", "mg", folder / "hf", folder / "one", **first)
        run_convert("mg", "mg", folder / "one", folder / "two", **second)
        run_convert("mg", "hf", folder / "two", folder / "back")
        assert_same_tensors(folder / "hf", folder / "back")
        for target, options in (("one", first), ("two", second)):
            check_padding(folder / target)
            divisor = options["make_vocab_size_divisible_by"] * options["target_tensor_parallel_size"]
            read = MegatronFolder(folder / target)
            shards = read.shards(read.index()["embedding.word_embeddings.weight"][0])
            assert sum(shard.shape[0] for shard in shards) == -(-values["vocab_size"] // divisor) * divisor
