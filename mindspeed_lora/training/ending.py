"""The report at the end of a run: rates, memory, and what to do with the result."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mindspeed_lora.checkpoint.together import gather_from_all
from mindspeed_lora.data.chat_template import HF_CHAT_TEMPLATE, template_words
from mindspeed_lora.device import peak_memory_bytes
from mindspeed_lora.log import get_logger
from mindspeed_lora.parallel.context import ParallelContext
from mindspeed_lora.training.flat import TrainedParameter
from mindspeed_lora.training.flops import peak_flops
from mindspeed_lora.training.guards import largest_lora_b
from mindspeed_lora.training.loop import Totals
from mindspeed_lora.training.memory import GIB
from mindspeed_lora.training.preflight import TrainingPlan
from mindspeed_lora.training.report import print_block


def report_end(plan: TrainingPlan, context: ParallelContext, trained: Sequence[TrainedParameter], totals: Totals) -> None:
    """Print throughput in real tokens, utilisation where the device's peak is known, peak memory, next commands. Collective."""
    if plan.lora is not None and largest_lora_b(trained, context) == 0.0:
        get_logger().warning("the adapter changes nothing: every LoRA B is zero. Was the learning rate zero in every step (--lr, warm-up)?")
    peak = max(gather_from_all(peak_memory_bytes(context.device), context))
    seconds = max(totals.seconds, 1e-9)
    rate = totals.flops / seconds / context.world_size
    lines = [
        f"{totals.iterations} iterations in {totals.seconds:.1f} s: "
        f"{totals.tokens / seconds / context.world_size:,.0f} real (unpadded) tokens "
        f"per second and device, {rate / 1e12:.2f} TFLOP/s per device"
    ]
    lines.append(f"waited for data: {100 * totals.data_seconds / seconds:.2f} % of the time")
    device_peak = peak_flops(_device_name(context.device))
    if device_peak is not None and plan.dtype.itemsize == 2:
        lines.append(f"model FLOP utilisation: {100 * rate / device_peak:.1f} % of {device_peak / 1e12:.0f} TFLOP/s")
    lines.append(f"peak memory of a {'process' if context.device.type == 'cpu' else 'device'}: {peak / GIB:.2f} GiB")
    if plan.state.skipped_iterations or plan.state.skipped_samples:
        what = f"{plan.state.skipped_iterations} iterations, {plan.state.skipped_samples} samples without a trained token"
        lines.append(f"skipped: {what}{' (in fp16 also iterations that overflowed)' if plan.dtype == torch.float16 else ''}")
    if plan.state.best_iteration is not None:
        lines.append(f"best validation loss: {plan.state.best_loss:.6E} at iteration {plan.state.best_iteration}")
    lines += next_commands(plan, context)
    print_block("done", lines)


def _device_name(device: torch.device) -> str:
    return "" if device.type == "cpu" else str(torch.get_device_module(device).get_device_name(device))


def _template(plan: TrainingPlan) -> dict[str, Any]:
    """What the data says of its template, or the flags where it has no manifest to say it (then the adapter has none either)."""
    if plan.dataset.manifest is not None:
        return plan.dataset.manifest.template or {}
    flags = plan.config.template
    return {"name": HF_CHAT_TEMPLATE if flags.hf_chat_template else flags.prompt_type}


def next_commands(plan: TrainingPlan, context: ParallelContext) -> list[str]:
    """Asking the model at this layout, and exporting it, with the paths of this run."""
    save = plan.config.save.save
    if save is None:
        return ["nothing was saved: no --save was given"]
    lora_only = plan.lora is not None and plan.config.save.lora_ckpt_filter
    base = Path(plan.start.base.path).resolve() if plan.lora is not None else save.resolve()
    adapter = ["--lora-load", str(save.resolve())] if plan.lora is not None else []
    if plan.lora is not None and not lora_only:
        base, adapter = save.resolve(), []
    prompt_type = template_words(_template(plan))
    replica = context.tp_size * context.pp_size * context.dp_ranks_of_replica
    launch = ["torchrun", "--nproc_per_node", str(replica), "inference.py"] if replica > 1 else ["python", "inference.py"]
    layout = ["--tensor-model-parallel-size", str(context.tp_size), "--pipeline-model-parallel-size", str(context.pp_size)]
    if context.experts.ep_size > 1:
        layout += ["--expert-model-parallel-size", str(context.experts.ep_size)]
    if context.experts.tp_size < context.tp_size:
        layout += ["--expert-tensor-parallel-size", str(context.experts.tp_size)]
    ask = [*launch, *layout, "--load", str(base), *adapter, *prompt_type, "--task", "greedy", "--prompt", "how are you?"]
    kind = "hf" if base == Path(plan.start.base.path).resolve() and plan.start.base.kind == "hf" and adapter else "mg"
    export = ["python", "convert_ckpt.py", "--load-model-type", kind, "--save-model-type", "hf", "--load-dir", str(base), *adapter]
    export += ["--save-dir", str(save.resolve() / "hf")]
    return [f"ask it:    {shlex.join(ask)}", f"export it: {shlex.join(export)}"]
