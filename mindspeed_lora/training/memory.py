"""What training needs on a device at its fullest moment, term by term; calibrated by ``benchmarks/memory_estimate.py``.

    peak = weights + adapters + gradients + optimizer            there all the time
         + activations + pipeline buffers                        what forward keeps for backward
         + max(loss head, backward of one layer, optimizer step) what comes and goes on top

Each term stands in one function, with the tensors it counts. w = bytes of the model's dtype; per token, at tp 1, unless said otherwise.
Legend of sizes: h hidden, n heads, g query groups, d head dim, f ffn, v padded vocabulary, r LoRA rank, t tensor-parallel size.
"""

from __future__ import annotations

from collections.abc import Mapping

from mindspeed_lora.ops.nf4 import BYTES_PER_VALUE as NF4_BYTES
from mindspeed_lora.parallel.cross_entropy import CHUNK_TOKENS, block_columns
from mindspeed_lora.training.optimizer import optimizer_bytes
from mindspeed_lora.training.sizes import RunSizes, StageParameters, stage_parameters

GIB, MIB = float(1 << 30), float(1 << 20)
Parts = Mapping[str, float]


def estimate(sizes: RunSizes, pp_rank: int, device_bytes: float | None = None) -> dict[str, float]:
    """Bytes per device of stage ``pp_rank`` by purpose; ``total`` last. ``device_bytes`` bounds the pipeline's receive buffers."""
    counts = stage_parameters(sizes, pp_rank)
    parts = _resident(sizes, counts)
    kept, again = _activations(sizes, pp_rank)
    parts["activations"] = kept
    if again:
        parts["recomputed layer"] = again
    if sizes.pp_size > 1:
        parts["pipeline buffers"] = _receive_buffers(sizes, device_bytes)
    parts |= _working(sizes, counts, pp_rank)
    parts["total"] = sum(parts.values())
    return parts


def largest_estimate(sizes: RunSizes, device_bytes: float | None = None) -> tuple[int, dict[str, float]]:
    """(stage, parts) of the stage that needs most."""
    every = [(stage, estimate(sizes, stage, device_bytes)) for stage in range(sizes.pp_size)]
    return max(every, key=lambda entry: entry[1]["total"])


def _resident(sizes: RunSizes, counts: StageParameters) -> dict[str, float]:
    """Weights, adapters, gradients, optimizer state."""
    width = sizes.parameter_bytes
    trained = counts.adapter if sizes.lora else counts.base
    own = -(-trained // sizes.dp_size) if sizes.sharded_optimizer else trained
    on_demand = counts.layers * counts.layer_linear if sizes.fsdp_base or sizes.qlora else 0
    parts: dict[str, float] = {"weights": (counts.base - on_demand) * width}
    if on_demand:
        whole = counts.layer_linear * width  # of the layer that computes, and of the next one while it is gathered
        held = NF4_BYTES if sizes.qlora else width
        parts["weights"] += on_demand * held / (sizes.dp_size if sizes.fsdp_base else 1)
        parts["whole layers"] = whole + (counts.layer_linear * held if sizes.fsdp_base else 0)
    if sizes.reference_copy:
        parts["reference"] = counts.base * width
    if sizes.lora:
        parts["adapters"] = counts.adapter * width
    return parts | optimizer_bytes(trained, own, width)


def _activations(sizes: RunSizes, pp_rank: int) -> tuple[float, float]:
    """(kept from forward to backward, of the layers being recomputed)."""
    chunk_layers = sizes.layers_per_stage // sizes.num_chunks
    recomputed = sizes.recomputed_layers(chunk_layers)
    in_flight = _chunks_in_flight(sizes, pp_rank)
    group = (sizes.recompute.num_layers or 1) if sizes.recompute.method != "block" else 1
    layer = sizes.micro_batch_tokens * layer_bytes_per_token(sizes)
    boundaries = -(-recomputed // group) * _boundary(sizes)
    kept = in_flight * ((chunk_layers - recomputed) * layer + boundaries)
    return kept, min(group, chunk_layers) * layer if recomputed else 0.0


def _chunks_in_flight(sizes: RunSizes, pp_rank: int) -> int:
    """Forward passes of a chunk whose backward is still to come, at most (1F1B: one per stage from here on)."""
    ahead = sizes.pp_size - pp_rank
    if sizes.num_chunks == 1:
        return min(sizes.num_micro_batches, ahead)
    warm_up = 2 * (ahead - 1) + (sizes.num_chunks - 1) * sizes.pp_size + 1  # torch's interleaved schedule
    return min(sizes.num_micro_batches * sizes.num_chunks, warm_up)


def _boundary(sizes: RunSizes) -> float:
    """Hidden states between two layers: [s, b, h], cut over t with sequence parallelism."""
    whole = sizes.micro_batch_tokens * sizes.model.hidden_size * sizes.parameter_bytes
    return whole / (sizes.tp_size if sizes.sequence_parallel else 1)


def _norm_bytes(sizes: RunSizes, size: int, heads: int = 1) -> float:
    """One RMSNorm of ``size`` elements: its input, and 1/rms in fp32."""
    return float(sizes.parameter_bytes * size + 4 * heads)


def layer_bytes_per_token(sizes: RunSizes) -> float:
    """What one decoder layer keeps for its backward pass, on one rank."""
    model, width, tp = sizes.model, sizes.parameter_bytes, sizes.tp_size
    rank = sizes.lora.widest if sizes.lora else 0
    hidden, queries, keys = model.hidden_size, model.num_attention_heads * model.kv_channels, model.num_query_groups * model.kv_channels
    outside = tp if sizes.sequence_parallel else 1  # what lies between the cut matrices
    total = 2 * _norm_bytes(sizes, hidden) / outside
    total += 2 * width * hidden / outside  # what the norms hand to linear_qkv and linear_fc1
    total += 4 * width * rank  # u = x A^T of the four linears
    if model.qk_layernorm:
        total += (_norm_bytes(sizes, queries, model.num_attention_heads) + _norm_bytes(sizes, 0, model.num_query_groups)) / tp  # k: a view
    total += width * (queries + 2 * keys) / tp  # linear_qkv's output, which attention's value is a view of
    total += width * (queries + keys) / tp  # rotated query and key
    total += (width * queries + 4 * model.num_attention_heads) / tp  # attention's output and log-sum-exp
    total += width * 3 * model.ffn_hidden_size / tp  # gate, up, product
    return total


def _receive_buffers(sizes: RunSizes, device_bytes: float | None) -> float:
    """Activations and their gradients of all micro-batches of one schedule call (see ``parallel/pipeline.py``)."""
    each = 2 * sizes.num_chunks * _boundary(sizes)
    budget = sizes.pipeline_buffer_fraction * device_bytes if device_bytes else float("inf")
    if sizes.num_micro_batches * each <= budget:
        return sizes.num_micro_batches * each
    return max(sizes.pp_size, int(budget // each) // sizes.pp_size * sizes.pp_size) * each


def _working(sizes: RunSizes, counts: StageParameters, pp_rank: int) -> dict[str, float]:
    """The largest of what comes and goes, under its name."""
    candidates = {"backward of a layer": _layer_backward(sizes, counts), "optimizer step": 0.0}
    if pp_rank == sizes.pp_size - 1:
        candidates["loss head"] = _loss_head(sizes)
    name = max(candidates, key=lambda key: candidates[key])
    return {name: candidates[name]}


def _loss_head(sizes: RunSizes) -> float:
    """One block of logits: [chunk, columns] in fp32 and again in the model's dtype (where that is another); the gradient of hidden."""
    rows, width = min(sizes.micro_batch_tokens, CHUNK_TOKENS), sizes.parameter_bytes
    vocabulary, hidden = sizes.model.padded_vocab_size / sizes.tp_size, sizes.model.hidden_size
    logits = rows * min(vocabulary, block_columns(rows)) * (4 if width == 4 else 4 + width)
    trained = 0.0 if sizes.lora else width * vocabulary * hidden  # the weight's gradient
    return logits + trained + rows * hidden * 8.0 + sizes.micro_batch_tokens * hidden * width


def _layer_backward(sizes: RunSizes, counts: StageParameters) -> float:
    """Gradients inside the MLP (product, gate, up, their concatenation), and the largest weight gradient before it is added."""
    gradients = sizes.micro_batch_tokens * sizes.parameter_bytes * 5 * sizes.model.ffn_hidden_size / sizes.tp_size
    return gradients + (0 if sizes.lora else counts.largest * sizes.parameter_bytes)


def describe(parts: Parts) -> str:
    """One line, in GiB, or MiB where it is little."""
    unit, word = (GIB, "GiB") if parts["total"] >= GIB / 4 else (MIB, "MiB")
    return ", ".join(f"{name} {size / unit:.2f}" for name, size in parts.items()) + f" {word}"
