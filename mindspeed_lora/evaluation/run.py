"""``evaluation.py``: scores the base, or base and unmerged adapter, at the layout it was trained in, through lm_eval."""

from __future__ import annotations

import functools
import io
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

from mindspeed_lora.arguments.configs import EvaluationConfig
from mindspeed_lora.errors import UsageError
from mindspeed_lora.evaluation.batching import BatchRule, Room, measure_room
from mindspeed_lora.evaluation.results import check_output, score_line, subject_scores, table, write_results
from mindspeed_lora.evaluation.tasks_mmlu import mmlu_tasks
from mindspeed_lora.inference.channel import StoppedElsewhere
from mindspeed_lora.inference.session import Session, lead, open_session
from mindspeed_lora.log import get_logger
from mindspeed_lora.parallel.collectives import gather_objects

if TYPE_CHECKING:
    from mindspeed_lora.inference.engine import Engine


@dataclass(frozen=True)
class Benchmark:
    """A value of ``--task``: how its files become lm_eval tasks, and whether the model writes or only ranks answers."""

    load: Callable[[Path, int | None], list[dict[str, Any]]]
    generates: bool = False


BENCHMARKS = {"mmlu": Benchmark(mmlu_tasks)}


def evaluate(config: EvaluationConfig) -> int:
    """Score every task; the first rank prints and writes.

    Returns:
        Exit code: 0, or on the other ranks that of the rank that raised.

    Raises:
        MindSpeedLoraError: on the rank that met the error.
    """
    tasks: dict[str, list[dict[str, Any]]] = {}
    try:
        session = open_session(config, all_replicas=True, prepare=lambda: tasks.update(_prepare(config)))
    except StoppedElsewhere as stopped:
        return stopped.exit_code
    rule = _batch_rule(config, session)
    return lead(session, lambda engine: _work(config, session, engine, tasks, rule))


def _prepare(config: EvaluationConfig) -> dict[str, list[dict[str, Any]]]:
    """First rank, before anything heavy: check the values and read the benchmarks' files."""
    unknown = [task for task in config.tasks if task not in BENCHMARKS]
    if unknown or not config.tasks:
        raise UsageError(f"--task {' '.join(unknown) or 'is missing'}: not supported yet; use {', '.join(BENCHMARKS)}")
    for flag, value, least in (
        ("--max-eval-samples", config.max_eval_samples, 1),
        ("--evaluation-batch-size", config.evaluation_batch_size, 1),
        ("--num-fewshot", config.num_fewshot, 0),
    ):
        if value is not None and value < least:
            raise UsageError(f"{flag} {value} must be at least {least}")
    check_output(config.output_path)
    for task in config.tasks:
        if config.max_new_tokens is not None and not BENCHMARKS[task].generates:
            get_logger().info(f"note: --max-new-tokens has no effect on {task}: it compares log-likelihoods and generates nothing")
    return {task: BENCHMARKS[task].load(config.task_data_path, config.num_fewshot) for task in config.tasks}


def _batch_rule(config: EvaluationConfig, session: Session) -> BatchRule:
    """Collective over all ranks: what the one with the least room can do."""
    assert session.stage is not None
    layers, ranks_here = len(session.stage.layer_range), int(os.environ.get("LOCAL_WORLD_SIZE", session.context.world_size))
    own = measure_room(session.model, layers, session.context, session.stage.dtype, ranks_here)
    rooms = cast("list[Room]", gather_objects(own, session.channels.world))
    return BatchRule(config.evaluation_batch_size, functools.reduce(Room.common, rooms))


def _work(config: EvaluationConfig, session: Session, engine: Engine, tasks: dict[str, list[dict[str, Any]]], rule: BatchRule) -> None:
    """Driver of each replica: the first runs the benchmarks, the others do their share of the rows."""
    from mindspeed_lora.evaluation.lm import ParallelLM, work_handlers
    from mindspeed_lora.evaluation.replicas import Replicas

    context = session.context
    replicas = Replicas(work_handlers(engine, session.tokenizer), session.channels.drivers, context.dp_rank, context.dp_size)
    if context.dp_rank > 0:
        replicas.follow()
        return
    try:
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
        for benchmark in config.tasks:
            _report(config, session, benchmark, run_tasks(lm, tasks[benchmark], config.max_eval_samples))
    finally:
        replicas.release()


def run_tasks(lm: Any, tasks: list[dict[str, Any]], limit: int | None) -> dict[str, Any]:
    """lm_eval's own evaluation of ``tasks``, offline; its result dictionary with the samples."""
    from lm_eval.evaluator import evaluate as lm_evaluate
    from lm_eval.tasks import TaskManager

    with _only_our_progress(sys.stderr):
        loaded = TaskManager(include_defaults=False).load(tasks)
        results = lm_evaluate(lm, loaded, limit=limit, log_samples=True)
    assert results is not None
    return dict(results)


@contextmanager
def _only_our_progress(stderr: TextIO) -> Iterator[None]:
    """lm_eval draws a bar per subject and warns of what is meant; its errors still raise."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        stderr.flush()


def _report(config: EvaluationConfig, session: Session, benchmark: str, results: dict[str, Any]) -> None:
    scores = subject_scores(results)
    print(f"\n{table(scores)}\n\n{score_line(benchmark, scores)}", flush=True)
    scored = {
        **session.scored,
        "prompt_format": session.prompt_format.name,
        "thinking": session.prompt_format.thinking,
        "task_data_path": str(config.task_data_path),
        "max_eval_samples": config.max_eval_samples,
        "evaluation_batch_size": config.evaluation_batch_size,
    }
    output = config.output_path or default_output(config)
    folder = output if len(config.tasks) == 1 else output / benchmark
    paths = write_results(folder, benchmark, results, scored)
    get_logger().info(f"wrote {paths[-1]} and {len(paths) - 1} files of items beside it")


def default_output(config: EvaluationConfig) -> Path:
    """A folder of its own for each run, named after the adapter, or the base where there is none."""
    checkpoint = config.load.lora_load or config.load.load
    assert checkpoint is not None
    return Path("evaluation_results") / f"{checkpoint.resolve().name}-{time.strftime('%Y%m%d-%H%M%S')}"
