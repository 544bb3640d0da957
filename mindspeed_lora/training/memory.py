"""What training will need on a device, before anything large is allocated. An estimate: +-20 % of the activations."""

from __future__ import annotations

from dataclasses import dataclass

from mindspeed_lora.arguments.configs import RecomputeFlags
from mindspeed_lora.parallel.context import ParallelContext
from mindspeed_lora.parallel.cross_entropy import CHUNK_TOKENS
from mindspeed_lora.training.optimizer import optimizer_bytes
from mindspeed_lora.weights.config import ModelConfig

GIB = float(1 << 30)


@dataclass(frozen=True)
class MemoryInputs:
    """Sizes of this rank. ``parameters`` and ``trained`` in elements, ``length`` the padded tokens of a row."""

    parameters: int
    trained: int
    parameter_bytes: int
    layers: int
    micro_batch_size: int
    num_micro_batches: int
    length: int
    sharded_optimizer: bool


def activation_elements_per_token(config: ModelConfig) -> int:
    """Elements that one layer keeps for backward per token at tp 1: norm inputs and outputs, q k v, attention, gate, up, product."""
    heads = config.num_attention_heads * config.kv_channels
    keys = config.num_query_groups * config.kv_channels
    return 4 * config.hidden_size + 3 * heads + 4 * keys + 3 * config.ffn_hidden_size


def estimate(inputs: MemoryInputs, config: ModelConfig, context: ParallelContext, recompute: RecomputeFlags) -> dict[str, float]:
    """Bytes per device by purpose; ``total`` last."""
    tokens = inputs.micro_batch_size * inputs.length
    in_flight = min(inputs.num_micro_batches, context.pp_size - context.pp_rank)
    boundary = tokens * config.hidden_size // (context.tp_size if context.sequence_parallel else 1)
    layer = tokens * activation_elements_per_token(config) // context.tp_size
    recomputed = 0
    if recompute.granularity == "full":
        recomputed = inputs.layers if recompute.method != "block" else min(recompute.num_layers or inputs.layers, inputs.layers)
    kept = (inputs.layers - recomputed) * layer + recomputed * boundary
    activations = in_flight * kept + (layer if recomputed else 0)
    receive = 2 * inputs.num_micro_batches * boundary if context.pp_size > 1 else 0
    own = -(-inputs.trained // context.dp_size) if inputs.sharded_optimizer else inputs.trained
    parts: dict[str, float] = {"weights": inputs.parameters * inputs.parameter_bytes}
    parts |= optimizer_bytes(inputs.trained, own, inputs.parameter_bytes)
    parts["activations"] = activations * inputs.parameter_bytes
    parts["pipeline buffers"] = receive * inputs.parameter_bytes
    if context.is_last_stage:
        parts["loss head (fp32)"] = 12.0 * min(tokens, CHUNK_TOKENS) * config.padded_vocab_size / context.tp_size
    parts["total"] = sum(parts.values())
    return parts


def describe(parts: dict[str, float]) -> str:
    """One line, in GiB, or MiB where it is little."""
    unit, word = (GIB, "GiB") if parts["total"] >= GIB / 4 else (float(1 << 20), "MiB")
    return ", ".join(f"{name} {size / unit:.2f}" for name, size in parts.items()) + f" {word}"
