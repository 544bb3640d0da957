"""Weights held on demand: the same bits as a resident base, at every product of layouts, with only a part of it at rest."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_helpers import SPEC, Engine, batch, build_engine
from helpers import make_model
from pool import ProcessPool
from torch.utils.checkpoint import set_checkpoint_early_stop

from mindspeed_lora.arguments.configs import RecomputeFlags
from mindspeed_lora.parallel.context import ParallelContext, build_context, single_process_context
from mindspeed_lora.parallel.on_demand import BaseStorage, Plain
from mindspeed_lora.parallel.pipeline import PipelineRunner
from mindspeed_lora.weights.sources import open_base
from mindspeed_lora.weights.table import WeightTable

UNIFORM, PAIRS, BLOCK = RecomputeFlags("full", "uniform", 1), RecomputeFlags("full", "uniform", 2), RecomputeFlags("full", "block", 1)
CELLS = {  # (processes, tp, pp, sequence parallel, layers per virtual stage, recomputation, fusion)
    "dp2": (2, 1, 1, False, None, RecomputeFlags(), True),
    "dp2-unfused": (2, 1, 1, False, None, RecomputeFlags(), False),
    "dp2-uniform": (2, 1, 1, False, None, UNIFORM, True),
    "dp2-pairs-unfused": (2, 1, 1, False, None, PAIRS, False),
    "dp2-block": (2, 1, 1, False, None, BLOCK, True),
    "tp2-dp2-sp": (4, 2, 1, True, None, UNIFORM, True),
    "pp2-dp2": (4, 1, 2, False, None, UNIFORM, True),
    "pp2-vp2-dp2": (4, 1, 2, False, 1, RecomputeFlags(), True),
    "tp2-pp2-dp2": (8, 2, 2, False, None, PAIRS, True),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), "qwen3")


def gradients(engine: Engine, rank: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of two steps and an evaluation, and all gradients summed over the steps."""
    runner = PipelineRunner(engine.stages, engine.context)
    losses = []
    for step in range(2):
        ids, labels, weights = batch(rows=4, length=16, seed=10 * step + rank)
        losses.append(float(runner.forward_backward(ids, labels, weights, 2).sum()))
    ids, labels, weights = batch(rows=4, seed=77 + rank)
    losses.append(float(runner.row_losses(ids, labels, weights, 2).sum()))
    named = {name: parameter for stage in engine.stages for name, parameter in stage.named_parameters()}
    return losses, {name: parameter.grad for name, parameter in named.items() if parameter.grad is not None}


def compare(folder: Path, tp: int, pp: int, sp: bool, virtual: int | None, recompute: RecomputeFlags, fusion: bool) -> dict[str, Any]:
    """On a rank: a resident base and one cut over dp, side by side."""
    context = build_context(torch.device("cpu"), tp, pp, sp)

    def build(make_storage: Any) -> Engine:
        return build_engine(folder, context, SPEC, fusion, torch.float32, virtual, recompute, make_storage=make_storage)

    storages: list[BaseStorage] = []

    def sharded() -> BaseStorage:
        storages.append(BaseStorage(context, Plain(), True))
        return storages[-1]

    resident, on_demand = build(None), build(sharded)
    (expected, expected_grads), (found, found_grads) = (gradients(engine, context.dp_rank) for engine in (resident, on_demand))
    layers = [layer for storage in storages for layer in storage.layers]
    return {
        "losses": (expected, found),
        "unequal": [name for name, grad in expected_grads.items() if not torch.equal(grad, found_grads[name])],
        "gradients": len(expected_grads),
        "same names": expected_grads.keys() == found_grads.keys(),
        "held": sum(held.numel() for layer in layers for held in layer.holders),
        "whole": sum(weight.numel() for layer in layers for weight in layer.weights),
        "nan at rest": all(bool(weight.isnan().all()) for layer in layers for weight in layer.weights),
        "bytes at rest": sum(layer._whole.untyped_storage().nbytes() for layer in layers),
    }


FAST = ("dp2", "dp2-pairs-unfused", "tp2-dp2-sp", "pp2-vp2-dp2")


@pytest.mark.parametrize("name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CELLS])
def test_a_cut_base_gives_the_same_bits(pool: ProcessPool, folder: Path, name: str) -> None:
    processes, *cell = CELLS[name]
    for result in pool.run(compare, processes, folder, *cell):
        expected, found = result["losses"]
        assert found == expected and not any(math.isnan(value) for value in found)
        assert result["unequal"] == [] and result["same names"] and result["gradients"] > 0
        assert result["whole"] / 2 <= result["held"] <= result["whole"] / 2 + 8  # dp 2
        assert result["nan at rest"] and result["bytes at rest"] == 0


class Recorder(Plain):
    """Counts what it decodes."""

    def __init__(self) -> None:
        self.decoded: list[int] = []

    def decode(self, holders: Any, into: torch.Tensor) -> None:
        self.decoded.append(into.numel())
        super().decode(holders, into)


@pytest.mark.parametrize("early_stop", [True, False])  # without it a recomputed layer's forward runs to its end
@pytest.mark.parametrize(("recompute", "per_layer"), [(RecomputeFlags(), 2), (UNIFORM, 2), (PAIRS, 3)])
def test_each_layer_is_fetched_once_forward_and_once_backward(
    folder: Path, recompute: RecomputeFlags, per_layer: int, early_stop: bool
) -> None:
    """Recomputing a layer alone uses the fetch of its backward pass; of a group, all but the last are fetched once more."""
    codec = Recorder()
    context = single_process_context()
    engine = build_engine(folder, context, SPEC, True, recompute=recompute, make_storage=lambda: BaseStorage(context, codec, False))
    resident = build_engine(folder, context, SPEC, True, recompute=recompute)
    ids, labels, weights = batch()
    with set_checkpoint_early_stop(early_stop):
        for each in (engine, resident):
            PipelineRunner(each.stages, context).forward_backward(ids, labels, weights, 4)
    for (name, parameter), other in zip(engine.stages[0].named_parameters(), resident.stages[0].parameters(), strict=True):
        assert (parameter.grad is None) == (other.grad is None), name
        assert parameter.grad is None or torch.equal(parameter.grad, other.grad), name
    layers = len(engine.stages[0].decoder.layers)
    assert len(codec.decoded) == (layers * per_layer if per_layer == 2 else layers * 2 + layers // 2)


def test_at_most_two_layers_are_whole_at_a_time(folder: Path) -> None:
    """One that computes, and while the backward pass moves on, the one that it comes from."""
    context = single_process_context()
    storage = BaseStorage(context, Plain(), False)
    engine = build_engine(folder, context, SPEC, True, make_storage=lambda: storage)
    most = 0

    def count(*_: Any) -> None:
        nonlocal most
        most = max(most, sum(layer._filled for layer in storage.layers))

    for module in engine.stages[0].modules():
        module.register_forward_hook(count)
    for layer in storage.layers:
        original = layer.fill
        layer.fill = lambda original=original: (original(), count())[0]  # type: ignore[method-assign, misc]
    ids, labels, weights = batch()
    PipelineRunner(engine.stages, context).forward_backward(ids, labels, weights, 4)
    assert most == 1


def gathered_meanwhile(folder: Path) -> tuple[list[bool], list[bool]]:
    """On a rank: whether a layer's gather had been started when its neighbour computed, forward and backward."""
    context = build_context(torch.device("cpu"), 1, 1, False)
    storage = BaseStorage(context, Plain(), True)
    engine = build_engine(folder, context, SPEC, True, make_storage=lambda: storage)
    forward, backward = [], []

    def started(index: int) -> bool:
        return storage.layers[index]._gathering is not None

    modules = list(engine.stages[0].decoder.layers.values())
    for index, module in enumerate(modules[:-1]):
        module.mlp.register_forward_hook(lambda *_, index=index: forward.append(started(index + 1)))
    for index, module in enumerate(modules[1:], 1):
        module.mlp.register_full_backward_hook(lambda *_, index=index: backward.append(started(index - 1)))
    ids, labels, weights = batch()
    PipelineRunner(engine.stages, context).forward_backward(ids, labels, weights, 4)
    return forward, backward


def test_the_next_layer_is_gathered_while_this_one_computes(pool: ProcessPool, folder: Path) -> None:
    for forward, backward in pool.run(gathered_meanwhile, 2, folder):
        assert forward and all(forward) and len(backward) == len(forward) and all(backward)


def test_a_rank_asks_for_its_own_rows_only() -> None:
    asked: list[tuple[int, int]] = []
    weights = [torch.nn.Parameter(torch.empty(8, 4), requires_grad=False), torch.nn.Parameter(torch.empty(6, 4), requires_grad=False)]
    values = [torch.arange(32.0).view(8, 4), 100 + torch.arange(24.0).view(6, 4)]
    parts = []
    for dp_rank in range(2):
        storage = BaseStorage(ParallelContext(torch.device("cpu"), dp_size=2, dp_rank=dp_rank), Plain(), True)
        storage.take(torch.nn.Identity(), weights)
        for weight, value in zip(weights, values, strict=True):
            storage.layers[0].load(weight, lambda low, high, value=value: (asked.append((low, high)), value[low:high])[1])  # type: ignore[misc]
        parts.append(storage.layers[0].holders[0])
        for weight, value in zip(weights, values, strict=True):
            weight.data = torch.empty_like(value)
    assert asked == [(0, 7), (7, 8), (0, 6)]
    assert torch.equal(torch.cat(parts), torch.cat([value.view(-1) for value in values]))


def test_rows_of_a_shard_are_the_shards_rows(folder: Path) -> None:
    base = open_base(folder)
    table = WeightTable(base.model_config)
    for row in table.rows:
        if row.place != "layer":
            continue
        parts = base.parts(row, 1)
        for tp_size in (1, 2, 4):
            whole = table.shard(row, parts, tp_size - 1, tp_size)
            for start, stop in ((0, whole.shape[0]), (1, 3), (whole.shape[0] // 2 - 1, whole.shape[0])):
                assert torch.equal(table.shard_rows(row, base.pieces(row, 1), tp_size - 1, tp_size, start, stop), whole[start:stop])


def test_padding_of_an_uneven_buffer() -> None:
    """Three ranks and a block of 64: sizes that divide by neither."""

    class Blocks(Plain):
        block = 64

    weights = [torch.nn.Parameter(torch.randn(5, 7), requires_grad=False), torch.nn.Parameter(torch.randn(3, 9), requires_grad=False)]
    values = [weight.detach().clone() for weight in weights]
    parts = []
    for dp_rank in range(3):
        storage = BaseStorage(ParallelContext(torch.device("cpu"), dp_size=3, dp_rank=dp_rank), Blocks(), True)
        storage.take(torch.nn.Identity(), weights)
        (layer,) = storage.layers
        assert layer.size == 192 and layer.offsets == [0, 64]
        for weight, value in zip(weights, values, strict=True):
            layer.load(weight, lambda low, high, value=value: value[low:high])  # type: ignore[misc]
        parts.append(layer.holders[0])
    whole = torch.cat(parts)
    assert torch.equal(whole[:35], values[0].view(-1)) and torch.equal(whole[64:91], values[1].view(-1))
