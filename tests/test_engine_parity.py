"""Our model against transformers and PEFT: logits and LoRA gradients, in one process and at every small layout."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_helpers import SPEC, Engine, batch, build_engine, peft_twin, reference_loss, twin_gradients
from helpers import make_model, weights_in

from mindspeed_lora.checkpoint.load import base_name
from mindspeed_lora.model.decode import DecodeState, KVCache
from mindspeed_lora.parallel.context import build_context
from mindspeed_lora.parallel.pipeline import PipelineRunner, forward_through_stages, sum_of_rows

MODELS = {
    "qwen3": ("qwen3", {}),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True}),
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": 5}),
    "llama3-rope": (
        "llama",
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
}
LAYOUTS = {"TP1": (1, 1, False), "TP2": (2, 1, False), "TP2-SP": (2, 1, True), "PP2": (1, 2, False), "TP2-PP2": (2, 2, True)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: make_model(root / name, family, **changes) for name, (family, changes) in MODELS.items()}


def _reference_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **weights_in(torch.float32)).eval()


def _forward_cell(folder: Path, tp_size: int, pp_size: int) -> torch.Tensor | None:
    engine = build_engine(folder, build_context(torch.device("cpu"), tp_size, pp_size))
    ids = batch()[0]
    positions = torch.arange(ids.shape[1]).unsqueeze(0)
    with torch.no_grad():
        logits = forward_through_stages(engine.stages, engine.context, ids, decode=DecodeState(positions))
        return None if logits is None else engine.stages[-1].gather_logits(logits)


def _gradient_cell(folder: Path, tp_size: int, pp_size: int, sequence_parallel: bool, fusion: bool) -> dict[str, Any]:
    from mindspeed_lora.parallel.collectives import all_reduce

    engine = build_engine(folder, build_context(torch.device("cpu"), tp_size, pp_size, sequence_parallel), SPEC, fusion)
    loss = PipelineRunner(engine.stages, engine.context).forward_backward(*batch(), micro_batch_size=1).sum()
    gradients = {}
    for stage in engine.stages:
        for name, parameter in stage.named_parameters():
            if parameter.requires_grad:
                row = engine.table.lora_row(name)
                assert parameter.grad is not None, name
                if row.grad_sum == "always" or (row.grad_sum == "sp" and sequence_parallel):
                    all_reduce(parameter.grad, engine.context.tp_group)
                gradients[name] = (parameter.grad, row.axis, engine.context.tp_rank)
    return {"loss": loss, "gradients": gradients}


def _whole_gradients(results: list[dict[str, Any]], engine: Engine) -> dict[str, torch.Tensor]:
    shards: dict[str, dict[int, torch.Tensor]] = {}
    for result in results:
        for name, (gradient, _axis, tp_rank) in result["gradients"].items():
            shards.setdefault(name, {})[tp_rank] = gradient
    whole = {}
    for name, by_rank in shards.items():
        ordered = [by_rank[rank] for rank in sorted(by_rank)]
        row = engine.table.lora_row(name)
        if row.axis is None:
            assert all(torch.equal(part, ordered[0]) for part in ordered), f"{name} differs between tp ranks"
        whole[name] = torch.cat(engine.table.unshard(row, ordered))
    return whole


@pytest.mark.parametrize("model", MODELS)
def test_logits_equal_transformers(folders: dict[str, Path], model: str) -> None:
    engine = build_engine(folders[model])
    ids = batch()[0]
    expected = _reference_model(folders[model])(input_ids=ids).logits
    torch.testing.assert_close(engine.stages[0](ids), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", list(LAYOUTS)[1:])
@pytest.mark.parametrize("model", ["qwen3", "llama-tied"])
def test_logits_at_each_layout(pool: Any, folders: dict[str, Path], model: str, layout: str) -> None:
    tp_size, pp_size, _ = LAYOUTS[layout]
    expected = _reference_model(folders[model])(input_ids=batch()[0]).logits
    results = pool.run(_forward_cell, tp_size * pp_size, folders[model], tp_size, pp_size)
    for logits in results[-tp_size:]:
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "layout", "fusion"),
    [
        *itertools.product(["qwen3", "llama-tied"], LAYOUTS, [False, True]),
        *itertools.product(["qwen2", "mistral", "llama3-rope"], ["TP1", "TP2-PP2"], [True]),
    ],
)
def test_lora_gradients_equal_peft(pool: Any, folders: dict[str, Path], model: str, layout: str, fusion: bool) -> None:
    tp_size, pp_size, sequence_parallel = LAYOUTS[layout]
    engine = build_engine(folders[model])
    twin = peft_twin(_reference_model(folders[model]), engine.table)
    expected = twin_gradients(twin, engine.table)
    results = pool.run(_gradient_cell, tp_size * pp_size, folders[model], tp_size, pp_size, sequence_parallel, fusion)
    assert results[-1]["loss"].item() == pytest.approx(reference_loss(twin).item(), rel=1e-5)
    got = _whole_gradients(results, engine)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert value.abs().max() > 1e-4, f"{name}: the reference gradient is too small to prove anything"
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_full_gradients_equal_transformers(folders: dict[str, Path]) -> None:
    for model in ("qwen3", "qwen3-tied"):
        engine, reference = build_engine(folders[model]), _reference_model(folders[model])
        reference_loss(reference).backward()
        expected = {name: parameter.grad for name, parameter in reference.named_parameters()}
        PipelineRunner(engine.stages, engine.context).forward_backward(*batch(), micro_batch_size=2)
        for name, parameter in engine.stages[0].named_parameters():
            row, layer = engine.table.parse(name)
            for hf_name, part in zip(row.hf_names(layer), engine.table.unfuse(row, parameter.grad, 1), strict=True):
                torch.testing.assert_close(part, expected[hf_name], rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("model", ["qwen3", "mistral"])
def test_cached_decoding_equals_the_whole_pass(folders: dict[str, Path], model: str) -> None:
    engine = build_engine(folders[model])
    ids = batch(rows=2, length=12)[0]
    whole = engine.stages[0](ids)
    cache, pieces = KVCache(), []
    with torch.no_grad():
        for start, end in ((0, 5), (5, 6), (6, 9), (9, 12)):
            positions = torch.arange(start, end).unsqueeze(0)
            pieces.append(engine.stages[0](ids[:, start:end], decode=DecodeState(positions, cache=cache)))
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-5, atol=1e-5)


def _fill_drain_cell(folder: Path, layers_per_virtual_stage: int | None) -> list[float]:
    """Norms of the gradients and the loss, by the library's schedule and by the plain one."""
    from mindspeed_lora.parallel.fill_drain import fill_drain

    engine = build_engine(folder, build_context(torch.device("cpu"), 1, 2), SPEC, True, layers_per_virtual_stage=layers_per_virtual_stage)
    ids, labels, weights = batch()
    runner, outcomes = PipelineRunner(engine.stages, engine.context), []
    trained = [parameter for stage in engine.stages for parameter in stage.parameters() if parameter.requires_grad]
    for plain in (False, True):
        for parameter in trained:
            parameter.grad = None
        inputs = {"labels": labels, "row_weights": weights}
        loss = (
            fill_drain(engine.stages, engine.context, ids, inputs, 1, sum_of_rows, weights)
            if plain
            else runner.forward_backward(ids, labels, weights, 1)
        ).sum()
        outcomes.append([loss.item(), *(parameter.grad.norm().item() for parameter in trained if parameter.grad is not None)])
    assert len(outcomes[0]) == len(trained) + 1
    assert outcomes[0] == pytest.approx(outcomes[1], rel=1e-6)
    return outcomes[1]


@pytest.mark.parametrize("layers_per_virtual_stage", [None, 1])
def test_plain_schedule_equals_the_librarys(pool: Any, folders: dict[str, Path], layers_per_virtual_stage: int | None) -> None:
    results = pool.run(_fill_drain_cell, 2, folders["qwen3"], layers_per_virtual_stage)
    assert results[0][0] == 0.0 and results[1][0] > 0.0


def _packed_cell(folder: Path, tp_size: int, pp_size: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and LoRA gradients of two rows that hold documents of 5, 7 and 9, 3 tokens (and padding)."""
    engine = build_engine(folder, build_context(torch.device("cpu"), tp_size, pp_size, tp_size > 1), SPEC, True)
    ids, labels, ends = _packed_rows()
    loss = PipelineRunner(engine.stages, engine.context).forward_backward(ids, labels, torch.ones(2), 1, ends).sum()
    named = [pair for stage in engine.stages for pair in stage.named_parameters() if pair[1].requires_grad]
    return loss.item(), {
        name: parameter.grad for name, parameter in named if ".lora_B." in name and engine.table.lora_row(name).axis is None
    }


def _packed_rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids, labels = batch(rows=2, length=16)[0], torch.full((2, 16), -100)
    ends = torch.tensor([[5, 12, 16], [9, 12, 16]], dtype=torch.int32)
    for row, (first, second, _) in enumerate(ends.tolist()):
        for start, end in ((0, first), (first, second)):
            labels[row, start : end - 1] = ids[row, start + 1 : end]
    return ids, labels, ends


@pytest.mark.parametrize(("model", "layout"), [("qwen3", "TP1"), ("qwen3", "PP2"), ("qwen3", "TP2-PP2"), ("mistral", "TP1")])
def test_packed_documents_equal_separate_ones(pool: Any, folders: dict[str, Path], model: str, layout: str) -> None:
    """Documents of a row never see each other: loss and gradients are those of the documents one by one."""
    tp_size, pp_size, _ = LAYOUTS[layout]
    alone = build_engine(folders[model], lora=SPEC, fusion=True)
    ids, labels, ends = _packed_rows()
    runner, expected = PipelineRunner(alone.stages, alone.context), 0.0
    for row, bounds in enumerate([[0, *row_ends] for row_ends in ends.tolist()]):
        for start, end in ((bounds[0], bounds[1]), (bounds[1], bounds[2])):
            expected += (
                runner.forward_backward(ids[row : row + 1, start:end], labels[row : row + 1, start:end], torch.ones(1), 1).sum().item()
            )
    gradients = dict(alone.stages[0].named_parameters())
    results = pool.run(_packed_cell, tp_size * pp_size, folders[model], tp_size, pp_size)
    assert results[-1][0] == pytest.approx(expected, rel=1e-5)
    for _, named in results if tp_size == 1 else []:
        assert named
        for name, gradient in named.items():
            torch.testing.assert_close(gradient, gradients[name].grad, rtol=1e-5, atol=1e-5)


def test_adapters_off_is_the_base(folders: dict[str, Path]) -> None:
    from mindspeed_lora.lora.layers import ParallelLoraLinear

    engine, base = build_engine(folders["qwen3"], lora=SPEC), build_engine(folders["qwen3"])
    ids = batch()[0]
    assert not torch.allclose(engine.stages[0](ids), base.stages[0](ids), atol=1e-3)
    for module in copy.copy(list(engine.stages[0].modules())):
        if isinstance(module, ParallelLoraLinear):
            module.enable_adapters(False)
    assert torch.equal(engine.stages[0](ids), base.stages[0](ids))


def test_base_name() -> None:
    assert base_name("decoder.layers.3.mlp.linear_fc1.lora_A.default.weight") == "decoder.layers.3.mlp.linear_fc1.weight"
