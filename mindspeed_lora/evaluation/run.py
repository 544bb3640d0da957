"""``evaluation.py``: scores the base, or base and unmerged adapter, at the layout it was trained in, through lm_eval.

```
first rank: prepare_jobs -> every rank: open_session -> lead -> first driver: score each job, print, write
                                                               other drivers: follow; workers: serve
```
"""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mindspeed_lora.arguments.configs import EvaluationConfig
from mindspeed_lora.errors import UsageError
from mindspeed_lora.evaluation.batching import BatchRule, Room, measure_room
from mindspeed_lora.evaluation.jobs import FEWSHOT_SEED, Job, JobResult, prepare_jobs, run_job
from mindspeed_lora.evaluation.results import (
    BASE_RESULTS_NAME,
    RESULTS_NAME,
    check_output,
    compare_results,
    comparison_line,
    other_metrics,
    results_content,
    score_line,
    table,
    total,
    write_results,
    write_samples,
)
from mindspeed_lora.evaluation.statistics import Comparison
from mindspeed_lora.inference.channel import RankDied, StoppedElsewhere
from mindspeed_lora.inference.interrupt import Terminated
from mindspeed_lora.inference.session import Session, lead, open_session
from mindspeed_lora.log import get_logger
from mindspeed_lora.parallel.collectives import gather_objects

if TYPE_CHECKING:
    from mindspeed_lora.evaluation.lm import ParallelLM
    from mindspeed_lora.inference.engine import Engine


def evaluate(config: EvaluationConfig) -> int:
    """Score every task; the first rank prints and writes.

    Returns:
        Exit code: 0, or on the other ranks that of the rank that raised.

    Raises:
        MindSpeedLoraError: on the rank that met the error.
        KeyboardInterrupt: interrupted; what was scored until then is printed and written.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before lm_eval and datasets are imported: nothing is downloaded
    jobs: list[Job] = []
    try:
        session = open_session(
            config, all_replicas=True, prepare=lambda: jobs.extend(_prepare(config)), examine=lambda session: _examine(config, session)
        )
    except StoppedElsewhere as stopped:
        return stopped.exit_code
    rule = _batch_rule(config, session)
    return lead(session, lambda engine: _work(config, session, engine, jobs, rule))


def _prepare(config: EvaluationConfig) -> list[Job]:
    for flag, value, least in (
        ("--max-eval-samples", config.max_eval_samples, 1),
        ("--evaluation-batch-size", config.evaluation_batch_size, 1),
        ("--num-fewshot", config.num_fewshot, 0),
    ):
        if value is not None and value < least:
            raise UsageError(f"{flag} {value} must be at least {least}")
    check_output(config.output_path)
    return prepare_jobs(config)


def _examine(config: EvaluationConfig, session: Session) -> None:
    if config.compare_base and not session.adapters:
        raise UsageError("--compare-base: there is no adapter to compare with the base; pass --lora-load")


def _batch_rule(config: EvaluationConfig, session: Session) -> BatchRule:
    """Collective over all ranks: what the one with the least room can do."""
    assert session.stage is not None
    layers, ranks_here = len(session.stage.layer_range), int(os.environ.get("LOCAL_WORLD_SIZE", session.context.world_size))
    own = measure_room(session.model, layers, session.context, session.stage.dtype, ranks_here)
    rooms = cast("list[Room]", gather_objects(own, session.channels.world))
    return BatchRule(config.evaluation_batch_size, functools.reduce(Room.common, rooms))


def _work(config: EvaluationConfig, session: Session, engine: Engine, jobs: list[Job], rule: BatchRule) -> None:
    """Driver of each replica: the first runs the benchmarks, the others do their share of the rows."""
    from mindspeed_lora.evaluation.lm import ParallelLM, work_handlers
    from mindspeed_lora.evaluation.replicas import Replicas

    context = session.context
    handlers: dict[str, Callable[..., Any]] = work_handlers(engine, session.tokenizer)
    replicas = Replicas(handlers, session.channels.drivers, context.replica_rank, context.replicas, engine.undisturbed)
    if context.replica_rank > 0:
        replicas.follow()
        return
    lm = ParallelLM(
        replicas,
        session.tokenizer,
        session.prompt_format,
        session.stop_ids,
        session.max_length,
        rule,
        progress_out=sys.stderr,
        max_new_tokens=config.max_new_tokens,
    )
    try:
        _score_all(config, session, lm, jobs)
    finally:
        replicas.release()


def _score_all(config: EvaluationConfig, session: Session, lm: ParallelLM, jobs: list[Job]) -> None:
    report = Report(config, session)
    for job in jobs:
        if config.compare_base:
            lm.use_adapter(True)
        report.add(_score(config, session, lm, job))
        if config.compare_base and lm.stopped_by is None:
            lm.use_adapter(False)
            report.add_base(_score(config, session, lm, job))
        report.write()
        if isinstance(lm.stopped_by, Terminated):
            raise RankDied("SIGTERM: another process of this run has died or was ended (torchrun says which), or somebody ended the run")
        if lm.stopped_by is not None:
            raise lm.stopped_by


def _score(config: EvaluationConfig, session: Session, lm: ParallelLM, job: Job) -> JobResult:
    lm.answers.clear()
    return run_job(lm, job, config.max_eval_samples, session.prompt_format.use_chat_template)


@dataclass
class Report:
    """Prints each benchmark when it is done, and writes all of them so far."""

    config: EvaluationConfig
    session: Session
    results: list[JobResult] = field(default_factory=list)
    base: list[JobResult] = field(default_factory=list)
    comparisons: dict[str, Comparison] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder = self.config.output_path or default_output(self.config)

    def add(self, result: JobResult) -> None:
        """Print the table and the line of one benchmark."""
        self.results.append(result)
        self._print(result, "")
        if self.config.log_samples:
            write_samples(self.folder, result)

    def add_base(self, result: JobResult) -> None:
        """The same without the adapter, and the comparison."""
        self.base.append(result)
        self._print(result, " (base, without the adapter)")
        if self.config.log_samples:
            write_samples(self.folder, result, "samples_base")
        found = compare_results(result, self.results[-1])
        if found is not None:
            self.comparisons[result.name] = found
            print(comparison_line(result.name, found), flush=True)

    def _print(self, result: JobResult, whose: str) -> None:
        if not result.complete:
            get_logger().warning(f"{result.name}: interrupted; the scores below are of the items that were done")
        text = table(result) if total(result) else other_metrics(result)
        print(f"\n{result.name}{whose}: {result.metric}, {result.filter}\n{text}\n\n{score_line(result)}", flush=True)

    def write(self) -> None:
        """``results.json`` (and ``results_base.json``) over all benchmarks so far."""
        config, prompt = self.config, self.session.prompt_format
        scored = {
            **self.session.scored,
            "prompt_format": prompt.name,
            "thinking": prompt.thinking,
            "task_data_path": [str(path) for path in config.task_data_path],
        }
        settings = {
            "batch_size": config.evaluation_batch_size or "auto",
            "limit": config.max_eval_samples,
            "num_fewshot": config.num_fewshot,
            "fewshot_seed": FEWSHOT_SEED,
        }
        path = write_results(self.folder, RESULTS_NAME, results_content(self.results, scored, settings, self.comparisons))
        if self.base:
            without = {**scored, "lora": None, "lora_load": None, "lora_iteration": None, "lora_fingerprints": {}, "manifest": None}
            write_results(self.folder, BASE_RESULTS_NAME, results_content(self.base, without, settings))
        get_logger().info(f"wrote {path}")


def default_output(config: EvaluationConfig) -> Path:
    """A folder of its own for each run, named after the adapter, or the base where there is none."""
    checkpoint = config.load.lora_load or config.load.load
    assert checkpoint is not None
    return Path("evaluation_results") / f"{checkpoint.resolve().name}-{time.strftime('%Y%m%d-%H%M%S')}"
