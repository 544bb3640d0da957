"""What a run prints and records: Megatron's iteration line, ``metrics.jsonl``, TensorBoard scalars."""

from __future__ import annotations

import importlib.util
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from mindspeed_lora.errors import DataError, UsageError
from mindspeed_lora.files import write_text
from mindspeed_lora.log import get_logger
from mindspeed_lora.training.balance import LayerUse

METRICS_NAME = "metrics.jsonl"


@dataclass(frozen=True)
class IterationReport:
    """One logged interval. Times are per iteration, rates per device; ``lm_loss`` is the interval's mean over its steps."""

    iteration: int
    train_iters: int
    consumed_samples: int
    skipped_samples: int
    elapsed_ms: float
    learning_rate: float
    global_batch_size: int
    lm_loss: float | None  # None: every step of the interval was skipped
    grad_norm: float | None
    skipped_iterations: int
    tokens_per_second: float
    teraflops: float
    core_attention_percent: float
    loss_scale: float = 1.0  # of the next step; other than 1 in fp16 only
    nan_iterations: int = 0  # skipped with a loss that is no number
    data_ms: float = 0.0  # of elapsed_ms, waiting for the batch
    metrics: Mapping[str, float] = field(default_factory=dict)  # means over the interval's steps, such as rewards/accuracies
    experts: tuple[LayerUse, ...] = ()  # with --moe-per-layer-logging

    @property
    def expert_use(self) -> dict[str, float]:
        """The busiest expert of all layers (times the mean), and how many experts had no token."""
        if not self.experts:
            return {}
        return {"experts/busiest": max(use.busiest for use in self.experts), "experts/idle": sum(use.idle for use in self.experts)}

    def line(self, throughput: bool, now: datetime | None = None) -> str:
        """The peer's line (MindSpeed-LLM v26.0.0 ``training_log``); a nan iteration stops a run here, except in fp16."""
        fields = [
            f" [{(now or datetime.now()).strftime('%Y-%m-%d %H:%M:%S')}] iteration {self.iteration:8d}/{self.train_iters:8d}",
            f"consumed samples: {self.consumed_samples:12d}",
        ]
        if self.skipped_samples:
            fields.append(f"skipped samples: {self.skipped_samples:12d}")
        fields.append(f"elapsed time per iteration (ms): {self.elapsed_ms:.1f}")
        if throughput:
            fields.append(f"throughput per GPU (TFLOP/s/GPU): {self.teraflops:.1f}")
            fields.append(f"core attn ratio (%): {self.core_attention_percent:.1f}")
        fields.append(f"learning rate: {self.learning_rate:.6E}")
        fields.append(f"global batch size: {self.global_batch_size:5d}")
        fields += [f"{name}: {value:.6E}" for name, value in self.metrics.items()]
        if self.lm_loss is not None and self.lm_loss > 0:
            fields.append(f"lm loss: {self.lm_loss:.6E}")
        if self.experts:
            busiest, idle = self.expert_use.values()
            fields.append(f"busiest expert: {busiest:.2f} x mean | experts without tokens: {idle:.0f}")
        fields.append(f"loss scale: {self.loss_scale:.1f}")
        if self.grad_norm is not None:
            fields.append(f"grad norm: {self.grad_norm:.3f}")
        fields.append(f"number of skipped iterations: {self.skipped_iterations:3d}")
        fields.append(f"number of nan iterations: {self.nan_iterations:3d}")
        return " | ".join(fields) + " |"

    def scalars(self) -> dict[str, float]:
        """Values by their TensorBoard names."""
        values = {
            "lm loss": self.lm_loss,
            "grad-norm": self.grad_norm,
            "learning-rate": self.learning_rate,
            "loss-scale": self.loss_scale,
            "iteration-time": self.elapsed_ms / 1000,
            "data-time": self.data_ms / 1000,
            "throughput": self.teraflops,
            "tokens-per-second-per-device": self.tokens_per_second,
            **self.metrics,
            **self.expert_use,
        }
        return {name: value for name, value in values.items() if value is not None}

    def record(self) -> dict[str, Any]:
        """One line of ``metrics.jsonl``."""
        return {
            "iteration": self.iteration,
            "consumed_samples": self.consumed_samples,
            "skipped_samples": self.skipped_samples,
            "lm_loss": self.lm_loss,
            "grad_norm": self.grad_norm,
            "learning_rate": self.learning_rate,
            "global_batch_size": self.global_batch_size,
            "elapsed_ms": self.elapsed_ms,
            "data_ms": self.data_ms,
            "tokens_per_second_per_device": self.tokens_per_second,
            "teraflops_per_device": self.teraflops,
            "loss_scale": self.loss_scale,
            "skipped_iterations": self.skipped_iterations,
            "nan_iterations": self.nan_iterations,
            **{name.replace("/", "_"): value for name, value in self.metrics.items()},
            **({"experts": [use.record() for use in self.experts]} if self.experts else {}),
        }


def validation_line(iteration: int, loss: float, metrics: Mapping[str, float] | None = None) -> str:
    """The peer's line after an evaluation; with ``metrics`` the loss is no log-probability, and has no perplexity."""
    fields = [f" validation loss at iteration {iteration}", f"lm loss value: {loss:.6E}"]
    if metrics:
        fields += [f"{name} value: {value:.6E}" for name, value in metrics.items()]
    else:
        fields.append(f"lm loss PPL: {math.exp(min(20.0, loss)):.6E}")
    return " | ".join(fields) + " |"


class Recorder:
    """Files of one run; only rank 0 has one. ``folder`` None: no ``metrics.jsonl``.

    ``start``: entries of later iterations are from a run that did not reach its next checkpoint, and are dropped.
    """

    def __init__(self, folder: Path | None, tensorboard_dir: Path | None, start: int) -> None:
        self._metrics: Path | None = None
        self._folders = " and ".join(str(each) for each in (folder, tensorboard_dir) if each is not None)
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UsageError(f"--save {folder}: the folder cannot be made ({error}); give one that you may write to") from error
            self._metrics = folder / METRICS_NAME
            self._drop_after(start)
        self._writer = _summary_writer(tensorboard_dir, start) if tensorboard_dir is not None else None

    def _drop_after(self, iteration: int) -> None:
        if self._metrics is None or not self._metrics.is_file():
            return
        lines = self._metrics.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and self._iteration_of(line) <= iteration]
        if len(kept) < len(lines):
            write_text(self._metrics, "".join(kept))

    def _iteration_of(self, line: str) -> int:
        try:
            return int(json.loads(line)["iteration"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self._metrics}: not a line of this program: {line.strip()[:80]!r}; remove the line or the file") from error

    def add(self, iteration: int, record: dict[str, Any], scalars: dict[str, float]) -> None:
        """Append a line and the scalars; where that fails, training goes on without them, and a warning says so."""
        with self._warning():
            if self._metrics is not None:
                self._append(self._metrics, json.dumps(record) + "\n")
            if self._writer is not None:
                for name, value in scalars.items():
                    self._writer.add_scalar(name, value, iteration)
                self._writer.flush()

    def close(self) -> None:
        """Flush."""
        if self._writer is not None:
            with self._warning():
                self._writer.close()

    @staticmethod
    def _append(path: Path, line: str) -> None:
        """The whole line, or none of it."""
        before = path.stat().st_size if path.exists() else 0
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError:
            with suppress(OSError):
                os.truncate(path, before)
            raise

    @contextmanager
    def _warning(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            get_logger().warning(f"metrics are lost: they cannot be written into {self._folders} ({error}); is the disk full?")


def _summary_writer(folder: Path, start: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    try:
        return SummaryWriter(str(folder), purge_step=start + 1)
    except OSError as error:
        raise UsageError(f"--tensorboard-dir {folder}: nothing can be written there ({error}); give another folder") from error


def tensorboard_installed() -> bool:
    """Whether scalars can be written."""
    return importlib.util.find_spec("tensorboard") is not None


def check_tensorboard(folder: Path | None) -> None:
    """Raise UsageError where ``--tensorboard-dir`` is passed and the package is missing."""
    if folder is not None and not tensorboard_installed():
        raise UsageError(
            f"--tensorboard-dir {folder}: the package tensorboard is not installed; pip install tensorboard, or leave the flag out"
        )


def print_block(title: str, lines: list[str]) -> None:
    """A titled block on rank 0."""
    get_logger().info("\n".join([f"---------------- {title} ----------------", *lines]))
