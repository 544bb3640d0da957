"""The frozen model that a preference loss compares with, and its log-probabilities of a step's rows.

A LoRA policy is its own reference: the same weights, with the adapter left out or replaced by the one that training
started from (:func:`mindspeed_lora.lora.layers.as_reference`). Otherwise a second, frozen model lies beside the policy, cut
over the processes like it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from mindspeed_lora.arguments.configs import TrainConfig
from mindspeed_lora.checkpoint.load import load_adapter, load_base
from mindspeed_lora.checkpoint.reference import ReferencePoint
from mindspeed_lora.lora.inject import inject_lora
from mindspeed_lora.model.stage import GPTStage, build_stage_modules
from mindspeed_lora.parallel.context import ParallelContext
from mindspeed_lora.parallel.grouped import choose_products
from mindspeed_lora.parallel.on_demand import BaseStorage
from mindspeed_lora.parallel.pipeline import PipelineRunner
from mindspeed_lora.weights.config import ModelConfig
from mindspeed_lora.weights.table import WeightTable


@dataclass(frozen=True)
class Reference:
    """``shared``: the policy's stages, to be run without its adapter."""

    runner: PipelineRunner
    shared: Sequence[GPTStage] | None

    def row_losses(
        self, ids: torch.Tensor, labels: torch.Tensor, row_weights: torch.Tensor, micro_batch_size: int, columns: Sequence[int]
    ) -> torch.Tensor:
        """As :meth:`mindspeed_lora.parallel.pipeline.PipelineRunner.row_losses`, of the reference."""
        from mindspeed_lora.lora.layers import as_reference

        with as_reference(self.shared) if self.shared is not None else nullcontext():
            return self.runner.row_losses(ids, labels, row_weights, micro_batch_size, columns=columns)


def build_reference(
    point: ReferencePoint,
    config: TrainConfig,
    model: ModelConfig,
    dtype: torch.dtype,
    policy: PipelineRunner,
    stages: Sequence[GPTStage],
    storage: Callable[[], BaseStorage] | None,
) -> Reference:
    """Make the reference of ``point`` for the policy ``stages``, which ``policy`` runs; ``storage`` holds the weights of a second model
    as it does the policy's. Collective over the replica.
    """
    table, context = WeightTable(model), policy.context
    if point.shared:
        if point.adapter is not None:
            _freeze_adapter(point, stages, table, context)
        return Reference(policy, stages)
    frozen = build_stage_modules(model, context, dtype, config.parallel.layers_per_virtual_stage, make_storage=storage)
    for stage in frozen:
        if point.lora is not None:
            inject_lora(stage, table, point.lora, context)
        stage.requires_grad_(False)
    choose_products(frozen, model, config.runtime.moe_grouped_gemm)
    load_base(frozen, point.base, table, context)
    if point.adapter is not None:
        load_adapter(frozen, point.adapter, table, context)
    return Reference(PipelineRunner(frozen, context, config.pipeline_buffer_fraction), None)


@torch.no_grad()
def _freeze_adapter(point: ReferencePoint, stages: Sequence[GPTStage], table: WeightTable, context: ParallelContext) -> None:
    """Read the reference's adapter into the policy's, keep a copy of it, and give the policy its own values back."""
    from mindspeed_lora.lora.layers import ParallelLoraLinear

    assert point.adapter is not None
    parameters = [parameter for stage in stages for name, parameter in stage.named_parameters() if ".lora_" in name]
    own = [parameter.clone() for parameter in parameters]
    load_adapter(stages, point.adapter, table, context)
    for stage in stages:
        for module in stage.modules():
            if isinstance(module, ParallelLoraLinear):
                module.freeze_reference()
    for parameter, value in zip(parameters, own, strict=True):
        parameter.copy_(value)
