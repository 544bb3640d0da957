"""Every item of every benchmark, at every layout, equals lm_eval's own transformers backend on the merged model.

Texts are equal. Log-likelihoods (fp32) are to be within 1e-4 of each other, and of float64. For long continuations lm_eval's cannot be:
it adds up n log-probabilities in fp32, and every addition rounds by up to half a spacing of the sum so far, 2^-24 of its size. From the
last addition alone the result x is off by up to 2^-24 |x| (5e-5 at |x| = 840, 1e-4 at 1,700), from all n of them by sqrt(n) times that
where roundings are like random steps (1e-4 at 170 for n = 100), and the logits' own errors come on top. So lm_eval itself says where
1e-4 is possible, by how far it is from float64 among the values of one size (between two powers of two: one fp32 spacing):

    nowhere by more than 1e-4    each of ours is within 1e-4 of float64, and of lm_eval's too where that has not used up its half of it
    somewhere by more            ours are no farther from float64 than lm_eval's, the farthest as well as on the (quadratic) average

By default all benchmarks at six layouts with a tiny Qwen3; ``-m full`` also stories260k, and a tiny Qwen3 with Qwen's own tokenizer.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation_helpers import (
    ALL,
    Items,
    config_for,
    log_likelihoods,
    peft_adapter,
    reference_items,
    run_evaluate,
    small_benchmarks,
    written_items,
)
from float64_helpers import float64_model
from helpers import shared_data, tiny_qwen3
from pool import ProcessPool

from mindspeed_lora.arguments.configs import LORA_TARGETS, EvaluationConfig, LoadFlags, LoraFlags, TokenizerFlags

LAYOUTS = [(1, 1, 1), (2, 2, 1), (2, 1, 2), (2, 1, 1), (4, 2, 2), (4, 1, 2)]
ANSWER_TOKENS = 6
TOLERANCE = 1e-4
MODELS = ("qwen3", "stories260k", "qwen3-own-tokenizer")
RANKED = ("mmlu", "ceval", "cmmlu", "boolq", "hellaswag", "agieval")


@dataclass(frozen=True)
class Reference:
    """``items``, ``results``: lm_eval's transformers backend on the merged model in fp32; ``exact``: its log-likelihoods in float64."""

    folder: Path
    adapter: Path
    items: Items
    results: list[Any]
    exact: Items


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_benchmarks(tmp_path_factory.mktemp("benchmarks"))


def job_for(model: str, folder: Path, data: Path, **changes: Any) -> EvaluationConfig:
    few = {"tasks": ALL, "num_fewshot": None, "max_new_tokens": ANSWER_TOKENS, "max_eval_samples": 2, "confirm_run_unsafe_code": True}
    if model == "qwen3-own-tokenizer":
        few["tokenizer"] = TokenizerFlags(shared_data() / "qwen3-tokenizer")
    return config_for(folder, data, **{**few, **changes})


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Callable[[str], Reference]:
    """Of a model, made once."""
    made: dict[str, Reference] = {}

    def get(model: str) -> Reference:
        if model not in made:
            folder = tmp_path_factory.mktemp(model)
            if model == "stories260k":
                shutil.copytree(shared_data() / "stories260k" / "hf", folder, dirs_exist_ok=True)
            elif model == "qwen3":
                tiny_qwen3(folder, vocab_size=512, max_position_embeddings=1024)
            else:
                tiny_qwen3(folder, vocab_size=151936, max_position_embeddings=4096)
            adapter = tmp_path_factory.mktemp(f"{model}-adapter")
            items, results = reference_items(job_for(model, folder, data), peft_adapter(folder, adapter))
            exact, _ = reference_items(job_for(model, folder, data, tasks=RANKED), float64_model(folder, adapter))
            made[model] = Reference(folder, adapter, items, results, exact)
        return made[model]

    return get


def check_against(model: str, reference: Reference, pool: ProcessPool, data: Path, output: Path, layout: tuple[int, int, int]) -> None:
    world, tp, pp = layout
    lora = LoraFlags(4, 8.0, LORA_TARGETS, fusion=True) if tp == 2 else None
    load = LoadFlags(load=reference.folder, lora_load=reference.adapter)
    config = job_for(model, reference.folder, data, tp=tp, pp=pp, output=output, load=load, lora=lora)
    answers = pool.run(run_evaluate, world, replace(config, evaluation_batch_size=None if world == 1 else 2))
    assert [code for code, _ in answers] == [0] * world, answers[0][1]
    assert all(text == "" for _, text in answers[1:]), "only the first driver prints"
    found = written_items(output)
    assert found.keys() == reference.items.keys() and len(found) > 20
    assert all(found[item] == values for item, values in reference.items.items() if isinstance(values[0], str))
    sides = (found, reference.items, reference.exact)
    for result in reference.results:
        if result.name in RANKED:
            report(f"{model}, {result.name}, world {world} tp {tp} pp {pp}", *(log_likelihoods(side, result.samples) for side in sides))
        right = sum(value for task in result.samples for value in result.items(task).values())
        count = sum(len(result.items(task)) for task in result.samples)
        assert f"{result.name} acc = {right:g}/{count}={right / count}" in answers[0][1].splitlines()
    check_log_likelihoods(*(log_likelihoods(side, {task for task, _ in reference.exact}) for side in sides))


def report(name: str, ours: torch.Tensor, theirs: torch.Tensor, exact: torch.Tensor) -> None:
    """The numbers of docs/evaluation.md; float64 ``[n]`` each."""
    sizes = (float(x.abs().max()) for x in (exact, ours - theirs, ours - exact, theirs - exact))
    print(
        f"{name}: {len(exact)} values up to {{:.0f}}; ours - lm_eval {{:.1e}}, ours - float64 {{:.1e}}, lm_eval - float64 {{:.1e}}".format(
            *sizes
        )
    )


def check_log_likelihoods(ours: torch.Tensor, theirs: torch.Tensor, exact: torch.Tensor) -> None:
    """float64 ``[n]`` each; the rule is the module's."""
    between, of_ours, of_theirs = ((a - b).abs() for a, b in ((ours, theirs), (ours, exact), (theirs, exact)))
    classes = exact.abs().clamp(min=1.0).log2().floor()
    far = torch.zeros(len(exact), dtype=torch.bool)
    for each in classes.unique():
        far |= (classes == each) & (of_theirs[classes == each].max() > TOLERANCE)
    assert not far.all()
    assert of_ours[~far].max() <= TOLERANCE
    assert between[~far & (of_theirs <= TOLERANCE / 2)].max() <= TOLERANCE
    if far.any():
        assert of_ours[far].max() <= of_theirs[far].max()
        assert of_ours[far].square().mean() <= of_theirs[far].square().mean()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_item_equals_lm_evals_transformers_backend(
    pool: ProcessPool, tmp_path: Path, data: Path, references: Callable[[str], Reference], layout: tuple[int, int, int]
) -> None:
    check_against("qwen3", references("qwen3"), pool, data, tmp_path, layout)


@pytest.mark.full
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", MODELS[1:])
def test_every_item_equals_lm_evals_transformers_backend_on_other_models(
    pool: ProcessPool, tmp_path: Path, data: Path, references: Callable[[str], Reference], model: str, layout: tuple[int, int, int]
) -> None:
    check_against(model, references(model), pool, data, tmp_path, layout)
