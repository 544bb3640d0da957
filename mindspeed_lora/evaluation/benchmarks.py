"""Every benchmark whose own files are read here: what it expects, where that comes from, and what counts as its score.

The table in docs/evaluation.md is this one. Any other ``--task`` is a task of lm_eval's, see :mod:`tasks_named`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mindspeed_lora.evaluation.package import TaskSettings
from mindspeed_lora.evaluation.tasks_code import METRIC as PASS_AT_1
from mindspeed_lora.evaluation.tasks_code import load_humaneval
from mindspeed_lora.evaluation.tasks_exams import CEVAL, CMMLU, MMLU
from mindspeed_lora.evaluation.tasks_texts import load_agieval, load_bbh, load_boolq, load_gsm8k, load_hellaswag


@dataclass(frozen=True)
class Benchmark:
    """``load``: (folder, number of solved examples, where to get the files) -> lm_eval's settings of its tasks.

    ``metric`` and ``filter``, as lm_eval names them, are the score; ``num_fewshot`` the usual number of examples; ``lm_eval``: the
    task or group of lm_eval's whose prompts and metrics it has; ``also``: other names of it; ``runs_code``: programs that the model
    wrote are run.
    """

    load: Callable[[Path, int, str], list[TaskSettings]]
    files: str
    source: str
    lm_eval: str
    metric: str = "acc"
    filter: str = "none"
    num_fewshot: int = 0
    generates: bool = False
    runs_code: bool = False
    also: tuple[str, ...] = ()

    def tasks(self, path: Path, num_fewshot: int | None) -> list[TaskSettings]:
        """Read every file, and so check it.

        Raises:
            UsageError: more solved examples than there are.
            DataError: a file is missing or malformed.
        """
        return self.load(path, self.num_fewshot if num_fewshot is None else num_fewshot, f"get them from {self.source}")


_BBH_FILES = "<task>.json"
_BBH_SOURCE = "https://github.com/suzgunmirac/BIG-Bench-Hard (bbh/)"

BENCHMARKS: dict[str, Benchmark] = {
    "mmlu": Benchmark(MMLU.load, MMLU.expected, "https://github.com/hendrycks/test (data.tar)", "mmlu", num_fewshot=5, also=("mmlu_ppl",)),
    "ceval": Benchmark(
        CEVAL.load, CEVAL.expected, "https://huggingface.co/datasets/ceval/ceval-exam (ceval-exam.zip)", "ceval-valid", num_fewshot=5
    ),
    "cmmlu": Benchmark(CMMLU.load, CMMLU.expected, "https://github.com/haonan-li/CMMLU (data/)", "cmmlu", num_fewshot=5),
    "gsm8k": Benchmark(
        load_gsm8k,
        "test.jsonl and train.jsonl (question, answer)",
        "https://github.com/openai/grade-school-math (grade_school_math/data)",
        "gsm8k",
        "exact_match",
        "strict-match",
        num_fewshot=5,
        generates=True,
    ),
    "boolq": Benchmark(
        load_boolq,
        "dev.jsonl (passage, question, answer)",
        "https://github.com/google-research-datasets/boolean-questions",
        "boolq",
    ),
    "hellaswag": Benchmark(
        load_hellaswag,
        "hellaswag_val.jsonl (activity_label, ctx_a, ctx_b, endings, label)",
        "https://github.com/rowanz/hellaswag (data/)",
        "hellaswag",
    ),
    "bbh": Benchmark(
        load_bbh("cot_fewshot"),
        _BBH_FILES,
        _BBH_SOURCE,
        "bbh_cot_fewshot",
        "exact_match",
        "get-answer",
        num_fewshot=3,
        generates=True,
        also=("bbh_cot_fewshot",),
    ),
    "bbh_fewshot": Benchmark(load_bbh("fewshot"), _BBH_FILES, _BBH_SOURCE, "bbh_fewshot", "exact_match", num_fewshot=3, generates=True),
    "bbh_zeroshot": Benchmark(
        load_bbh("zeroshot"), _BBH_FILES, _BBH_SOURCE, "bbh_zeroshot", "exact_match", "flexible-extract", generates=True
    ),
    "bbh_cot_zeroshot": Benchmark(
        load_bbh("cot_zeroshot"), _BBH_FILES, _BBH_SOURCE, "bbh_cot_zeroshot", "exact_match", "flexible-extract", generates=True
    ),
    "agieval": Benchmark(
        load_agieval,
        "<task>.jsonl (passage, question, options, label, answer)",
        "https://github.com/ruixiangcui/AGIEval (data/v1)",
        "agieval",
        generates=True,
    ),
    "human_eval": Benchmark(
        load_humaneval,
        "HumanEval.jsonl or HumanEval.jsonl.gz (task_id, prompt, entry_point, test)",
        "https://github.com/openai/human-eval (data/)",
        "humaneval",
        PASS_AT_1,
        "create_test",
        generates=True,
        runs_code=True,
        also=("humaneval",),
    ),
}


def canonical_name(task: str) -> str:
    """The benchmark's own name of what ``--task`` calls it, or ``task`` itself."""
    return next((name for name, benchmark in BENCHMARKS.items() if task in benchmark.also), task)
