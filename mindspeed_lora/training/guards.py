"""Checks that run by default: what can go wrong without an error message is looked for and named."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist

from mindspeed_lora.checkpoint.together import together
from mindspeed_lora.errors import MindSpeedLoraError
from mindspeed_lora.parallel.collectives import Group, all_reduce
from mindspeed_lora.parallel.context import ParallelContext
from mindspeed_lora.training.flat import TrainedParameter, by_grid
from mindspeed_lora.training.gradients import Gradients

_SHOWN_SAMPLES = 32


def check_finite(loss: float, norm: float, iteration: int, sample_ids: Sequence[int]) -> None:
    """Stop on a loss or gradient norm that is no number.

    Raises:
        MindSpeedLoraError: naming the records of the batch.
    """
    if math.isfinite(loss) and math.isfinite(norm):
        return
    shown = ", ".join(str(sample) for sample in sample_ids[:_SHOWN_SAMPLES])
    more = f" and {len(sample_ids) - _SHOWN_SAMPLES} more" if len(sample_ids) > _SHOWN_SAMPLES else ""
    raise MindSpeedLoraError(
        f"iteration {iteration}: lm loss {loss}, grad norm {norm}; the weights were left as they were. "
        f"Records of this batch (numbers in the data): {shown}{more}. Look at them, lower --lr, or check the base model's weights"
    )


def check_lora_gradients(gradients: Gradients, context: ParallelContext) -> None:
    """After the first backward passes: some LoRA B on every stage that has any must have a gradient (A has none while B is zero).

    Raises:
        MindSpeedLoraError: naming the stage; every rank raises.
    """
    largest = torch.zeros((), device=context.device)
    matrices = [gradient for item, gradient in gradients.views() if ".lora_B." in item.name]
    for gradient in matrices:
        peak = gradient.abs().max()
        largest = torch.maximum(largest, peak.nan_to_num(nan=math.inf))  # an overflow of fp16 is not nothing
    all_reduce(largest, context.tp_group, dist.ReduceOp.MAX)
    all_reduce(largest, context.dp_group, dist.ReduceOp.MAX)
    dead = torch.zeros(context.pp_size, device=context.device)
    dead[context.pp_rank] = float(largest == 0 and bool(matrices))
    all_reduce(dead, context.model_group, dist.ReduceOp.MAX)
    if bool(dead.any()):
        stages = ", ".join(str(stage) for stage, value in enumerate(dead.tolist()) if value)
        raise MindSpeedLoraError(
            f"the gradients of all LoRA B matrices of pipeline stage {stages} are exactly zero after the first step: "
            "nothing would be trained. "
            "Are all labels of the batch ignored, or the base model's weights zero? If neither, this is a defect: please report the layout"
        )


def check_replicas(parameters: Sequence[TrainedParameter], context: ParallelContext) -> None:
    """Trained parameters that every TP rank holds whole must be equal on all of them; with EP, those of experts also on their copies.

    Collective over all ranks.

    Raises:
        MindSpeedLoraError: naming the first parameter that differs; every rank raises.
    """
    found: list[str | None] = []
    for items, own in by_grid(parameters, context):
        copies = own.dp_group if own is not context else None
        for item in items:
            found.append(_difference(item, None if item.cut else own.tp_group, "tensor-parallel ranks"))
            found.append(_difference(item, copies, "ranks that hold the same experts"))
    with together(context, "comparing what several ranks hold whole"):
        if text := next(filter(None, found), None):
            raise MindSpeedLoraError(text)


def _difference(item: TrainedParameter, group: Group, who: str) -> str | None:
    """What differs within the group; not raised, for other groups' ranks compare on."""
    if group is None:
        return None
    own = item.parameter.detach()
    first = all_reduce(own.clone(), group, dist.ReduceOp.MAX)
    last = all_reduce(own.clone(), group, dist.ReduceOp.MIN)
    if torch.equal(first, last):
        return None
    return (
        f"{item.name} differs between {who} by up to {float((first.float() - last.float()).abs().max()):.3e}, though each holds all of it: "
        "its gradient was not reduced alike. Nothing was saved; please report the layout (TP, PP, EP, DP, --sequence-parallel)"
    )


def largest_lora_b(parameters: Sequence[TrainedParameter], context: ParallelContext) -> float:
    """max |B| over the whole adapter; 0 means that the adapter changes nothing. Collective over all ranks."""
    largest = torch.zeros((), dtype=torch.float32, device=context.device)
    for item in parameters:
        if ".lora_B." in item.name:
            largest = torch.maximum(largest, item.parameter.detach().abs().max().float())
    for group in (context.dp_group, context.model_group):
        all_reduce(largest, group, dist.ReduceOp.MAX)
    return float(largest)
