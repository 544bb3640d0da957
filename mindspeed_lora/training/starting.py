"""The report at the start of a run: what will be trained, where everything came from, what it will need."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

from mindspeed_lora.arguments.configs import TrainConfig
from mindspeed_lora.checkpoint.load import LoadReport
from mindspeed_lora.checkpoint.together import gather_from_all
from mindspeed_lora.device import total_memory_bytes
from mindspeed_lora.ops.products import widens
from mindspeed_lora.parallel.context import ParallelContext
from mindspeed_lora.parallel.pipeline import bubble_fraction
from mindspeed_lora.training import memory
from mindspeed_lora.training.preflight import TrainingPlan
from mindspeed_lora.training.report import print_block
from mindspeed_lora.weights.lora_blocks import adapted_entries, trained_elements
from mindspeed_lora.weights.lora_spec import LoraSpec
from mindspeed_lora.weights.table import WeightTable


def describe_config(config: TrainConfig) -> list[str]:
    """``group.field: value`` of everything that is set."""
    lines = []
    for key, value in asdict(config).items():
        lines += [f"{name}: {item}" for name, item in _fields(key, value)]
    return lines


def _fields(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The values under a name that are set; those of an object by ``name.field``."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _fields(f"{name}.{key}", item)
    elif value is not None:
        yield name, value


def describe_layout(plan: TrainingPlan, context: ParallelContext) -> str:
    """Sizes of the grid, the step, and the pipeline's idle share."""
    chunks = len(plan.table.check_pipeline(context.pp_size, plan.layout.layers_per_virtual_stage)[0])
    micro_batches = plan.num_micro_batches
    sequence = " with sequence parallelism" if context.sequence_parallel else ""
    virtual = f" ({chunks} virtual stages each)" if chunks > 1 else ""
    grid = f"TP {context.tp_size}{sequence} x PP {context.pp_size}{virtual} x DP {context.dp_size}{plan.sizes.describe_experts()}"
    batch = f"{plan.config.micro_batch_size} rows x {micro_batches} micro-batches x DP {context.dp_size}"
    text = f"processes: {context.world_size} = {grid}; global batch {plan.global_batch_size} = {batch}"
    if context.pp_size > 1:
        text += f"; pipeline bubble {100 * bubble_fraction(micro_batches, context.pp_size, chunks):.0f} %"
        if micro_batches < context.pp_size:
            text += " (fewer micro-batches than stages)"
    return text


def parameter_counts(table: WeightTable, lora: LoraSpec | None) -> tuple[int, int]:
    """(trainable, total) parameters of the whole model, each counted once, vocabulary padding included."""
    base = sum(_elements(table.shape(row)) for row, _ in table.entries())
    if lora is None:
        return base, base
    adapter = sum(trained_elements(row, module) for row, _, module in adapted_entries(table, lora))
    return adapter, base + adapter


def _elements(shape: Sequence[int]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def report_start(plan: TrainingPlan, context: ParallelContext, loaded: LoadReport) -> None:
    """Print configuration, layout, counts, sources and the memory estimate. Collective."""
    lora = plan.lora
    trainable, total = parameter_counts(plan.table, lora)
    every = gather_from_all(loaded, context)
    base, adapter = (sum(getattr(report, name) for report in every) for name in ("base", "adapter"))
    device_bytes = min(gather_from_all(total_memory_bytes(context.device), context))
    kind = context.device.type
    sizes = replace(plan.sizes, device_type=kind, widened=widens(kind, plan.dtype))
    _, largest = memory.largest_estimate(sizes, device_bytes)
    model = plan.model
    fresh = "none loaded, initialised by seed" if lora else "none"
    adapter_source = str(plan.start.adapter.path) if plan.start.adapter else fresh
    print_block("configuration", describe_config(plan.config))
    lines = [
        describe_layout(plan, context),
        f"model: {model.family}, {model.num_layers} layers, hidden {model.hidden_size}, vocabulary {model.padded_vocab_size}, "
        f"{'tied' if model.tied_embeddings else 'untied'} head, {str(plan.dtype).removeprefix('torch.')}",
        f"trainable parameters: {trainable:,} of {total:,} ({100 * trainable / total:.3f} %)"
        + (f"; LoRA {lora.describe()}" if lora else "; full-parameter training"),
        f"base: {plan.start.base.path}; adapter: {adapter_source}",
        f"tensors loaded over all ranks: base {base}, adapter {adapter}, missing 0, unexpected 0",
        f"data: {plan.dataset.prefix}, {len(plan.splits[0])} training and {len(plan.splits[1])} validation samples",
        f"memory estimate, largest device: {memory.describe(largest)}",
        *(f"note: {note}" for note in plan.notes),
    ]
    print_block("training", lines)
