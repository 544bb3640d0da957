"""Going on with an adapter that peft wrote, whose linears have their own A, r and alpha: as peft and torch train it, at any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from peft_helpers import CASES, load_peft, make_adapter
from pool import ProcessPool
from safetensors.torch import load_file
from training_helpers import change, losses, make_config, make_workspace, metrics, run_training

from mindspeed_lora.arguments.configs import LoraFlags, TrainConfig
from mindspeed_lora.checkpoint.resume_reader import read_index
from mindspeed_lora.data.sft_dataset import open_sft_dataset
from mindspeed_lora.errors import UsageError
from mindspeed_lora.manifest import read_manifest
from mindspeed_lora.weights.lora_blocks import adapted_entries, block_masks
from mindspeed_lora.weights.sources import open_adapter, open_base
from mindspeed_lora.weights.table import WeightTable

HARDEST = "per-module r and alpha"
STEPS, STOP = 6, 3
SMOOTH = {"optimizer__adam_eps": 1e-3, "data__shuffle": False}  # with a tiny epsilon Adam turns rounding into whole steps
CONSTANT = {"optimizer__lr_decay_style": "constant", "optimizer__lr_warmup_iters": 0}
TP2_PP2 = {
    "parallel__tensor_parallel_size": 2,
    "parallel__pipeline_parallel_size": 2,
    "parallel__sequence_parallel": True,
    "optimizer__use_distributed_optimizer": True,
}

PP2 = {"parallel__pipeline_parallel_size": 2}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_workspace(tmp_path_factory.mktemp("adapters"))
    for case in (HARDEST, "one layer"):
        make_adapter(folder / "model", folder / case, size=0.1, **CASES[case])
    return folder


def config_of(workspace: Path, case: str, save: Path, **changes: Any) -> TrainConfig:
    changes = {"train_iters": STEPS, "lora": LoraFlags(fusion=True), "load__finetune": True, **SMOOTH, **changes}
    return make_config(workspace, load__lora_load=workspace / case, save__save=save, **changes)


def exported(save: Path, iteration: int = STEPS) -> dict[str, torch.Tensor]:
    return load_file(save / f"iter_{iteration:07d}/peft/adapter_model.safetensors")


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def peft_trained(workspace: Path, case: str, config: TrainConfig) -> dict[str, torch.Tensor]:
    """The adapter after the same steps by transformers, peft and torch.optim.AdamW."""
    model = load_peft(workspace / "model", workspace / case, trainable=True)
    parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
    flags, dataset = config.optimizer, open_sft_dataset(workspace / "data" / "set")
    betas = (flags.adam_beta1, flags.adam_beta2)
    adam = torch.optim.AdamW(parameters.values(), flags.lr, betas, flags.adam_eps, flags.weight_decay)
    for step in range(config.train_iters):
        samples = [[torch.from_numpy(each) for each in dataset[8 * step + row]] for row in range(8)]
        tokens = sum(int((labels[1:] != -100).sum()) for _, labels in samples)
        for ids, labels in samples:
            logits = model(input_ids=ids[None]).logits[0, :-1]
            (torch.nn.functional.cross_entropy(logits, labels[1:].long(), reduction="sum") / tokens).backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), flags.clip_grad)
        adam.step()
        adam.zero_grad()
    return {name.replace(".default", ""): each.detach() for name, each in parameters.items()}


@pytest.mark.parametrize(
    ("case", "world_size", "layout"), [(HARDEST, 4, TP2_PP2), ("one layer", 2, {"parallel__pipeline_parallel_size": 2})]
)
def test_training_is_what_peft_and_torch_do(
    pool: ProcessPool, workspace: Path, tmp_path: Path, case: str, world_size: int, layout: dict[str, Any]
) -> None:
    config = config_of(workspace, case, tmp_path / "save", train_iters=3, **CONSTANT, **layout)
    pool.run(run_training, world_size, config)
    expected = peft_trained(workspace, case, config)
    found, before = exported(tmp_path / "save", 3), load_file(workspace / case / "adapter_model.safetensors")
    assert found.keys() == before.keys() and all(found[name].shape == tensor.shape for name, tensor in before.items())
    assert all(not torch.equal(found[name], tensor) for name, tensor in before.items()), "everything was trained"
    assert_close(found, expected)


def off_block_state(folder: Path, save: Path, model: Path) -> dict[str, float]:
    """Largest element outside the blocks of each saved B and of its two moments."""
    table, adapter = WeightTable(open_base(model).model_config), open_adapter(save)
    assert adapter.lora is not None and adapter.lora.modules
    sizes = {name: tuple(entry.size) for name, entry in read_index(folder).state_dict_metadata.items() if hasattr(entry, "size")}
    largest: dict[str, float] = {}
    for row, layer, module in adapted_entries(table, adapter.lora):
        masks, b_row = block_masks(row, module), table.lora_pair(row)[1]
        for kind in ("master", "exp_avg", "exp_avg_sq") if masks else ():
            key = f"{kind}.{b_row.name(layer)}"
            wanted = {key: torch.empty(sizes[key])}
            dcp.load(wanted, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
            outside = ~table.fuse(b_row, masks or [], 1).view(sizes[key])
            assert wanted[key].abs().max() > 0 and outside.any()
            largest[key] = float(wanted[key][outside].abs().max())
    return largest


def test_stop_and_resume_on_another_layout(pool: ProcessPool, workspace: Path, tmp_path: Path) -> None:
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    pool.run(run_training, 1, config_of(workspace, HARDEST, whole))
    pool.run(run_training, 4, config_of(workspace, HARDEST, parted, train_iters=STOP, **TP2_PP2))
    resumed = change(
        config_of(workspace, HARDEST, parted, parallel__pipeline_parallel_size=2), load__lora_load=parted, load__finetune=False
    )
    text = pool.run(run_training, 2, resumed)[0]
    assert "16 linears with r and alpha of their own, 8 of them with an A for each of their parts" in text
    assert losses(parted) == pytest.approx(losses(whole), rel=1e-5)
    assert_close(exported(parted), exported(whole))
    largest = off_block_state(parted / f"iter_{STEPS:07d}/resume", parted, workspace / "model")
    assert len(largest) == 3 * 2 * 4 and set(largest.values()) == {0.0}
    manifest = read_manifest(parted / f"iter_{STEPS:07d}")
    assert manifest is not None and manifest.lora is not None
    assert manifest.lora["per_module"]["decoder.layers.1.mlp.linear_fc1"] == {"r": [4, 7], "alpha": [6.0, 6.0]}


def test_a_stage_may_hold_no_adapter(pool: ProcessPool, workspace: Path, tmp_path: Path) -> None:
    save, layout = tmp_path / "save", {"parallel__pipeline_parallel_size": 4}
    config = config_of(workspace, "one layer", save, train_iters=2, **layout)
    pool.run(run_training, 4, config)
    assert set(exported(save, 2)) == set(load_file(workspace / "one layer/adapter_model.safetensors"))
    pool.run(run_training, 2, change(config, load__lora_load=save, load__finetune=False, train_iters=3, **PP2))
    assert [record["iteration"] for record in metrics(save)] == [1, 2, 3]


def test_flags_that_disagree_are_refused(workspace: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--lora-r 16 contradicts --lora-load .*says r 4 \(and others in some of its linears\)"):
        run_training(config_of(workspace, HARDEST, tmp_path / "save", lora=LoraFlags(r=16)))
    assert not (tmp_path / "save").exists()
