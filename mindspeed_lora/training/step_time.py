"""How long a step should take on a named machine, from FLOPs, bytes and links: a plan, not a measurement.

    micro-batch = matmuls / (peak x share)  +  streaming bytes / (bandwidth x share)  +  TP and PP bytes / (link x share)
    step        = micro-batches x micro-batch / (1 - bubble)  +  DP reduction  +  optimizer

Nothing is assumed to overlap except ``--fsdp-base``'s gathers (behind the layer before). Rows are taken as full.
"""

from __future__ import annotations

from dataclasses import dataclass

from mindspeed_lora.ops.nf4 import BYTES_PER_VALUE as NF4_BYTES
from mindspeed_lora.training.flops import flops_model
from mindspeed_lora.training.machines import Machine
from mindspeed_lora.training.memory import layer_bytes_per_token, owned_elements
from mindspeed_lora.training.sizes import RunSizes, stage_parameters
from mindspeed_lora.weights.table import WeightTable

_PASSES = 4  # over what a layer keeps: written, read by the next kernel, read in backward, its gradient written
_HEAD_PASSES = 6  # over the fp32 logits of a token: written, maximum, exponent, sum, target, gradient
_KERNELS_PER_LAYER = 90  # forward and backward, LoRA on four linears
_OPTIMIZER_BYTES = 32  # per trained parameter: gradient, master and moments read, master, moments and weight written


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step by cause (``seconds`` is their sum), and what follows from them."""

    parts: dict[str, float]
    tokens: float  # per step and device
    model_flops: float  # per step and device

    @property
    def seconds(self) -> float:
        """Of one step."""
        return sum(self.parts.values())

    @property
    def tokens_per_second(self) -> float:
        """Per device."""
        return self.tokens / self.seconds

    def utilisation(self, machine: Machine) -> float:
        """Model FLOPs over the machine's peak; recomputation does not count."""
        return self.model_flops / self.seconds / machine.flops


def step_time(sizes: RunSizes, machine: Machine) -> StepTime:
    """The estimate for the slowest stage (the one with the head)."""
    flops = flops_model(sizes.model, WeightTable(sizes.model), sizes.lora)
    tokens, cut = sizes.micro_batch_tokens, sizes.tp_size * sizes.pp_size
    model_flops = flops.total(tokens, sizes.micro_batch_size) / cut
    again = _recomputed_share(sizes) * flops.total(tokens, sizes.micro_batch_size) / cut * (0.5 if sizes.lora else 1 / 3)
    layers = sizes.layers_per_stage
    streams = _PASSES * layers * layer_bytes_per_token(sizes) * tokens * (1 + _recomputed_share(sizes) / 2)
    streams += _HEAD_PASSES * 4.0 * sizes.model.padded_vocab_size / sizes.tp_size * tokens / sizes.pp_size
    micro = {
        "matmuls and attention": model_flops / (machine.flops * machine.matmul_share),
        "recomputation": again / (machine.flops * machine.matmul_share),
        "norms, rotary, SwiGLU, loss": streams / (machine.bandwidth * machine.memory_share),
        "tensor parallel": _tensor_parallel(sizes, machine),
    }
    if sizes.pp_size > 1:
        micro["pipeline transfers"] = 2 * sizes.boundary_bytes / machine.link_between(2, sizes.tp_size * sizes.pp_size)
    if sizes.ep_size > 1:
        micro["experts' exchange"] = _exchange(sizes, machine)
    if sizes.qlora:
        micro["decoding 4-bit weights"] = _decoding(sizes, machine)
    micro["launching kernels"] = max(0.0, layers * _KERNELS_PER_LAYER * machine.launch_s - sum(micro.values()))
    micro["gathering the base"] = max(0.0, _gather(sizes, machine) - sum(micro.values()))
    parts = {name: sizes.num_micro_batches * value for name, value in micro.items()}
    busy = sum(parts.values())
    parts["pipeline bubble"] = busy * sizes.bubble / (1 - sizes.bubble)
    parts["gradient reduction"], parts["optimizer"] = _reduction(sizes, machine)
    step_tokens = tokens * sizes.num_micro_batches / cut
    return StepTime({name: value for name, value in parts.items() if value > 0}, step_tokens, model_flops * sizes.num_micro_batches)


def _recomputed_share(sizes: RunSizes) -> float:
    """Of the layers, those that run forward twice."""
    chunk = sizes.layers_per_stage // sizes.num_chunks
    return sizes.recomputed_layers(chunk) / chunk


def _tensor_parallel(sizes: RunSizes, machine: Machine) -> float:
    """4 collectives per column + row pair, two pairs a layer: each moves (t - 1)/t of [s, b, h] (an all-reduce counts as two)."""
    share = (sizes.tp_size - 1) / sizes.tp_size
    hidden = sizes.micro_batch_tokens * sizes.model.hidden_size * sizes.parameter_bytes
    collectives = 8 + 4 * _recomputed_share(sizes)
    return sizes.layers_per_stage * collectives * share * hidden / machine.link_between(sizes.tp_size, sizes.tp_size)


def _exchange(sizes: RunSizes, machine: Machine) -> float:
    """Each token's k rows to their experts and back, forward and backward: each way moves (e - 1)/e of them; evenly routed."""
    experts = sizes.model.experts
    assert experts is not None
    layers = sum(sizes.model.has_experts(layer) for layer in range(sizes.model.num_layers)) / sizes.pp_size
    rows = experts.routing.top_k * sizes.micro_batch_tokens * sizes.expert_tp_size / sizes.tp_size
    ways = (4 + 2 * _recomputed_share(sizes)) * (sizes.ep_size - 1) / sizes.ep_size
    span = sizes.ep_size * sizes.expert_tp_size * sizes.pp_size  # neighbours on the data-parallel axis have all stages between them
    return layers * ways * rows * sizes.model.hidden_size * sizes.parameter_bytes / machine.link_between(sizes.ep_size, span)


def _gather(sizes: RunSizes, machine: Machine) -> float:
    """``--fsdp-base``: every layer's frozen weights, once forward and once backward."""
    if not sizes.fsdp_base or sizes.dp_size == 1:
        return 0.0
    counts = stage_parameters(sizes, sizes.pp_size - 1)
    held = NF4_BYTES if sizes.qlora else sizes.parameter_bytes
    moved = 2 * counts.layers * counts.layer_linear * held * (sizes.dp_size - 1) / sizes.dp_size
    return moved / machine.link_between(sizes.dp_size, sizes.world_size)


def _decoding(sizes: RunSizes, machine: Machine) -> float:
    """``--qlora``: every layer's weights, read in 4 bits and written whole, once forward and once backward."""
    counts = stage_parameters(sizes, sizes.pp_size - 1)
    moved = 2 * counts.layers * counts.layer_linear * (NF4_BYTES + sizes.parameter_bytes)
    return moved / (machine.bandwidth * machine.memory_share)


def _reduction(sizes: RunSizes, machine: Machine) -> tuple[float, float]:
    """(fp32 gradients over DP, AdamW), once a step."""
    counts = stage_parameters(sizes, sizes.pp_size - 1)
    trained = counts.adapter if sizes.lora else counts.base
    reduced = 2 * 4.0 * trained * (sizes.dp_size - 1) / sizes.dp_size / machine.link_between(sizes.dp_size, sizes.world_size)
    own = owned_elements(sizes, counts) if sizes.sharded_optimizer else trained
    return reduced, _OPTIMIZER_BYTES * own / (machine.bandwidth * machine.memory_share)
