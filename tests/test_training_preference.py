"""Training on preference pairs: losses and gradients equal those of transformers and TRL, at every layout."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_model
from layout_cells import LAYOUTS, Layout, Outcome, assemble, run_cell
from pool import ProcessPool
from preference_oracle import Pair, batch_loss
from training_helpers import change, make_config, make_workspace, run_training, write_pairs

from mindspeed_lora.arguments.configs import PreferenceFlags, TrainConfig
from mindspeed_lora.data.pairs import open_pair_dataset
from mindspeed_lora.training.preference import PreferenceLoss
from mindspeed_lora.weights.families import model_config_from_hf
from mindspeed_lora.weights.table import WeightTable

BATCH = 8
KINDS = ("sigmoid", "hinge", "ipo", "simpo", "orpo")
BETA = 0.3  # large enough that a forgotten or doubled reference shows


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy's model, another of the same shape, pairs, and an adapter whose B is not zero (``sft``)."""
    folder = make_workspace(tmp_path_factory.mktemp("preference"))
    make_model(folder / "other", "qwen3", seed=9)
    write_pairs(folder / "data" / "pairs")
    run_training(make_config(folder, train_iters=3, optimizer__lr=2e-2, optimizer__lr_warmup_iters=0, save__save=folder / "sft"))
    return folder


def preference_config(folder: Path, kind: str = "sigmoid", lora: bool = True, **changes: Any) -> TrainConfig:
    """One global batch of the first 8 pairs. LoRA: from the adapter, against the base; full: ``model`` against ``other``."""
    reference = None if kind in ("simpo", "orpo") else folder / ("model" if lora else "other")
    config = make_config(
        folder,
        stage="dpo",
        preference=PreferenceFlags(kind, BETA, ref_model=reference),
        data__data_path=str(folder / "data" / "pairs"),
        data__shuffle=False,
        optimizer__clip_grad=0.0,
        global_batch_size=BATCH,
        micro_batch_size=2,
    )
    if lora:
        config = change(config, load__lora_load=folder / "sft", load__finetune=True)
    return change(dataclasses.replace(config, lora=config.lora if lora else None), **changes)


def first_pairs(folder: Path, count: int = BATCH) -> list[Pair]:
    rows = open_pair_dataset(folder / "data" / "pairs", 32).rows
    side = lambda row: tuple(torch.from_numpy(column[row].astype("int64")) for column in (rows.input_ids, rows.labels))  # noqa: E731
    return [(side(2 * pair), side(2 * pair + 1)) for pair in range(count)]


def policy_and_reference(folder: Path, lora: bool) -> tuple[Any, Any]:
    """transformers' (and PEFT's) model, and a context manager that gives the reference."""
    import peft
    import transformers

    policy = transformers.AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    if not lora:
        return policy, contextlib.nullcontext(transformers.AutoModelForCausalLM.from_pretrained(folder / "other").eval())
    policy = peft.PeftModel.from_pretrained(policy, folder / "sft" / "iter_0000003" / "peft", is_trainable=True)

    class WithoutAdapter:
        def __enter__(self) -> Any:
            self.context = policy.disable_adapter()
            self.context.__enter__()
            return policy

        def __exit__(self, *_: Any) -> None:
            self.context.__exit__(None, None, None)

    return policy, WithoutAdapter()


def oracle_gradients(model: Any, table: WeightTable, lora: bool) -> dict[str, torch.Tensor]:
    """By the names that ``assemble`` gives ours."""
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    gradients = {}
    if not lora:
        for row, layer in table.entries():
            for index, name in enumerate(row.hf_names(layer)):
                gradients[f"{row.name(layer)}[{index}]"] = found[name]
        return gradients
    for row, layer in table.target_entries(("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")):
        stem = row.name(layer).removesuffix("weight")
        parts = ["base_model.model." + name.removesuffix("weight") for name in row.hf_names(layer)]
        gradients[f"{stem}lora_A.default.weight[0]"] = sum(found[f"{part}lora_A.default.weight"] for part in parts)  # one A serves all
        for index, part in enumerate(parts):
            gradients[f"{stem}lora_B.default.weight[{index}]"] = found[f"{part}lora_B.default.weight"]
    return gradients


def check(outcomes: list[Outcome], folder: Path, loss: float, gradients: dict[str, torch.Tensor]) -> None:
    assert outcomes[0].losses == pytest.approx([loss], rel=1e-5)
    table = WeightTable(model_config_from_hf(folder / "model"))
    got = assemble(outcomes, table, "gradients")
    assert got.keys() == gradients.keys()
    size = max(float(value.abs().max()) for value in gradients.values())
    assert size > 1e-3
    for name, value in gradients.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5 * size, msg=lambda text, name=name: f"{name}: {text}")


def layout_changes(layout: Layout) -> dict[str, Any]:
    return {
        "parallel__tensor_parallel_size": layout.tp,
        "parallel__pipeline_parallel_size": layout.pp,
        "parallel__sequence_parallel": layout.sp,
        "parallel__layers_per_virtual_stage": layout.virtual,
        "micro_batch_size": min(2, layout.most_rows),
    }


NAMED = {layout.name: layout for layout in LAYOUTS}
CELLS = [
    *((kind, True, "tp1") for kind in KINDS),
    *((kind, False, "tp1") for kind in ("sigmoid", "ipo", "orpo")),
    *(("sigmoid", lora, name) for lora in (True, False) for name in ("tp2pp2", "pp2vpp2")),
    ("ipo", True, "tp2pp2"),
    ("sigmoid", True, "dp2"),
]


@pytest.mark.parametrize(("kind", "lora", "layout"), CELLS)
def test_losses_and_gradients_equal_the_formula_on_transformers(
    pool: ProcessPool, workspace: Path, kind: str, lora: bool, layout: str
) -> None:
    policy, reference = policy_and_reference(workspace, lora)
    loss, _ = batch_loss(kind, first_pairs(workspace), policy, reference, BETA)
    loss.backward()
    config = preference_config(workspace, kind, lora, **layout_changes(NAMED[layout]))
    outcomes = pool.run(run_cell, NAMED[layout].world_size, config, 1)
    table = WeightTable(model_config_from_hf(workspace / "model"))
    check(outcomes, workspace, float(loss.detach()), oracle_gradients(policy, table, lora))


TRL_CELLS = [
    ("sigmoid", True, "tp1"),
    ("sigmoid", False, "tp1"),
    ("sigmoid", True, "tp2pp2"),
    ("sigmoid", False, "tp2pp2"),
    ("hinge", True, "tp1"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "lora", "layout"), [*TRL_CELLS, ("ipo", True, "tp1")])
def test_losses_and_gradients_equal_trl(pool: ProcessPool, workspace: Path, tmp_path: Path, kind: str, lora: bool, layout: str) -> None:
    trl = pytest.importorskip("trl", reason="pip install --no-deps trl")
    datasets = pytest.importorskip("datasets")
    import transformers

    pairs = first_pairs(workspace)
    columns: dict[str, list[Any]] = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": []}
    for (chosen, labels), (rejected, _) in pairs:
        prompt = int((labels == -100).sum())
        for name, ids in (("prompt_ids", chosen[:prompt]), ("chosen_ids", chosen[prompt:]), ("rejected_ids", rejected[prompt:])):
            columns[name].append(ids.tolist())
    policy, reference = policy_and_reference(workspace, lora)
    arguments = trl.DPOConfig(
        output_dir=str(tmp_path),
        loss_type=[kind],
        beta=BETA,
        use_cpu=True,
        report_to=[],
        max_length=None,
        bf16=False,
        gradient_checkpointing=False,
    )

    class Tokenized(trl.DPOTrainer):  # type: ignore[misc, name-defined]
        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    trainer = Tokenized(
        model=policy,
        ref_model=None if lora else reference.enter_result,
        args=arguments,
        train_dataset=datasets.Dataset.from_dict(columns),
        processing_class=transformers.AutoTokenizer.from_pretrained(workspace / "model"),
    )
    if lora:  # TRL would take the loaded adapter's first values; ours is told to take the base
        policy.delete_adapter("ref")
    rows = [{name: columns[name][number] for name in columns} for number in range(BATCH)]
    loss = trainer.compute_loss(policy, trainer.data_collator(rows))
    loss.backward()
    config = preference_config(workspace, kind, lora, **layout_changes(NAMED[layout]))
    outcomes = pool.run(run_cell, NAMED[layout].world_size, config, 1)
    table = WeightTable(model_config_from_hf(workspace / "model"))
    check(outcomes, workspace, float(loss.detach()), oracle_gradients(policy, table, lora))


def test_values_of_two_pairs_by_hand() -> None:
    """Chosen -1 against -3, rejected -2 against -1; then chosen -4 against -2, rejected -5 against -4; a third pair does not count."""
    loss = PreferenceLoss(PreferenceFlags(beta=0.5))
    policy = torch.tensor([1.0, 4.0, 0.0, 2.0, 5.0, 0.0])
    reference = torch.tensor([3.0, 2.0, 0.0, 1.0, 4.0, 0.0])
    tokens = torch.tensor([2.0, 2.0, 0.0, 2.0, 2.0, 3.0])
    targets = torch.stack([reference, tokens, torch.full((6,), 0.5)], dim=1)
    values = loss.values(policy, targets).tolist()
    expected = [(math.log1p(math.exp(-1.5)) + math.log1p(math.exp(0.5))) / 2, 0.5, (1.0 - 1.0) / 2, (-0.5 - 0.5) / 2, (1.5 - 0.5) / 2]
    assert values == pytest.approx(expected)
    assert float(loss(policy, targets)) == pytest.approx(expected[0])
    first_only = loss.values(policy[[0, 3]], targets[[0, 3]]).tolist()
    assert first_only[1] == 0.5, "the chosen answer's reward 1.0 is above the rejected one's -0.5: the whole weight of the pair"
