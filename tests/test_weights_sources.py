"""Opening folders: the peer's files, identity over layouts, and files that must be refused."""

from __future__ import annotations

import collections
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conversion_helpers import run_convert
from helpers import golden, shared_data, tiny_llama, tiny_qwen3
from safetensors.torch import load_file, save_file
from torch_file_helpers import Runs, save_rank

from mindspeed_lora.errors import CheckpointError, UsageError
from mindspeed_lora.weights.families import check_model_type, model_config_from_dict
from mindspeed_lora.weights.hf_files import read_hf_folder
from mindspeed_lora.weights.sources import MegatronBase, open_adapter, open_base
from mindspeed_lora.weights.table import WeightTable
from mindspeed_lora.weights.torch_files import load_torch_file

DENSE = (
    "v1_qwen3_tp2pp2",
    "v1_qwen3_tp2pp1",
    "v1_qwen3_tp2pp2_vpp1",
    "v1_qwen3_tp1pp2_list13",
    "v1_llama3_tp2pp2",
    "v1_qwen25tied_tp2pp2",
    "v1_qwen25tied_tp2pp1_vocabpad128",
    "v2_qwen3_tp2pp2",
)
EXPERTS = ("v1_qwen3moe_tp2pp1ep2_gemm", "v1_mixtral_tp2pp1ep2", "v2_deepseek3_tp1pp1")


@pytest.mark.parametrize("case", [*DENSE, *EXPERTS])
def test_the_peer_s_checkpoint_equals_the_model_it_came_from(case: str) -> None:
    hf, mg = open_base(golden() / case / "input/hf"), open_base(golden() / case / "output/mg")
    assert hf.config is not None and mg.config is None
    table = WeightTable(hf.config)
    hf.check_coverage(table)
    mg.check_coverage(table)
    for row, layer in table.entries():
        for ours, theirs in zip(hf.parts(row, layer), mg.parts(row, layer), strict=True):
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), row.name(layer)
    assert hf.fingerprint() == mg.fingerprint(table)
    if case in EXPERTS:
        with pytest.raises(CheckpointError, match=r"put its config\.json there"):
            mg.fingerprint()
        return
    sizes = mg.model_config
    assert sizes.rotary_base is None, "the args of a V1 checkpoint do not know the rotary base"
    assert (sizes.family, sizes.num_query_groups, sizes.kv_channels) == (
        hf.config.family,
        hf.config.num_query_groups,
        hf.config.kv_channels,
    )


def test_the_fingerprint_sees_a_changed_tensor_and_a_changed_dtype(tmp_path: Path) -> None:
    folder = tiny_qwen3(tmp_path / "hf")
    before = open_base(folder).fingerprint()
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"][0, 0] += 1
    save_file(tensors, folder / "model.safetensors")
    changed = open_base(folder).fingerprint()
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, folder / "model.safetensors")
    assert len({before, changed, open_base(folder).fingerprint()}) == 3


def test_lora_values_come_from_args_only_with_targets() -> None:
    filtered = open_adapter(golden() / "v1lora_qwen3_tp2pp2_filter/input/lora")
    assert filtered.lora is not None and (filtered.lora.r, filtered.lora.alpha, filtered.iteration) == (8, 16.0, 20)
    assert not open_base(golden() / "v1_qwen3_tp2pp2/output/mg").unified
    unified = golden() / "v1lora_qwen3_tp1pp1_unified/input/lora"
    assert open_base(unified).unified and open_adapter(unified).lora == filtered.lora


def test_stories260k_opens() -> None:
    base = open_base(shared_data() / "stories260k/hf")
    assert base.config is not None and base.config.tied_embeddings and base.config.rotary_base == 10000.0
    base.check_coverage(WeightTable(base.config))


# A head kept though tied, dropped keys, several files.


def rewrite(folder: Path, **tensors: torch.Tensor) -> None:
    stored = load_file(folder / "model.safetensors")
    save_file({**stored, **tensors}, folder / "model.safetensors")


def test_a_head_kept_in_a_tied_file_is_accepted_only_as_a_copy(tmp_path: Path) -> None:
    folder = tiny_qwen3(tmp_path / "hf", tied=True)
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(folder, **{"lm_head.weight": embedding.clone(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    base = open_base(folder)
    assert base.config is not None
    base.check_coverage(WeightTable(base.config))
    rewrite(folder, **{"lm_head.weight": embedding + 1})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs"):
        open_base(folder).check_coverage(WeightTable(base.config))


def test_an_index_may_name_files_of_its_own_folder_only(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "hf")
    (folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="only files of this folder"):
        open_base(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda stored: stored.pop("model.layers.1.mlp.up_proj.weight"), "1 of 47 tensors are missing: model.layers.1.mlp.up_proj.weight"),
        (
            lambda stored: stored.update({"model.layers.0.mlp.router": torch.ones(1)}),
            "unknown to this model's weight table: model.layers.0",
        ),
        (lambda stored: stored.update({"model.norm.weight": torch.ones(3)}), r"model.norm.weight has shape \[3\]"),
    ],
)
def test_hf_files_that_do_not_fit_the_configuration(tmp_path: Path, damage: Any, message: str) -> None:
    folder = tiny_qwen3(tmp_path / "hf")
    stored = load_file(folder / "model.safetensors")
    damage(stored)
    save_file(stored, folder / "model.safetensors")
    base = open_base(folder)
    assert base.config is not None
    with pytest.raises(CheckpointError, match=message.replace("47", str(len(WeightTable(base.config).hf_keys())))):
        base.check_coverage(WeightTable(base.config))


def test_truncated_and_foreign_files(tmp_path: Path) -> None:
    folder = tiny_qwen3(tmp_path / "hf")
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-100])
    with pytest.raises(CheckpointError, match="it is truncated"):
        open_base(folder)
    file.write_bytes(b"hello")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        open_base(folder)
    file.unlink()
    (folder / "consolidated.00.pth").write_bytes(b"")
    with pytest.raises(CheckpointError, match="safe_serialization=True"):
        open_base(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="not a complete torch checkpoint"):
        open_base(folder)
    with pytest.raises(CheckpointError, match="no such folder"):
        open_base(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="neither a Hugging Face folder"):
        open_base(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="neither a PEFT adapter"):
        open_adapter(tmp_path / "empty")


def copy_of(case: str, target: Path) -> Path:
    return Path(shutil.copytree(golden() / case / "output/mg", target))


def test_megatron_folders_with_something_missing(tmp_path: Path) -> None:
    folder = copy_of("v1_qwen3_tp2pp2", tmp_path / "mg")
    rank = folder / "iter_0000001/mp_rank_01_001"
    file = rank / "model_optim_rng.pt"
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="truncated"):
        open_base(folder).check_coverage(WeightTable(open_base(golden() / "v1_qwen3_tp2pp2/input/hf").model_config))
    shutil.rmtree(rank)
    with pytest.raises(CheckpointError, match="tensor rank 1, pipeline rank 1 of 2 x 2 is missing"):
        open_base(folder)
    shutil.rmtree(folder / "iter_0000001/mp_rank_00_001")  # the whole last stage: only args know of it
    with pytest.raises(CheckpointError, match="tensor rank 0, pipeline rank 1 of 2 x 2 is missing"):
        open_base(folder)
    (folder / "latest_checkpointed_iteration.txt").write_text("7")
    with pytest.raises(CheckpointError, match="iter_0000007: missing"):
        open_base(folder)
    (folder / "latest_checkpointed_iteration.txt").write_text("soon")
    with pytest.raises(CheckpointError, match="expected an iteration number"):
        open_base(folder)
    with pytest.raises(CheckpointError, match="holds LoRA tensors only"):
        open_base(golden() / "v1lora_qwen3_tp2pp2_filter/input/lora")


def test_files_of_two_iterations_are_not_one_checkpoint(tmp_path: Path) -> None:
    table = WeightTable(open_base(golden() / "v1_qwen3_tp2pp2/input/hf").model_config)
    for source, opened in (
        (golden() / "v1_qwen3_tp2pp2/output/mg", open_base),
        (golden() / "v1lora_qwen3_tp2pp2_filter/input/lora", open_adapter),
    ):
        folder = Path(shutil.copytree(source, tmp_path / opened.__name__))
        opened(folder).check_coverage(table)
        (file,) = folder.glob("iter_*/mp_rank_01_001/model_optim_rng.pt")
        content = load_torch_file(file)
        torch.save({**content, "args": None, "iteration": content["iteration"] + 1}, tmp_path / "changed")
        (tmp_path / "changed").replace(file)
        with pytest.raises(CheckpointError, match=r"mp_rank_01_001.*is of iteration (\d+), the folder's first file of (\d+); files of two"):
            opened(folder).check_coverage(table)


def test_a_layer_missing_in_the_middle_is_not_closed_up(tmp_path: Path) -> None:
    model = load_torch_file(golden() / "v1_qwen3_tp2pp1/output/mg/iter_0000001/mp_rank_00/model_optim_rng.pt")["model"]
    save_rank(tmp_path, {"model": {name: value for name, value in model.items() if ".layers.1." not in name}})
    with pytest.raises(CheckpointError, match="layer 1 is missing"):
        open_base(tmp_path)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_legacy_bin_folder_is_the_same_model(shards: int, tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "hf")
    before = open_base(folder).fingerprint()
    tensors = {**load_file(folder / "model.safetensors"), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    (folder / "model.safetensors").unlink()
    names = [f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin" for i in range(shards)] if shards > 1 else ["pytorch_model.bin"]
    weight_map = {key: names[i % shards] for i, key in enumerate(tensors)}
    for name in names:
        torch.save(collections.OrderedDict((key, tensor) for key, tensor in tensors.items() if weight_map[key] == name), folder / name)
    if shards > 1:
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    base = open_base(folder)
    base.check_coverage(WeightTable(base.model_config))
    assert base.kind == "hf" and base.fingerprint() == before
    proof = tmp_path / "it_ran"
    torch.save({"a": Runs(f"touch {proof}")}, folder / names[0])
    with pytest.raises(CheckpointError, match="nothing of it was run"):
        open_base(folder)
    assert not proof.exists()


# Configurations.

LLAMA = dict(
    model_type="llama",
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=10,
    rms_norm_eps=1e-5,
)


def test_rope_of_both_generations_of_config_json() -> None:
    llama3 = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    old = model_config_from_dict({**LLAMA, "rope_theta": 500000.0, "rope_scaling": llama3})
    new = model_config_from_dict({**LLAMA, "rope_parameters": {**llama3, "rope_theta": 500000.0}})
    assert old == new and old.rope_scaling is not None and old.rope_scaling["rope_type"] == "llama3" and old.rotary_base == 500000.0
    legacy = model_config_from_dict({**LLAMA, "rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}})
    assert legacy.rope_scaling is not None and legacy.rope_scaling["rope_type"] == "linear"
    plain = model_config_from_dict({**LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}})
    assert plain.rope_scaling is None and plain.rotary_base == 7.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"num_key_value_heads": 3}, "no multiple of num_key_value_heads"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"use_sliding_window": True, "sliding_window": 128}, "use_sliding_window is on"),
    ],
)
def test_configurations_that_are_not_computed_here(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        model_config_from_dict({**LLAMA, **change})


def test_a_mistral_that_names_no_window_has_that_of_transformers() -> None:
    mistral = {**LLAMA, "model_type": "mistral"}
    assert model_config_from_dict(mistral).sliding_window == 4096
    assert model_config_from_dict({**mistral, "sliding_window": None}).sliding_window is None
    assert model_config_from_dict({**mistral, "sliding_window": 7}).sliding_window == 7
    assert model_config_from_dict({**LLAMA, "sliding_window": 7}).sliding_window is None


def test_model_type_hf_names_a_layout() -> None:
    llama = model_config_from_dict(LLAMA)
    qwen2 = model_config_from_dict({**LLAMA, "model_type": "qwen2"})
    assert qwen2.qkv_bias
    for config in (llama, qwen2):
        check_model_type("llama2", config)
        check_model_type(None, config)
        with pytest.raises(UsageError, match="--model-type-hf qwen3 does not fit"):
            check_model_type("qwen3", config)


@pytest.mark.parametrize("stored", [1, 2, 4])
def test_a_rank_reads_its_own_bytes_of_a_megatron_folder(stored: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the files' cut: every byte of a cut tensor is read once over all ranks, and each rank gets what the table cuts."""
    hf = tiny_qwen3(tmp_path / "hf")
    run_convert("hf", "mg", hf, tmp_path / "mg", target_tensor_parallel_size=stored, hf_cfg_dir=hf)
    base, whole = open_base(tmp_path / "mg"), open_base(hf)
    assert isinstance(base, MegatronBase)
    read: list[int] = []
    monkeypatch.setattr(base.folder, "note_read", lambda tensors: read.append(sum(tensor.nbytes for tensor in tensors)))
    table = WeightTable(replace(whole.model_config, padded_vocab_size=328))  # more than the files': padding of its own
    for row, layer in table.entries():
        parts = whole.parts(row, layer)
        for tp_size in (1, 2, 4):
            read.clear()
            for tp_rank in range(tp_size):
                assert torch.equal(base.shard(table, row, layer, tp_rank, tp_size), table.shard(row, parts, tp_rank, tp_size)), row.megatron
            padding = parts[0][0].nbytes if row.padded else 0  # the last row, once more
            if row.axis is not None:
                assert sum(read) == sum(part.nbytes for part in parts) + padding, row.megatron


def test_the_folder_above_an_adapter_names_it(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("3")
    with pytest.raises(CheckpointError, match=r"give one of its folders: \S+run$"):
        open_adapter(tmp_path)


def test_a_model_with_a_missing_shard_names_index_and_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}')
    with pytest.raises(CheckpointError, match=r"index\.json: names b\.safetensors, which is not there"):
        read_hf_folder(tmp_path)
