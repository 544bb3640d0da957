"""Scores at every layout equal lm_eval's own transformers backend on the merged model, item by item."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import shared_data, tiny_qwen3
from pool import ProcessPool

from mindspeed_lora.arguments.configs import (
    LORA_TARGETS,
    EvaluationConfig,
    LoadFlags,
    LoraFlags,
    ParallelFlags,
    RuntimeFlags,
    TemplateFlags,
    TokenizerFlags,
)
from mindspeed_lora.errors import MindSpeedLoraError, UsageError
from mindspeed_lora.evaluation.run import evaluate, run_tasks
from mindspeed_lora.evaluation.tasks_mmlu import mmlu_tasks

SUBJECTS = ("abstract_algebra", "anatomy", "global_facts")
ITEMS = 3  # of each subject
TOKENIZER = "stories260k/hf"


def config_for(folder: Path, data: Path, output: Path | None = None, tp: int = 1, pp: int = 1, **changes: Any) -> EvaluationConfig:
    config = EvaluationConfig(
        ParallelFlags(tp, pp),
        RuntimeFlags(device="cpu"),
        LoadFlags(load=folder),
        TokenizerFlags(shared_data() / TOKENIZER),
        TemplateFlags(),
        ("mmlu",),
        data,
        num_fewshot=1,
        max_eval_samples=ITEMS,
        evaluation_batch_size=2,
        output_path=output,
    )
    return replace(config, **changes)


def run_evaluate(config: EvaluationConfig) -> tuple[int, str]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        try:
            code = evaluate(config)
        except MindSpeedLoraError as error:
            code = error.exit_code
            out.write(f"ERROR {error}")
    return code, out.getvalue()


def item_scores(folder: Path) -> dict[tuple[str, int], list[float]]:
    """(task, document) -> log-likelihoods of the four letters."""
    found = {}
    for path in sorted(folder.glob("samples_*.jsonl")):
        for line in path.read_text().splitlines():
            sample = json.loads(line)
            found[path.stem, sample["doc_id"]] = [response[0][0] for response in sample["resps"]]
    return found


def peft_adapter(base: Path, folder: Path) -> Any:
    """A random adapter whose q, k, v (and gate, up) share one A, saved by peft; returns the merged model."""
    import peft
    import transformers

    torch.manual_seed(3)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for layer in model.base_model.model.model.layers:
            for group in (
                [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj],
                [layer.mlp.gate_proj, layer.mlp.up_proj],
            ):
                for module in group:
                    module.lora_A["default"].weight.copy_(group[0].lora_A["default"].weight)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    return model.merge_and_unload().eval()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some subjects of the published files."""
    root = tmp_path_factory.mktemp("mmlu")
    for split in ("test", "dev"):
        (root / split).mkdir()
        for subject in SUBJECTS:
            name = f"{subject}_{split}.csv"
            (root / split / name).write_bytes((shared_data() / "mmlu" / "data" / split / name).read_bytes())
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Any]:
    """Base folder, adapter folder, merged model."""
    base = tiny_qwen3(tmp_path_factory.mktemp("base"), vocab_size=512, max_position_embeddings=512)
    adapter = tmp_path_factory.mktemp("adapter")
    return base, adapter, peft_adapter(base, adapter)


@pytest.fixture(scope="module")
def reference(data: Path, model: tuple[Path, Path, Any]) -> dict[tuple[str, int], list[float]]:
    """lm_eval's transformers backend on the merged model."""
    import transformers
    from lm_eval.models.huggingface import HFLM

    tokenizer = transformers.AutoTokenizer.from_pretrained(shared_data() / TOKENIZER)
    with contextlib.redirect_stderr(io.StringIO()):
        results = run_tasks(HFLM(pretrained=model[2], tokenizer=tokenizer, batch_size=2), mmlu_tasks(data, 1), ITEMS)
    return {
        (f"samples_{task}", sample["doc_id"]): [response[0][0] for response in sample["resps"]]
        for task, samples in results["samples"].items()
        for sample in samples
    }


@pytest.mark.parametrize(("world", "tp", "pp"), [(1, 1, 1), (2, 2, 1), (2, 1, 2), (2, 1, 1), (4, 2, 2), (4, 1, 2)])
def test_every_item_equals_lm_evals_transformers_backend(
    pool: ProcessPool,
    tmp_path: Path,
    data: Path,
    model: tuple[Path, Path, Any],
    reference: dict[tuple[str, int], list[float]],
    world: int,
    tp: int,
    pp: int,
) -> None:
    base, adapter, _ = model
    lora = LoraFlags(4, 8.0, LORA_TARGETS, fusion=True) if tp == 2 else None
    load = LoadFlags(load=base, lora_load=adapter)
    config = config_for(base, data / "test" if world == 1 else data, tmp_path, tp, pp, load=load, lora=lora)
    results = pool.run(run_evaluate, world, config)
    assert [code for code, _ in results] == [0] * world and all(text == "" for _, text in results[1:])
    found = item_scores(tmp_path)
    assert found.keys() == reference.keys() and len(found) == ITEMS * len(SUBJECTS)
    for item, values in reference.items():
        assert found[item] == pytest.approx(values, abs=1e-4), item
    content = json.loads((tmp_path / "results.json").read_text())
    correct = round(content["groups"]["mmlu"]["correct"])
    assert f"mmlu acc = {correct}/{len(found)}={correct / len(found)}" in results[0][1].splitlines()
    assert content["mindspeed_lora"]["lora"]["r"] == 4 and content["mindspeed_lora"]["layout"]["tp_size"] == tp


def test_the_adapter_changes_the_scores(pool: ProcessPool, tmp_path: Path, data: Path, model: tuple[Path, Path, Any]) -> None:
    base, adapter, _ = model
    outputs = []
    for name, load in (("base", LoadFlags(load=base)), ("adapter", LoadFlags(load=base, lora_load=adapter))):
        assert pool.run(run_evaluate, 1, config_for(base, data, tmp_path / name, load=load))[0][0] == 0
        outputs.append(item_scores(tmp_path / name))
    assert all(outputs[0][item] != pytest.approx(outputs[1][item], abs=1e-2) for item in outputs[0])


def test_a_template_wraps_the_question(pool: ProcessPool, tmp_path: Path, data: Path, model: tuple[Path, Path, Any]) -> None:
    config = config_for(model[0], data, tmp_path / "wrapped", template=TemplateFlags(prompt_type="default"))
    code, _ = pool.run(run_evaluate, 1, config)[0]
    assert code == 0
    content = json.loads((tmp_path / "wrapped" / "results.json").read_text())
    assert content["mindspeed_lora"]["prompt_format"] == "default"


@pytest.mark.parametrize(
    ("lora", "with_adapter", "words"),
    [
        (LoraFlags(r=8), True, "--lora-r 8"),
        (LoraFlags(alpha=4.0), True, "--lora-alpha 4"),
        (LoraFlags(targets=("linear_qkv",)), True, "--lora-target-modules linear_qkv"),
        (LoraFlags(r=8), False, "--lora-load is missing"),
    ],
)
def test_lora_flags_unlike_the_adapter_are_refused(
    data: Path, model: tuple[Path, Path, Any], lora: LoraFlags, with_adapter: bool, words: str
) -> None:
    base, adapter, _ = model
    with pytest.raises(UsageError, match=words):
        evaluate(config_for(base, data, load=LoadFlags(load=base, lora_load=adapter if with_adapter else None), lora=lora))


def test_missing_files_end_every_rank_with_one_message(pool: ProcessPool, tmp_path: Path, model: tuple[Path, Path, Any]) -> None:
    results = pool.run(run_evaluate, 2, config_for(model[0], tmp_path / "absent"))
    assert [code for code, _ in results] == [1, 1]
    assert "--task-data-path" in results[0][1] and results[1][1] == ""


def test_other_request_kinds_equal_lm_evals_transformers_backend(model: tuple[Path, Path, Any]) -> None:
    """Rolling log-likelihoods, empty contexts, long continuations, generation with stop texts."""
    import transformers
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from mindspeed_lora.evaluation.batching import BatchRule, Room
    from mindspeed_lora.evaluation.lm import ParallelLM, work_handlers
    from mindspeed_lora.evaluation.replicas import Replicas
    from mindspeed_lora.inference.engine import Engine
    from mindspeed_lora.inference.prompts import PromptFormat
    from mindspeed_lora.inference.session import open_session

    folder = shared_data() / TOKENIZER
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    session = open_session(config_for(folder, folder), all_replicas=True)
    assert session.stage is not None
    engine = Engine(session.stage, session.context, session.channels)
    replicas = Replicas(work_handlers(engine, tokenizer), None, 0, 1)
    ours = ParallelLM(replicas, tokenizer, PromptFormat(), (2,), 64, BatchRule(2, Room(0, 0, 0, 0, 0, 0)), io.StringIO())
    theirs = HFLM(pretrained=transformers.AutoModelForCausalLM.from_pretrained(folder), tokenizer=tokenizer, batch_size=2, max_length=64)

    def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
        return [Instance(kind, {}, argument, index) for index, argument in enumerate(arguments)]

    long_text = "Once upon a time, there was a little dog who liked to run and jump in the park with Tim. " * 4
    asked = requests(
        "loglikelihood", ("Once upon", " a time"), ("Once upon", " a time, there"), ("", "Tim"), ("The dog ", "ran"), (long_text, "x")
    )
    for (value, greedy), (expected, expected_greedy) in zip(ours.loglikelihood(asked), theirs.loglikelihood(asked), strict=True):
        assert value == pytest.approx(expected, abs=1e-4) and greedy == expected_greedy
    asked = requests("loglikelihood_rolling", (long_text,), ("Tim",))
    assert ours.loglikelihood_rolling(asked) == pytest.approx(theirs.loglikelihood_rolling(asked), abs=1e-3)
    settings = {"until": ["."], "max_gen_toks": 20, "do_sample": False}
    asked = requests("generate_until", ("Once upon a time", settings), ("Tim and", settings), ("One day", {**settings, "until": ["the"]}))
    assert ours.generate_until(asked) == theirs.generate_until(asked)
