"""The training loop: one step per global batch, evaluation and saving in between."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch.profiler import record_function

from mindspeed_lora.arguments.configs import TrainConfig
from mindspeed_lora.checkpoint.resume import TrainerState
from mindspeed_lora.data.batches import EvalBatches, StepBatch
from mindspeed_lora.device import synchronize
from mindspeed_lora.log import get_logger
from mindspeed_lora.parallel.collectives import all_reduce
from mindspeed_lora.parallel.context import ParallelContext
from mindspeed_lora.parallel.pipeline import PipelineRunner
from mindspeed_lora.training.balance import ExpertBalance, token_shares
from mindspeed_lora.training.flops import FlopsModel
from mindspeed_lora.training.gradients import Gradients
from mindspeed_lora.training.guards import check_finite, check_lora_gradients
from mindspeed_lora.training.loss_scale import LossScaler
from mindspeed_lora.training.objective import Objective
from mindspeed_lora.training.optimizer import Optimizer
from mindspeed_lora.training.profiling import StepTrace
from mindspeed_lora.training.report import IterationReport, Recorder, validation_line
from mindspeed_lora.training.schedule import LearningRateSchedule


@dataclass(frozen=True)
class StepResult:
    """What one step gave; ``loss`` None: the batch had nothing to train and was skipped. ``metrics``: the objective's, by name.

    ``overflow``: gradients or loss left the range of fp16, and the step was skipped.
    """

    loss: float | None
    norm: float | None
    metrics: dict[str, float] = field(default_factory=dict)
    overflow: bool = False


@dataclass
class Interval:
    """Sums since the last printed line."""

    started: float = field(default_factory=time.perf_counter)
    iterations: int = 0
    losses: list[float] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)
    skipped: int = 0
    nan: int = 0  # of the skipped, with a loss that is no number
    tokens: int = 0
    documents: int = 0
    data_seconds: float = 0.0


@dataclass
class Totals:
    """Sums over the run, for the end report; ``seconds`` without saving and evaluating, ``data_seconds`` of them waiting for batches."""

    seconds: float = 0.0
    data_seconds: float = 0.0
    tokens: int = 0
    flops: float = 0.0
    iterations: int = 0


@dataclass(frozen=True)
class Machinery:
    """The parts that a step works with."""

    runner: PipelineRunner
    objective: Objective
    gradients: Gradients
    optimizer: Optimizer
    schedule: LearningRateSchedule
    flops: FlopsModel
    trains_lora: bool
    scaler: LossScaler | None  # None: not fp16
    balance: ExpertBalance | None = None  # None: no losses or statistics of experts

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of what a training step gives beside the loss."""
        return self.objective.metrics + (self.balance.names if self.balance is not None else ())


class Trainer:
    """Runs from ``state.iteration`` to ``config.train_iters``.

    ``save``: called with the state's iteration; collective, may raise. ``recorder``: on rank 0 only. ``trace``: on ranks that make one.
    """

    def __init__(
        self,
        config: TrainConfig,
        context: ParallelContext,
        parts: Machinery,
        state: TrainerState,
        validation: EvalBatches | None,
        global_batch_size: int,
        save: Callable[[], None] | None,
        recorder: Recorder | None,
        trace: StepTrace | None = None,
    ) -> None:
        self.config, self.context, self.parts, self.state = config, context, parts, state
        self.validation, self.global_batch_size = validation, global_batch_size
        self.save, self.recorder, self.trace = save, recorder, trace
        self.totals = Totals()
        self._record_scale()
        self._lora_checked = not parts.trains_lora
        self._saved_at: int | None = None
        self._evaluated_at: int | None = None

    def run(self, batches: Iterator[StepBatch]) -> None:
        """All remaining iterations, then the last evaluation and save."""
        if self.trace is not None:
            self.trace.before(self.state.iteration)
        interval = Interval()
        while self.state.iteration < self.config.train_iters:
            waiting = time.perf_counter()
            batch = next(batches)
            interval.data_seconds += time.perf_counter() - waiting
            result = self.step(batch)
            self._count(interval, batch, result)
            if self.state.iteration % self.config.log_interval == 0 or self.state.iteration == self.config.train_iters:
                self._log(interval, result)
                interval = Interval()
            self._between_steps(interval)
        if self.config.eval_iters > 0:
            self._evaluate()
        if self.save is not None and self._saved_at != self.state.iteration and self.totals.iterations:
            self._save()

    def _between_steps(self, interval: Interval) -> None:
        """End a trace, evaluate, save and begin a trace where it is time; nothing of it counts as training time."""
        started = time.perf_counter()
        if self.trace is not None:
            self.trace.after(self.state.iteration)
        iteration, every = self.state.iteration, self.config.save.save_interval
        if self.config.eval_interval and iteration % self.config.eval_interval == 0 and self.config.eval_iters > 0:
            self._evaluate()
        if self.save is not None and every and iteration % every == 0 and self._saved_at != iteration:
            self._save()
        if self.trace is not None:
            self.trace.before(iteration)
        interval.started += time.perf_counter() - started

    def _save(self) -> None:
        assert self.save is not None
        self.save()
        self._saved_at = self.state.iteration

    def step(self, batch: StepBatch) -> StepResult:
        """Forward and backward of the global batch, reductions, guards, update.

        Raises:
            MindSpeedLoraError: loss or gradient norm is not finite, or LoRA gets no gradient at all.
        """
        self.state.iteration += 1
        self.state.consumed_samples += self.global_batch_size
        self.state.skipped_samples += batch.skipped_samples
        parts = self.parts
        if parts.objective.count(batch) == 0:
            self.state.skipped_iterations += 1
            return StepResult(None, None)
        parts.gradients.zero()
        if parts.scaler is not None:
            parts.runner.loss_scale = parts.scaler.scale
        with record_function("forward and backward"):
            loss, *metrics = self._means(batch, training=True)
        if not self._lora_checked and loss > 0:
            check_lora_gradients(parts.gradients, self.context)
            self._lora_checked = True
        with record_function("reduce gradients"):
            parts.gradients.reduce()
        if parts.scaler is not None and self._overflowed(parts.scaler, loss, batch):
            self.state.skipped_iterations += 1
            return StepResult(loss, None, overflow=True)
        norm = parts.gradients.norm()
        check_finite(loss, norm, self.state.iteration, batch.sample_ids)
        with record_function("optimizer"):
            parts.gradients.clip(norm, self.config.optimizer.clip_grad)
            parts.optimizer.step(parts.schedule.at(self.state.schedule_samples))
            if parts.balance is not None and self.config.balance.bias_rate:
                parts.balance.update_biases(self.config.balance.bias_rate)
        self.state.schedule_samples += self.global_batch_size
        self.state.optimizer_steps += 1
        return StepResult(loss, norm, dict(zip(parts.metrics, metrics, strict=True)))

    def _overflowed(self, scaler: LossScaler, loss: float, batch: StepBatch) -> bool:
        """Take the loss scale out of the gradients and go on to the next step's; whether they or the loss left the range of fp16.

        Raises:
            MindSpeedLoraError: the scale cannot become smaller, and the loss is not finite or the steps before overflowed too.
        """
        overflow = not self.parts.gradients.unscale(scaler.scale) or not math.isfinite(loss)
        if scaler.at_minimum and not math.isfinite(loss):
            check_finite(loss, self.parts.gradients.norm(), self.state.iteration, batch.sample_ids)
        before = scaler.scale
        scaler.update(overflow)
        self._record_scale()
        if overflow:
            then = f"the scale is now {scaler.scale:g}" if scaler.scale < before else "the scale stays"
            get_logger().warning(f"iteration {self.state.iteration}: overflow in fp16 at loss scale {before:g}; skipped, {then}")
        return overflow

    def _record_scale(self) -> None:
        self.state.loss_scale = None if self.parts.scaler is None else self.parts.scaler.record()

    def _means(self, batch: StepBatch, training: bool) -> list[float]:
        """Loss and metrics, means over the global batch, on every rank; in training with a backward pass. Collective."""
        parts = self.parts
        inputs = parts.objective.inputs(batch, evaluating=not training)
        rows = (inputs.ids, inputs.labels, inputs.weights, inputs.micro_batch_size, batch.document_ends)
        shares = None
        if training:
            if parts.balance is not None:
                shares = token_shares(batch, self.context.dp_size, self.config.loss_normalization).to(self.context.device)
            losses = parts.runner.forward_backward(*rows, targets=inputs.targets, columns=batch.columns, token_shares=shares)
        else:
            losses = parts.runner.row_losses(*rows, columns=batch.columns)
        means = torch.zeros(1 + len(parts.objective.metrics), dtype=torch.float32, device=self.context.device)
        if self.context.is_last_stage and self.context.tp_rank == 0:
            means += parts.objective.values(losses, inputs)
        if training and parts.balance is not None:
            means = torch.cat((means, parts.balance.step_values(parts.runner.loss_scale)))
        all_reduce(means, self.context.model_group)
        return all_reduce(means, self.context.dp_group).tolist()

    def _count(self, interval: Interval, batch: StepBatch, result: StepResult) -> None:
        interval.iterations += 1
        interval.tokens += batch.num_real_tokens
        interval.documents += batch.num_documents
        if result.loss is None:
            interval.skipped += 1
            get_logger().warning(f"iteration {self.state.iteration}: no trained token in the whole global batch; skipped")
        elif result.overflow:
            interval.skipped += 1
            interval.nan += not math.isfinite(result.loss)
        else:
            interval.losses.append(result.loss)
            interval.metrics.append(result.metrics)
        self.totals.tokens += batch.num_real_tokens
        self.totals.flops += self.parts.flops.total(batch.num_real_tokens, batch.num_documents)
        self.totals.iterations += 1

    def _log(self, interval: Interval, result: StepResult) -> None:
        synchronize(self.context.device)
        seconds = time.perf_counter() - interval.started
        self.totals.seconds += seconds
        self.totals.data_seconds += interval.data_seconds
        flops = self.parts.flops.total(interval.tokens, interval.documents)
        share = self.parts.flops.core_attention(interval.tokens, interval.documents) / flops if flops else 0.0
        report = IterationReport(
            iteration=self.state.iteration,
            train_iters=self.config.train_iters,
            consumed_samples=self.state.consumed_samples,
            skipped_samples=self.state.skipped_samples,
            elapsed_ms=1000 * seconds / interval.iterations,
            data_ms=1000 * interval.data_seconds / interval.iterations,
            learning_rate=self.parts.schedule.at(self.state.schedule_samples),
            global_batch_size=self.global_batch_size,
            lm_loss=sum(interval.losses) / len(interval.losses) if interval.losses else None,
            grad_norm=result.norm,
            skipped_iterations=interval.skipped,
            loss_scale=1.0 if self.parts.scaler is None else self.parts.scaler.scale,
            nan_iterations=interval.nan,
            tokens_per_second=interval.tokens / seconds / self.context.world_size,
            teraflops=flops / seconds / self.context.world_size / 1e12,
            core_attention_percent=100 * share,
            metrics={
                name: sum(step[name] for step in interval.metrics) / len(interval.metrics)
                for name in (self.parts.metrics if interval.metrics else ())
            },
            experts=() if self.parts.balance is None else self.parts.balance.use_of_layers(),
        )
        get_logger().info(report.line(self.config.log_throughput))
        if self.recorder is not None:
            self.recorder.add(report.iteration, report.record(), report.scalars())

    def _evaluate(self) -> None:
        if self.validation is None or not len(self.validation) or self._evaluated_at == self.state.iteration:
            return
        self._evaluated_at = self.state.iteration
        loss, metrics = self.evaluate(self.validation)
        get_logger().info(validation_line(self.state.iteration, loss, metrics))
        if self.recorder is not None:
            record = {"iteration": self.state.iteration, "validation_loss": loss}
            record |= {f"validation_{name.replace('/', '_')}": value for name, value in metrics.items()}
            scalars = {f"{name} validation": value for name, value in {"lm loss": loss, **metrics}.items()}
            self.recorder.add(self.state.iteration, record, scalars)
        best = self.state.best_loss
        if self.config.save.save_best and self.save is not None and math.isfinite(loss) and (best is None or loss < best):
            self.state.best_loss, self.state.best_iteration = loss, self.state.iteration
            self._save()

    def evaluate(self, batches: EvalBatches) -> tuple[float, dict[str, float]]:
        """Mean loss over the validation samples (per trained token, or per pair), and the objective's metrics. Collective."""
        names = self.parts.objective.metrics
        totals, count = [0.0] * (1 + len(names)), 0
        for batch in batches:
            number = self.parts.objective.count(batch)
            if number:
                means = self._means(batch, training=False)
                totals = [total + number * mean for total, mean in zip(totals, means, strict=True)]
                count += number
        loss, *metrics = (total / max(count, 1) for total in totals)
        return loss, dict(zip(names, metrics, strict=True))
