"""A tiny model of every family that trains, through the six steps, as a user takes them; transformers and PEFT load both results."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from data_helpers import alpaca_records, tiny_tokenizer, write_json
from engine_helpers import TARGETS, build_engine
from helpers import make_model, weights_in
from peft_helpers import CASES, load_peft, make_adapter

from mindspeed_lora.arguments.cli import main
from mindspeed_lora.arguments.configs import LATENT_TARGETS
from mindspeed_lora.checkpoint.load import load_adapter
from mindspeed_lora.weights.lora_spec import LoraSpec
from mindspeed_lora.weights.sources import open_adapter

pytestmark = pytest.mark.slow

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES: dict[str, tuple[dict[str, Any], str, str]] = {
    # family: fields of its config.json, --model-type-hf, --prompt-type
    "qwen3": ({}, "qwen3", "qwen3"),
    "qwen2": ({"tie_word_embeddings": True}, "llama2", "qwen3"),
    "llama": ({"rope_scaling": LLAMA3_ROPE}, "llama2", "default"),
    "mistral": ({"sliding_window": 5}, "llama2", "default"),
    "mixtral": ({}, "mixtral", "default"),
    "qwen2_moe": ({}, "qwen2-moe", "qwen3"),
    "qwen3_moe": ({"mlp_only_layers": []}, "qwen3-moe", "qwen3"),
    "deepseek_v2_lite": ({}, "deepseek2-lite", "deepseek2-lite"),
    "deepseek_v2": ({}, "deepseek2", "deepseek2"),
    "deepseek_v3": ({}, "deepseek3", "default"),
}
LAYERS, RANK, ALPHA, QUESTIONS = 4, 4, 16.0, 3


def targets_of(family: str) -> tuple[str, ...]:
    """Every linear that the family has."""
    up = LATENT_TARGETS[1 if family == "deepseek_v2_lite" else 0 :]
    return (*TARGETS, *up) if family.startswith("deepseek") else TARGETS


@dataclass(frozen=True)
class Journey:
    """What the six steps of one family left behind, and what the two that answer printed."""

    family: str
    root: Path
    answer: str
    score: str

    def __truediv__(self, name: str) -> Path:
        return self.root / name


def step(command: str, **flags: Any) -> str:
    """What one command line prints, run in this process; a tuple is a flag with several values, True a flag with none."""
    argv = [] if command in ("convert_ckpt.py", "preprocess_data.py") else ["--device", "cpu"]
    for name, value in flags.items():
        words = () if value is True else value if isinstance(value, tuple) else (value,)
        argv += ["--" + name.replace("_", "-"), *map(str, words)]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(command, argv)
    assert code == 0, f"{command} {' '.join(argv)}\n{out.getvalue()}{err.getvalue()}"
    return out.getvalue()


def write_mmlu(root: Path) -> Path:
    """One subject in MMLU's layout."""
    for split, count in (("dev", 5), ("test", QUESTIONS)):
        (root / split).mkdir(parents=True)
        with (root / split / f"anatomy_{split}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([f"Which is {index}?", "one", "two", "six", "ten", "ABCD"[index % 4]] for index in range(count))
    return root


def prepare(root: Path, family: str) -> None:
    """A random model with a tokenizer, 8 records and a subject to be scored on."""
    make_model(root / "hf", family, num_hidden_layers=LAYERS, max_position_embeddings=512, **FAMILIES[family][0])
    tiny_tokenizer(root / "hf")
    write_json(root / "records.json", alpaca_records(8))
    write_mmlu(root / "mmlu")


@pytest.fixture(scope="module", params=FAMILIES)
def journey(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Journey:
    """The six steps; a Megatron folder of two stages is the base of each of them."""
    root = tmp_path_factory.mktemp(request.param)
    _, layout, template = FAMILIES[request.param]
    prepare(root, request.param)
    base, adapted = {"load": root / "mg"}, {"load": root / "mg", "lora_load": root / "lora"}
    to_hf = {"load_model_type": "mg", "save_model_type": "hf", "model_type_hf": layout}
    step(
        "convert_ckpt.py",
        load_model_type="hf",
        save_model_type="mg",
        model_type_hf=layout,
        load_dir=root / "hf",
        save_dir=root / "mg",
        target_tensor_parallel_size=1,
        target_pipeline_parallel_size=2,
    )
    step(
        "preprocess_data.py",
        input=root / "records.json",
        output_prefix=root / "data",
        tokenizer_name_or_path=root / "hf",
        prompt_type=template,
    )
    step(
        "posttrain_gpt.py",
        **base,
        save=root / "lora",
        data_path=root / "data",
        split="100,0,0",
        prompt_type=template,
        lora_target_modules=targets_of(request.param),
        lora_r=RANK,
        lora_alpha=ALPHA,
        lora_fusion=True,
        seq_length=128,
        micro_batch_size=2,
        global_batch_size=4,
        train_iters=3,
        eval_iters=0,
        lr=1e-2,
    )
    answer = step("inference.py", **adapted, task="greedy", prompt="Say number 3", max_new_tokens=4, prompt_type=template)
    score = step(
        "evaluation.py", **adapted, task="mmlu", task_data_path=root / "mmlu", num_fewshot=1, output_path=root / "scores", log_samples=True
    )
    step("convert_ckpt.py", **to_hf, load_dir=root / "mg", lora_load=root / "lora", save_dir=root / "merged")
    step("convert_ckpt.py", **to_hf, load_dir=root / "lora", save_lora_to_hf=True, hf_cfg_dir=root / "hf", save_dir=root / "peft")
    return Journey(request.param, root, answer, score)


def ids() -> torch.Tensor:
    """``[2, 24]``: longer than the sliding window."""
    return torch.randint(3, 312, (2, 24), generator=torch.Generator().manual_seed(5))


def transformers_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **weights_in(torch.float32)).eval()


@torch.no_grad()
def our_logits(folder: Path, adapter: Path | None = None, targets: tuple[str, ...] = TARGETS) -> torch.Tensor:
    engine = build_engine(folder, lora=LoraSpec(RANK, ALPHA, targets) if adapter else None, fusion=True, random_b=False)
    if adapter is not None:
        load_adapter(engine.stages, open_adapter(adapter), engine.table, engine.context)
    return engine.stages[0](ids())


@torch.no_grad()
def test_merged_peft_and_our_logits_are_equal(journey: Journey) -> None:
    from peft import PeftModel

    targets = targets_of(journey.family)
    merged = transformers_model(journey / "merged")(input_ids=ids()).logits
    base = transformers_model(journey / "hf")
    unadapted = base(input_ids=ids()).logits
    assert (merged - unadapted).abs().max() > 1e-2, "the adapter changes too little to prove anything"
    assert (journey / "mg" / "iter_0000001" / "mp_rank_00_001").is_dir(), "the base lies in two stages"
    peft = PeftModel.from_pretrained(base, journey / "peft").eval()
    assert any(parameter.abs().max() > 0 for name, parameter in peft.named_parameters() if "lora_B" in name)
    by_peft = peft(input_ids=ids()).logits
    for name, logits in {
        "PEFT": by_peft,
        "our base with our adapter": our_logits(journey / "mg", journey / "lora", targets),
        "our engine on the merged model": our_logits(journey / "merged"),
        "our engine on the PEFT folder": our_logits(journey / "hf", journey / "peft", targets),
    }.items():
        torch.testing.assert_close(logits, merged, rtol=0, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_the_merged_model_keeps_its_config_and_its_tensors(journey: Journey) -> None:
    before, after = (json.loads((journey / folder / "config.json").read_text()) for folder in ("hf", "merged"))
    assert {key: value for key, value in after.items() if key != "transformers_version"} == {
        key: value for key, value in before.items() if key != "transformers_version"
    }
    ours, theirs = (transformers_model(journey / folder).state_dict() for folder in ("merged", "hf"))
    assert ours.keys() == theirs.keys()
    changed = {name for name in ours if not torch.equal(ours[name], theirs[name])}
    assert changed == {
        name for name in ours if re.search(r"(q|k|v|o|q_a|q_b|kv_b|gate|up|gate_up|down)_proj(\.weight)?$|_with_mqa\.weight$", name)
    }


def test_the_loss_falls(journey: Journey) -> None:
    records = [json.loads(line) for line in (journey / "lora" / "metrics.jsonl").read_text().splitlines()]
    losses = [record["lm_loss"] for record in records if "lm_loss" in record]
    assert len(losses) == 3 and losses[-1] < losses[0], losses


@torch.no_grad()
def test_the_answer_is_what_transformers_generates_from_the_merged_model(journey: Journey) -> None:
    from transformers import AutoTokenizer

    from mindspeed_lora.data.templates import load_template

    tokenizer = AutoTokenizer.from_pretrained(journey / "hf")
    template = load_template(FAMILIES[journey.family][2])
    prompt = torch.tensor([template.encode_prompt(tokenizer, [{"role": "user", "content": "Say number 3"}])])
    generated = transformers_model(journey / "merged").generate(prompt, max_new_tokens=4, do_sample=False)
    expected = tokenizer.decode(generated[0, prompt.shape[1] :], skip_special_tokens=True)
    assert f"MindSpeed-LLM:\n{expected}" in journey.answer


def test_the_score_is_that_of_the_merged_model(journey: Journey) -> None:
    printed = step(
        "evaluation.py",
        load=journey / "merged",
        task="mmlu",
        task_data_path=journey / "mmlu",
        num_fewshot=1,
        output_path=journey / "merged-scores",
        log_samples=True,
    )
    assert re.search(rf"mmlu acc = \d/{QUESTIONS}=", journey.score), journey.score
    found = [line for text in (printed, journey.score) for line in text.splitlines() if line.startswith("mmlu acc")]
    assert len(found) == 2 and found[0] == found[1]
    mine, other = ((journey / folder / "samples_mmlu_anatomy.jsonl").read_text().splitlines() for folder in ("scores", "merged-scores"))
    for one, two in zip(map(json.loads, mine), map(json.loads, other), strict=True):
        likelihoods = [response[0][0] for response in one["resps"]]
        assert likelihoods == pytest.approx([response[0][0] for response in two["resps"]], abs=1e-4)
        assert len({round(value, 3) for value in likelihoods}) > 1


@pytest.mark.parametrize("case", ["every A its own", "per-module r and alpha"])
def test_a_peft_adapter_whose_q_k_and_v_have_their_own_a_answers_and_scores_as_the_merged_model(case: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    prepare(tmp_path, "qwen3")
    make_adapter(tmp_path / "hf", tmp_path / "peft", **CASES[case])
    adapted = {"load": tmp_path / "hf", "lora_load": tmp_path / "peft"}
    step(
        "convert_ckpt.py",
        load_model_type="hf",
        save_model_type="hf",
        load_dir=tmp_path / "hf",
        lora_load=tmp_path / "peft",
        save_dir=tmp_path / "merged",
    )
    asked = {"task": "greedy", "prompt": "Say number 3", "max_new_tokens": 6, "prompt_type": "qwen3"}
    scored = {"task": "mmlu", "task_data_path": tmp_path / "mmlu", "num_fewshot": 1, "log_samples": True}
    found = []
    for name, model in (("adapted", adapted), ("merged", {"load": tmp_path / "merged"}), ("base", {"load": tmp_path / "hf"})):
        answer = step("inference.py", **model, **asked).split("MindSpeed-LLM:\n")[1].split("\n====")[0]
        step("evaluation.py", **model, **scored, output_path=tmp_path / f"{name}-scores")
        samples = (tmp_path / f"{name}-scores" / "samples_mmlu_anatomy.jsonl").read_text().splitlines()
        found.append((answer, [response[0][0] for sample in map(json.loads, samples) for response in sample["resps"]]))
    (answer, likelihoods), merged, base = found
    assert answer == merged[0] and likelihoods == pytest.approx(merged[1], abs=1e-4)
    assert len(likelihoods) == 4 * QUESTIONS and likelihoods != pytest.approx(base[1], abs=1e-2), "the adapter must change the scores"
    # And peft itself says the same.
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    from mindspeed_lora.data.templates import load_template

    prompt = torch.tensor([load_template("qwen3").encode_prompt(tokenizer, [{"role": "user", "content": "Say number 3"}])])
    generated = load_peft(tmp_path / "hf", tmp_path / "peft").generate(input_ids=prompt, max_new_tokens=6, do_sample=False)
    assert answer == tokenizer.decode(generated[0, prompt.shape[1] :], skip_special_tokens=True)
