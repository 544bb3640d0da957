"""Adapters trained elsewhere, whose linears have their own A, r and alpha, in our layers: against transformers + PEFT."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_helpers import batch, build_engine
from helpers import make_model
from peft_helpers import CASES, load_peft, make_adapter

from mindspeed_lora.model.decode import DecodeState
from mindspeed_lora.parallel.context import build_context
from mindspeed_lora.parallel.pipeline import PipelineRunner, forward_through_stages
from mindspeed_lora.weights.lora_blocks import block_masks, module_of, split_pairs
from mindspeed_lora.weights.sources import open_adapter, open_base
from mindspeed_lora.weights.table import WeightTable

LAYOUTS = {"TP1": (1, 1, False), "TP2": (2, 1, False), "TP2-SP": (2, 1, True), "PP2": (1, 2, False), "TP2-PP2": (2, 2, True)}
HARDEST = "per-module r and alpha"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    hf = make_model(root / "hf")
    for case, config in CASES.items():
        make_adapter(hf, root / case, size=0.1, **config)
    return {"hf": hf, **{case: root / case for case in CASES}}


def _cell(hf: Path, adapter: Path, tp_size: int, pp_size: int, sequence_parallel: bool, fusion: bool) -> dict[str, Any]:
    """Logits (last stage), loss, and this rank's LoRA gradients."""
    from mindspeed_lora.parallel.collectives import all_reduce

    context = build_context(torch.device("cpu"), tp_size, pp_size, sequence_parallel)
    engine = build_engine(hf, context, fusion=fusion, adapter=adapter)
    ids, labels, weights = batch()
    logits = None
    if not sequence_parallel:
        with torch.no_grad():
            positions = torch.arange(ids.shape[1]).unsqueeze(0)
            output = forward_through_stages(engine.stages, context, ids, decode=DecodeState(positions))
            logits = None if output is None else engine.stages[-1].gather_logits(output)
    loss = PipelineRunner(engine.stages, context).forward_backward(ids, labels, weights, micro_batch_size=1).sum()
    gradients = {}
    for stage in engine.stages:
        for name, parameter in stage.named_parameters():
            if parameter.requires_grad:
                row = engine.table.lora_row(name)
                assert parameter.grad is not None, name
                if row.grad_sum == "always" or (row.grad_sum == "sp" and sequence_parallel):
                    all_reduce(parameter.grad, context.tp_group)
                gradients[name] = (context.tp_rank, parameter.grad)
    return {"logits": logits, "loss": float(loss), "gradients": gradients}


def _by_linear(results: list[dict[str, Any]], hf: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """Gradients of A and B of each HF linear, from all ranks; B's outside its blocks must be zero."""
    table = WeightTable(open_base(hf).model_config)
    spec = open_adapter(adapter).spec(table)
    assert spec is not None
    shards: dict[str, dict[int, torch.Tensor]] = {}
    for name, (tp_rank, gradient) in ((name, each) for result in results for name, each in result["gradients"].items()):
        shards.setdefault(name, {})[tp_rank] = gradient
    whole: dict[str, torch.Tensor] = {}
    for row, layer in table.target_entries(spec.targets):
        module = module_of(spec, row, layer)
        if module is None:
            continue
        halves = []
        for half in table.lora_pair(row):
            by_rank = shards.pop(half.name(layer))
            halves.append(table.unshard(half, [by_rank[rank] for rank in sorted(by_rank)]))
        for b, mask in zip(halves[1], block_masks(row, module) or [], strict=False):
            assert not b[~mask].any(), f"{row.name(layer)}: gradient outside the blocks"
        for name, pair in zip(row.hf_names(layer), split_pairs(module, (halves[0][0], halves[1])), strict=True):
            if pair is not None:
                whole |= {f"base_model.model.{name.removesuffix('weight')}lora_{half}": each for half, each in zip("AB", pair, strict=True)}
    assert not shards
    return whole


@pytest.mark.parametrize(
    ("case", "layout", "fusion"),
    [
        *itertools.product([HARDEST], LAYOUTS, [False, True]),
        *((case, "TP2-PP2", True) for case in CASES if case != HARDEST),
        *(pytest.param(case, "PP2", False, marks=pytest.mark.slow) for case in CASES if case != HARDEST),
    ],
)
def test_logits_and_lora_gradients_equal_peft(pool: Any, folders: dict[str, Path], case: str, layout: str, fusion: bool) -> None:
    tp_size, pp_size, sequence_parallel = LAYOUTS[layout]
    twin = load_peft(folders["hf"], folders[case], trainable=True)
    ids, labels, weights = batch()
    expected = twin(input_ids=ids).logits
    loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), labels.flatten(), reduction="sum") * weights[0]
    loss.backward()
    results = pool.run(_cell, tp_size * pp_size, folders["hf"], folders[case], tp_size, pp_size, sequence_parallel, fusion)
    assert results[-1]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    if not sequence_parallel:
        torch.testing.assert_close(results[-1]["logits"], expected, rtol=1e-5, atol=1e-5)
    got = _by_linear(results, folders["hf"], folders[case])
    reference = {name.removesuffix(".default.weight"): p.grad for name, p in twin.named_parameters() if "lora_" in name}
    assert got.keys() == reference.keys()
    for name, value in reference.items():
        assert value.abs().max() > 1e-4, f"{name}: the reference gradient is too small to prove anything"
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
