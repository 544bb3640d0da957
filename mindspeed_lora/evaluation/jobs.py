"""One ``--task``: how lm_eval sees it, and what it came to."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

from mindspeed_lora.arguments.configs import EvaluationConfig
from mindspeed_lora.errors import UsageError
from mindspeed_lora.evaluation.benchmarks import BENCHMARKS, canonical_name
from mindspeed_lora.evaluation.package import TaskSettings
from mindspeed_lora.evaluation.tasks_named import load_named
from mindspeed_lora.log import get_logger

if TYPE_CHECKING:
    from mindspeed_lora.evaluation.lm import ParallelLM

FEWSHOT_SEED = 1234  # lm_eval's own, for tasks that draw their examples
PREFERRED_METRICS = ("acc", "exact_match")


@dataclass(frozen=True)
class Job:
    """``load``: a fresh dictionary of lm_eval's tasks, for one run. ``metric``, ``filter``: the score; None: what its items say."""

    name: str
    load: Callable[[], dict[str, Any]]
    metric: str | None = None
    filter: str | None = None


@dataclass(frozen=True)
class JobResult:
    """``results``: lm_eval's dictionary without the samples; ``samples``: its lists, by task; ``complete`` False: interrupted."""

    name: str
    metric: str
    filter: str
    results: dict[str, Any]
    samples: dict[str, list[dict[str, Any]]]
    complete: bool = True

    def items(self, task: str) -> dict[int, float]:
        """The score of each item that has one number."""
        chosen = (sample for sample in self.samples[task] if sample["filter"] == self.filter)
        return {sample["doc_id"]: float(value) for sample in chosen if isinstance(value := sample.get(self.metric), int | float)}


def prepare_jobs(config: EvaluationConfig) -> list[Job]:
    """First rank, before anything heavy: check the values, find and read the benchmarks' files.

    Raises:
        UsageError: a flag is missing or contradicts the task.
        DataError: a file is missing or malformed.
    """
    names = [canonical_name(task) for task in config.tasks]
    if len(set(names)) < len(names):
        raise UsageError(f"--task {' '.join(config.tasks)}: a benchmark is named twice; name each once")
    paths = config.task_data_path
    if len(paths) not in (0, 1, len(names)):
        raise UsageError(f"--task-data-path: {len(paths)} folders for {len(names)} tasks; give one for all, or one for each in their order")
    each = paths if len(paths) == len(names) else [*paths, None][:1] * len(names)
    return [_prepare(config, name, path, len(names) > 1 == len(paths)) for name, path in zip(names, each, strict=True)]


def _prepare(config: EvaluationConfig, name: str, path: Any, shared: bool) -> Job:
    """``shared``: the folder is that of several tasks; a folder of the task's name in it is its own."""
    benchmark = BENCHMARKS.get(name)
    if path is not None and not path.is_dir():
        needs = f"; --task {name} needs a folder with {benchmark.files}; get them from {benchmark.source}" if benchmark is not None else ""
        raise UsageError(f"--task-data-path {path}: no such folder{needs}")
    if shared and (path / name).is_dir():
        path = path / name
    if benchmark is None:

        def load() -> dict[str, Any]:
            with only_our_output():
                return _with_fewshot(load_named(name, path, tuple(BENCHMARKS)), config.num_fewshot)

        load()
        return Job(name, load)
    if path is None:
        raise UsageError(
            f"--task-data-path is missing: --task {name} needs a folder with {benchmark.files}; get them from {benchmark.source}"
        )
    if benchmark.runs_code and not config.confirm_run_unsafe_code:
        raise UsageError(
            f"--task {name} runs programs that the model wrote; pass --confirm-run-unsafe-code to allow it (docs/evaluation.md says what "
            "they are kept from)"
        )
    if config.max_new_tokens is not None and not benchmark.generates:
        get_logger().info(f"note: --max-new-tokens has no effect on {name}: it compares log-likelihoods and generates nothing")
    settings = benchmark.tasks(path, config.num_fewshot)
    return Job(name, lambda: from_settings(settings), benchmark.metric, benchmark.filter)


def from_settings(settings: list[TaskSettings]) -> dict[str, Any]:
    """lm_eval's tasks of these settings; a new dictionary, and new tasks, at each call."""
    from lm_eval.tasks import TaskManager

    with only_our_output():
        return dict(TaskManager(include_defaults=False).load([dict(task) for task in settings]))


def _with_fewshot(loaded: dict[str, Any], num_fewshot: int | None) -> dict[str, Any]:
    """As lm_eval's command line does: a task that says 0 keeps it."""
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        task.set_config(key="num_fewshot", value=own or 0 if num_fewshot is None or own == 0 else num_fewshot)
    return loaded


def run_job(lm: Any, job: Job, limit: int | None, chat_template: bool = False) -> JobResult:
    """lm_eval's own evaluation, offline. Where ``lm`` was interrupted, of the items that it had answered by then."""
    from lm_eval.evaluator import evaluate as lm_evaluate

    loaded = job.load()
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    with only_our_output():
        results = lm_evaluate(
            lm,
            loaded,
            limit=limit,
            log_samples=True,
            confirm_run_unsafe_code=True,  # asked in _prepare, by our own flag
            apply_chat_template=chat_template,
            fewshot_as_multiturn=chat_template,
        )
    assert results is not None
    content = dict(results)
    samples = content.pop("samples")
    complete = not getattr(lm, "interrupted", False)
    if not complete:
        samples = {name: _answered(lm, loaded["tasks"][name], own) for name, own in samples.items()}
        samples = {name: own for name, own in samples.items() if own}
    metric, chosen = _score_of(job, samples)
    return JobResult(job.name, metric, chosen, content, samples, complete)


def _answered(lm: ParallelLM, task: Any, samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    from mindspeed_lora.evaluation.lm import request_key

    missing = {instance.doc_id for instance in task.instances if request_key(instance) not in lm.answers}
    return [sample for sample in samples if sample["doc_id"] not in missing]


def _score_of(job: Job, samples: Mapping[str, list[dict[str, Any]]]) -> tuple[str, str]:
    """(metric, filter) that counts: the benchmark's, or the first of the usual ones that the items have."""
    if job.metric is not None and job.filter is not None:
        return job.metric, job.filter
    first = next((sample for own in samples.values() for sample in own), None)
    if first is None:
        return PREFERRED_METRICS[0], "none"
    metrics = list(first["metrics"])
    return next((metric for metric in PREFERRED_METRICS if metric in metrics), metrics[0]), first["filter"]


@contextmanager
def only_our_output(stderr: TextIO | None = None) -> Iterator[None]:
    """lm_eval draws a bar per subject and warns of what is meant; its errors still raise."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with contextlib.ExitStack() as stack:
        stack.callback(logger.setLevel, level)
        stack.callback((stderr or sys.stderr).flush)
        stack.enter_context(redirect_stderr(io.StringIO()))
        yield
