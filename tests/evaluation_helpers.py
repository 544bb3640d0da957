"""A few items of every benchmark, in the benchmarks' own layouts, out of the shared data; and how a run's items are read back."""

from __future__ import annotations

import contextlib
import gzip
import io
import itertools
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from helpers import shared_data

from mindspeed_lora.arguments.configs import (
    EvaluationConfig,
    LoadFlags,
    ParallelFlags,
    RuntimeFlags,
    TemplateFlags,
    TokenizerFlags,
)
from mindspeed_lora.errors import MindSpeedLoraError

Items = dict[tuple[str, int], list[Any]]
"""(task, document) -> log-likelihoods or texts of its requests."""

ALL = ("mmlu", "ceval", "cmmlu", "gsm8k", "boolq", "hellaswag", "bbh", "agieval", "human_eval")
SUBJECTS = {"mmlu": ("abstract_algebra", "anatomy"), "ceval": ("art_studies",), "cmmlu": ("arts",)}
HELLASWAG = [
    {
        "ind": index,
        "activity_label": "Walking the dog",
        "ctx_a": f"Tim has a dog number {index}.",
        "ctx_b": "they",
        "ctx": "unused",
        "split": "val",
        "split_type": "indomain",
        "label": label,
        "endings": ["run in the park. [title] Home", "eat a red ball.", "sleep  in the big tree.", "go to the moon [step] with mom."],
        "source_id": "activitynet~v_1",
    }
    for index, label in enumerate((0, 2, 3))
]


def _lines(source: Path, target: Path, count: int, most: int = 900) -> None:
    """The first ``count`` rows of at most ``most`` characters."""
    opener = gzip.open if source.suffix == ".gz" else open
    target.parent.mkdir(parents=True, exist_ok=True)
    with opener(source, "rt", encoding="utf-8") as file:
        target.write_text("".join(itertools.islice((line for line in file if len(line) <= most), count)))


def small_benchmarks(root: Path) -> Path:
    """``root/<benchmark>`` with a few items of each."""
    shared = shared_data()
    for name, folder, splits in (("mmlu", "mmlu/data", ("test", "dev")), ("ceval", "ceval", ("val", "dev"))):
        for split, subject in itertools.product(splits, SUBJECTS[name]):
            (root / name / split).mkdir(parents=True, exist_ok=True)
            file = f"{split}/{subject}_{split}.csv"
            (root / name / file).write_bytes((shared / folder / file).read_bytes())
    for split, subject in itertools.product(("test", "dev"), SUBJECTS["cmmlu"]):
        (root / "cmmlu" / split).mkdir(parents=True, exist_ok=True)
        file = f"{split}/{subject}.csv"
        (root / "cmmlu" / file).write_bytes((shared / "cmmlu" / "data" / file).read_bytes())
    for name, count in (("test", 3), ("train", 6)):
        _lines(shared / "gsm8k" / "grade_school_math" / "data" / f"{name}.jsonl", root / "gsm8k" / f"{name}.jsonl", count)
    _lines(shared / "boolq" / "dev.jsonl", root / "boolq" / "dev.jsonl", 3)
    for task in ("lsat-lr", "gaokao-physics", "jec-qa-kd", "math"):
        _lines(shared / "agieval" / "data" / "v1" / f"{task}.jsonl", root / "agieval" / f"{task}.jsonl", 3, 1500)
    _lines(shared / "humaneval" / "data" / "HumanEval.jsonl.gz", root / "human_eval" / "HumanEval.jsonl", 2, 2000)
    (root / "bbh").mkdir()
    for task in ("snarks", "object_counting"):
        content = json.loads((shared / "bbh" / "bbh" / f"{task}.json").read_text())
        (root / "bbh" / f"{task}.json").write_text(json.dumps({"examples": content["examples"][:3]}))
    (root / "hellaswag").mkdir()
    (root / "hellaswag" / "hellaswag_val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in HELLASWAG))
    return root


def config_for(
    folder: Path, data: Path | tuple[Path, ...], output: Path | None = None, tp: int = 1, pp: int = 1, **changes: Any
) -> EvaluationConfig:
    config = EvaluationConfig(
        ParallelFlags(tp, pp),
        RuntimeFlags(device="cpu"),
        LoadFlags(load=folder),
        TokenizerFlags(shared_data() / "stories260k" / "hf"),
        TemplateFlags(),
        ("mmlu",),
        (data,) if isinstance(data, Path) else data,
        num_fewshot=1,
        max_eval_samples=3,
        evaluation_batch_size=2,
        output_path=output,
        log_samples=True,
    )
    return replace(config, **changes)


def run_evaluate(config: EvaluationConfig) -> tuple[int, str]:
    from mindspeed_lora.evaluation.run import evaluate

    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        try:
            code = evaluate(config)
        except MindSpeedLoraError as error:
            code = error.exit_code
            out.write(f"ERROR {error}")
    return code, out.getvalue()


def items_of(samples: dict[str, list[dict[str, Any]]]) -> Items:
    """What lm_eval logs of each item."""
    return {
        (task, sample["doc_id"]): [response[0][0] if isinstance(response[0], list | tuple) else response[0] for response in sample["resps"]]
        for task, own in samples.items()
        for sample in own
    }


def written_items(folder: Path, prefix: str = "samples_") -> Items:
    """The same from ``samples_<task>.jsonl``."""
    files = [path for path in sorted(folder.glob(f"{prefix}*.jsonl")) if prefix != "samples_" or not path.name.startswith("samples_base_")]
    return items_of({path.stem.removeprefix(prefix): [json.loads(line) for line in path.read_text().splitlines()] for path in files})


def log_likelihoods(items: Items, tasks: Iterable[str]) -> torch.Tensor:
    """Of the items of ``tasks``, float64 ``[n]``, in an order that does not depend on who answered them."""
    chosen = [items[item] for item in sorted(items) if item[0] in set(tasks) and not isinstance(items[item][0], str)]
    return torch.tensor([value for values in chosen for value in values], dtype=torch.float64)


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


def reference_items(config: EvaluationConfig, model: Any) -> tuple[Items, list[Any]]:
    """lm_eval's transformers backend on the same jobs: items, and the results of each job."""
    import transformers
    from lm_eval.models.huggingface import HFLM

    from mindspeed_lora.evaluation.jobs import prepare_jobs, run_job

    class Short(HFLM):
        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            for request in requests if config.max_new_tokens else ():
                request.arguments = (request.arguments[0], {**request.arguments[1], "max_gen_toks": config.max_new_tokens})
            return super().generate_until(requests, disable_tqdm)

    tokenizer = transformers.AutoTokenizer.from_pretrained(config.tokenizer.name_or_path)
    found: Items = {}
    results = []
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        lm = Short(pretrained=model, tokenizer=tokenizer, batch_size=config.evaluation_batch_size or 2)
        for job in prepare_jobs(config):
            results.append(run_job(lm, job, config.max_eval_samples, config.template.hf_chat_template))
            found |= items_of(results[-1].samples)
    return found, results
