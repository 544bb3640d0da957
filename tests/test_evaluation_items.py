"""Every item of every benchmark, at every layout, equals lm_eval's own transformers backend on the merged model.

By default all benchmarks at six layouts with a tiny Qwen3; ``-m full`` also stories260k, and a tiny Qwen3 with Qwen's own tokenizer.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation_helpers import ALL, config_for, peft_adapter, reference_items, run_evaluate, small_benchmarks, written_items
from helpers import shared_data, tiny_qwen3, weights_in
from pool import ProcessPool

from mindspeed_lora.arguments.configs import LORA_TARGETS, EvaluationConfig, LoadFlags, LoraFlags, TokenizerFlags

LAYOUTS = [(1, 1, 1), (2, 2, 1), (2, 1, 2), (2, 1, 1), (4, 2, 2), (4, 1, 2)]
ANSWER_TOKENS = 6
LONG = 400.0  # from here on 1e-4 is at most three fp32 roundings of the value, and both sides lie farther than that from float64
ROUNDINGS = 32 * 2.0**-23  # of such a value; seen: 13 (each side alone is up to 6 from float64: test_evaluation_precision.py)
BF16 = 0.012  # of a log-likelihood; seen: 0.006
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
            for ours, theirs in zip(found[item], values, strict=True):
                assert abs(ours - theirs) <= (1e-4 if abs(theirs) < LONG else ROUNDINGS * abs(theirs)), (item, ours, theirs)
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


@pytest.mark.slow
@pytest.mark.parametrize("tp", [1, 2])
def test_in_bf16_a_choice_flips_only_where_two_are_closer_than_rounding(
    pool: ProcessPool, tmp_path: Path, data: Path, tp: int, record_property: Callable[[str, object], None]
) -> None:
    """Both sides in bf16; theirs rounds the log-probabilities themselves to bf16, ours keeps them in fp32."""
    import transformers

    folder = tiny_qwen3(tmp_path / "model", vocab_size=512, max_position_embeddings=1024, dtype="bfloat16")
    changes = {"tasks": ("mmlu", "ceval", "boolq", "hellaswag"), "max_eval_samples": 8, "num_fewshot": 0}
    config = config_for(folder, data, tmp_path / "scores", tp, **changes)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **weights_in(torch.bfloat16))
    expected, _ = reference_items(config, model)
    code, text = pool.run(run_evaluate, tp, config)[0]
    assert code == 0, text
    found = written_items(tmp_path / "scores")
    differences = [abs(a - b) for item in expected for a, b in zip(found[item], expected[item], strict=True)]
    relative = max(abs(a - b) / max(1.0, abs(b)) for item in expected for a, b in zip(found[item], expected[item], strict=True))
    flips = [item for item in expected if argmax(found[item]) != argmax(expected[item])]
    record_property("largest difference, largest relative, flips, items", (max(differences), relative, len(flips), len(expected)))
    print(f"bf16, tp {tp}: largest difference {max(differences):.3f}, relative {relative:.4f}; {len(flips)} of {len(expected)} flips")
    assert relative < BF16
    for item in flips:
        values = sorted(expected[item])
        assert values[-1] - values[-2] <= 2 * BF16 * max(1.0, abs(values[-1])), (item, expected[item], found[item])


def argmax(values: list[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)
