"""This project's training step on one device, as the trainer runs it: flat gradients, clipping, flat AdamW. For benchmarks."""

from __future__ import annotations

from collections.abc import Callable

import common

common.add_root_to_path()

import torch  # noqa: E402

from mindspeed_lora.arguments.configs import OptimizerFlags, RecomputeFlags  # noqa: E402
from mindspeed_lora.lora.inject import inject_lora  # noqa: E402
from mindspeed_lora.model.stage import GPTStage, build_stage_modules  # noqa: E402
from mindspeed_lora.parallel.context import ParallelContext, single_process_context  # noqa: E402
from mindspeed_lora.parallel.grouped import choose_products  # noqa: E402
from mindspeed_lora.parallel.on_demand import BaseStorage  # noqa: E402
from mindspeed_lora.parallel.pipeline import PipelineRunner  # noqa: E402
from mindspeed_lora.training.flat import FlatLayout  # noqa: E402
from mindspeed_lora.training.gradients import FlatGradients  # noqa: E402
from mindspeed_lora.training.optimizer import FlatAdamW  # noqa: E402
from mindspeed_lora.training.parameters import trained_parameters  # noqa: E402
from mindspeed_lora.weights.config import ModelConfig  # noqa: E402
from mindspeed_lora.weights.lora_spec import LoraSpec  # noqa: E402
from mindspeed_lora.weights.table import WeightTable  # noqa: E402

Step = Callable[[torch.Tensor], float]


def build_stage(
    model: ModelConfig,
    lora: LoraSpec | None,
    dtype: torch.dtype,
    recompute: RecomputeFlags,
    fusion: bool,
    device: torch.device,
    context: ParallelContext | None = None,
    make_storage: Callable[[], BaseStorage] | None = None,
) -> GPTStage:
    """The whole model on one device, or the part of the context's rank; base weights uninitialised."""
    context = context or single_process_context(device)
    (stage,) = build_stage_modules(model, context, dtype, None, recompute, make_storage)
    if lora is not None:
        inject_lora(stage, WeightTable(model), lora, context, fusion, seed=0)
    choose_products([stage], model, grouped=False)
    return stage


def step_of(stage: GPTStage, rows: int) -> Step:
    """One step over ids ``[rows * micro-batches, s]``, every position but the last trained; returns the mean loss."""
    context, table = stage.context, WeightTable(stage.model_config)
    layout = FlatLayout(trained_parameters([stage], table, context), context, False)
    flat, gradients = layout.flatten_parameters(), FlatGradients(layout, context, False)
    optimizer, runner = FlatAdamW(layout, flat, gradients, OptimizerFlags(), context), PipelineRunner([stage], context)

    def step(ids: torch.Tensor) -> float:
        labels = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
        weights = torch.full((ids.shape[0],), 1.0 / (ids.shape[0] * (ids.shape[1] - 1)), device=ids.device)
        gradients.zero()
        loss = runner.forward_backward(ids, labels, weights, rows).sum()
        gradients.reduce()
        gradients.clip(gradients.norm(), 1.0)
        optimizer.step(1e-4)
        return float(loss)

    return step


def frozen_step_of(stage: GPTStage) -> Step:
    """Forward and activation gradient of the bare frozen model: the floor of a LoRA step."""
    stage.requires_grad_(False)
    stage.embedding.register_forward_hook(lambda _module, _inputs, output: output.requires_grad_())
    stage.embedding.word_embeddings.register_forward_hook(lambda _module, _inputs, output: output.requires_grad_())

    def step(ids: torch.Tensor) -> float:
        labels = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
        loss = stage(ids, labels=labels).sum() / (ids.shape[0] * (ids.shape[1] - 1))
        loss.backward()
        return float(loss.detach())

    return step
