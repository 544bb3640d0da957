"""Every item of every benchmark, at every layout, equals lm_eval's own transformers backend on the merged model.

By default all benchmarks at six layouts with a tiny Qwen3; ``-m full`` also stories260k, and a tiny Qwen3 with Qwen's own tokenizer.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from evaluation_helpers import ALL, config_for, peft_adapter, reference_items, run_evaluate, small_benchmarks, written_items
from helpers import shared_data, tiny_qwen3
from pool import ProcessPool

from mindspeed_lora.arguments.configs import LORA_TARGETS, EvaluationConfig, LoadFlags, LoraFlags, TokenizerFlags

LAYOUTS = [(1, 1, 1), (2, 2, 1), (2, 1, 2), (2, 1, 1), (4, 2, 2), (4, 1, 2)]
ANSWER_TOKENS = 6
MODELS = ("qwen3", "stories260k", "qwen3-own-tokenizer")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_benchmarks(tmp_path_factory.mktemp("benchmarks"))


def job_for(model: str, folder: Path, data: Path, **changes: Any) -> EvaluationConfig:
    few = {"tasks": ALL, "num_fewshot": None, "max_new_tokens": ANSWER_TOKENS, "max_eval_samples": 2, "confirm_run_unsafe_code": True}
    if model == "qwen3-own-tokenizer":
        few["tokenizer"] = TokenizerFlags(shared_data() / "qwen3-tokenizer")
    return config_for(folder, data, **{**few, **changes})


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Any:
    """model -> (folder, adapter, items and results by HFLM on the merged model), made once."""
    made: dict[str, Any] = {}

    def get(model: str) -> Any:
        if model not in made:
            folder = tmp_path_factory.mktemp(model)
            if model == "stories260k":
                shutil.copytree(shared_data() / "stories260k" / "hf", folder, dirs_exist_ok=True)
            elif model == "qwen3":
                tiny_qwen3(folder, vocab_size=512, max_position_embeddings=1024)
            else:
                tiny_qwen3(folder, vocab_size=151936, max_position_embeddings=4096)
            adapter = tmp_path_factory.mktemp(f"{model}-adapter")
            made[model] = (folder, adapter, *reference_items(job_for(model, folder, data), peft_adapter(folder, adapter)))
        return made[model]

    return get


def check_against(model: str, references: Any, pool: ProcessPool, data: Path, output: Path, layout: tuple[int, int, int]) -> None:
    world, tp, pp = layout
    folder, adapter, expected, results = references(model)
    lora = LoraFlags(4, 8.0, LORA_TARGETS, fusion=True) if tp == 2 else None
    config = job_for(model, folder, data, tp=tp, pp=pp, output=output, load=LoadFlags(load=folder, lora_load=adapter), lora=lora)
    answers = pool.run(run_evaluate, world, replace(config, evaluation_batch_size=None if world == 1 else 2))
    assert [code for code, _ in answers] == [0] * world, answers[0][1]
    assert all(text == "" for _, text in answers[1:]), "only the first driver prints"
    found = written_items(output)
    assert found.keys() == expected.keys() and len(found) > 20
    for item, values in expected.items():
        if isinstance(values[0], str):
            assert found[item] == values, item
        else:
            assert found[item] == pytest.approx(values, abs=1e-4), item
    for result in results:
        right = sum(value for task in result.samples for value in result.items(task).values())
        count = sum(len(result.items(task)) for task in result.samples)
        assert f"{result.name} acc = {right:g}/{count}={right / count}" in answers[0][1].splitlines()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_item_equals_lm_evals_transformers_backend(
    pool: ProcessPool, tmp_path: Path, data: Path, references: Any, layout: tuple[int, int, int]
) -> None:
    check_against("qwen3", references, pool, data, tmp_path, layout)


@pytest.mark.full
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", MODELS[1:])
def test_every_item_equals_lm_evals_transformers_backend_on_other_models(
    pool: ProcessPool, tmp_path: Path, data: Path, references: Any, model: str, layout: tuple[int, int, int]
) -> None:
    check_against(model, references, pool, data, tmp_path, layout)
