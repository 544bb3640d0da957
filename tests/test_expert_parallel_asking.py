"""Asking a model whose experts lie on several processes: the same logits, scores and tokens as one process; replicas beside them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from evaluation_helpers import config_for as evaluation_config
from evaluation_helpers import run_evaluate, small_benchmarks, written_items
from experts_helpers import reference
from helpers import make_model, shared_data
from pool import ProcessPool
from test_inference_engine import config_for, logits_cell, run_infer

from mindspeed_lora.arguments.configs import ParallelFlags, TokenizerFlags

GRIDS = {  # world, tp, pp, ep, etp
    "ep2": (2, 1, 1, 2, None),
    "tp2pp2ep2": (8, 2, 2, 2, None),
    "tp2ep2etp1": (2, 2, 1, 2, 1),
    "tp2ep4etp1": (4, 2, 1, 4, 1),
    "tp2etp1": (2, 2, 1, 1, 1),
    "pp2ep2": (4, 1, 2, 2, None),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("tiny"), "qwen2_moe", num_hidden_layers=2, vocab_size=512, max_position_embeddings=2048)


@pytest.fixture(scope="module")
def alone(pool: ProcessPool, tiny: Path) -> dict[str, torch.Tensor]:
    """What one process says; its prefill is transformers'."""
    found = pool.run(logits_cell, 1, tiny, 1, 1)[0]
    expected = reference(tiny)(input_ids=torch.tensor([[5, 9, 200, 31, 77, 8]])).logits
    torch.testing.assert_close(found["prefill"][0], expected[0], atol=1e-5, rtol=1e-5)
    return found


@pytest.mark.parametrize("grid", [pytest.param(name, marks=pytest.mark.slow if sizes[0] > 4 else ()) for name, sizes in GRIDS.items()])
def test_logits_scores_and_tokens_equal_one_process(pool: ProcessPool, tiny: Path, alone: dict[str, torch.Tensor], grid: str) -> None:
    world, *sizes = GRIDS[grid]
    found, *others = pool.run(logits_cell, world, tiny, *sizes)
    assert others == [None] * (world - 1), "one rank drives"
    assert found.keys() == alone.keys()
    for name, value in alone.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_two_replicas_of_two_ranks_answer_once(pool: ProcessPool, tiny: Path) -> None:
    tokenizer = TokenizerFlags(shared_data() / "stories260k" / "hf")
    config = config_for(tiny, 1, 1, tokenizer=tokenizer, parallel=ParallelFlags(expert_parallel_size=2), prompts=("<s>",), max_new_tokens=8)
    results = pool.run(run_infer, 4, config)
    assert [code for code, _ in results] == [0] * 4, results
    assert results[0][1] and all(text == "" for _, text in results[1:])


@pytest.mark.parametrize(
    ("parallel", "words"),
    [
        (ParallelFlags(expert_parallel_size=3), "--expert-model-parallel-size 3 x expert tensor parallel size 1 = 3 does not divide the 2"),
        (ParallelFlags(2, expert_parallel_size=1, expert_tensor_parallel_size=4), "expert tensor parallel size 4 = 4 does not divide"),
    ],
    ids=["ep3", "etp4"],
)
def test_sizes_that_do_not_fit_end_every_rank(pool: ProcessPool, tiny: Path, parallel: ParallelFlags, words: str) -> None:
    tokenizer = TokenizerFlags(shared_data() / "stories260k" / "hf")
    results = pool.run(run_infer, 2, config_for(tiny, 1, 1, tokenizer=tokenizer, parallel=parallel, prompts=("<s>",)))
    assert {code for code, _ in results} == {2}
    assert words in results[0][1]


def test_an_evaluation_deals_out_rows_over_replicas_of_two_ranks(pool: ProcessPool, tmp_path: Path, tiny: Path) -> None:
    data = small_benchmarks(tmp_path / "data")
    written = {}
    for name, world, ep in (("one", 1, 1), ("ep2", 4, 2)):
        config = evaluation_config(tiny, data, tmp_path / name)
        results = pool.run(run_evaluate, world, replace(config, parallel=ParallelFlags(expert_parallel_size=ep)))
        assert [code for code, _ in results] == [0] * world, results[0][1]
        written[name] = written_items(tmp_path / name)
    assert written["one"].keys() == written["ep2"].keys()
    assert all(written["ep2"][item] == pytest.approx(values, abs=1e-5) for item, values in written["one"].items())
    layout = json.loads((tmp_path / "ep2" / "results.json").read_text())["mindspeed_lora"]["layout"]
    assert layout == {"tp_size": 1, "pp_size": 1, "dp_size": 4, "ep_size": 2, "expert_tp_size": 1}
