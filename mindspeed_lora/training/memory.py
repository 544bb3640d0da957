"""What training needs on a device at its fullest moment, term by term; calibrated by ``benchmarks/memory_estimate.py``.

    peak = weights + adapters + gradients + optimizer            there all the time
         + activations + pipeline buffers                        what forward keeps for backward
         + max(loss head, backward of one layer)                 what comes and goes on top, recomputed or gathered layers with the latter

Each term stands in one function, with the tensors it counts. w = bytes of the model's dtype; per token, at tp 1, unless said otherwise.
Legend of sizes: h hidden, n heads, g query groups, d head dim, f ffn, v padded vocabulary, r LoRA rank, t tensor-parallel size.
"""

from __future__ import annotations

from collections.abc import Mapping

from mindspeed_lora.ops.nf4 import BYTES_PER_VALUE as NF4_BYTES
from mindspeed_lora.parallel.cross_entropy import tile_of
from mindspeed_lora.training.optimizer import optimizer_bytes
from mindspeed_lora.training.sizes import RunSizes, StageParameters, stage_parameters
from mindspeed_lora.weights.config import ExpertShape

GIB, MIB = float(1 << 30), float(1 << 20)
Parts = Mapping[str, float]


def estimate(sizes: RunSizes, pp_rank: int, device_bytes: float | None = None) -> dict[str, float]:
    """Bytes per device of stage ``pp_rank`` by purpose; ``total`` last. ``device_bytes`` bounds the pipeline's receive buffers."""
    counts = stage_parameters(sizes, pp_rank)
    parts = _resident(sizes, counts)
    kept, again = _activations(sizes, pp_rank)
    parts["activations"] = kept
    if sizes.pp_size > 1:
        parts["pipeline buffers"] = _receive_buffers(sizes, device_bytes)
    parts |= _working(sizes, counts, pp_rank, again)
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
    own = owned_elements(sizes, counts) if sizes.sharded_optimizer else trained
    on_demand = counts.layers * counts.layer_linear if sizes.fsdp_base or sizes.qlora else 0
    parts: dict[str, float] = {"weights": (counts.base - on_demand) * width}
    if on_demand:
        held = NF4_BYTES if sizes.qlora else width
        parts["weights"] += on_demand * held / (sizes.dp_size if sizes.fsdp_base else 1)
    if sizes.reference_copy:
        parts["reference"] = counts.base * width
    if sizes.lora:
        parts["adapters"] = counts.adapter * width
    return parts | optimizer_bytes(trained, own, width)


def owned_elements(sizes: RunSizes, counts: StageParameters) -> int:
    """Trained elements whose optimizer state a rank keeps where it is cut over the ranks that hold the same ones."""
    trained, of_experts = (counts.adapter, counts.expert_adapter) if sizes.lora else (counts.base, counts.expert_base)
    return -(-(trained - of_experts) // sizes.dp_size) - (-of_experts // sizes.expert_dp_size)


def _activations(sizes: RunSizes, pp_rank: int) -> tuple[float, float]:
    """(kept from forward to backward, of the layers being recomputed)."""
    chunk_layers = sizes.layers_per_stage // sizes.num_chunks
    recomputed = sizes.recomputed_layers(chunk_layers)
    in_flight = _chunks_in_flight(sizes, pp_rank)
    group = (sizes.recompute.num_layers or 1) if sizes.recompute.method != "block" else 1
    layer = sizes.micro_batch_tokens * layer_bytes_per_token(sizes)
    boundaries = -(-recomputed // group) * sizes.boundary_bytes
    kept = in_flight * ((chunk_layers - recomputed) * layer + boundaries)
    if _keeps_core(sizes):
        return kept, min(group, chunk_layers) * layer if recomputed else 0.0
    return kept, sizes.micro_batch_tokens * _core(sizes)


def _keeps_core(sizes: RunSizes) -> bool:
    """Whether attention keeps more than its input and its output."""
    return sizes.recompute.granularity != "selective"


def _core(sizes: RunSizes) -> float:
    """Per token, what attention itself keeps: rotated query and key, a widened value, its output and log-sum-exp."""
    model, product = sizes.model, 4 if sizes.widened else sizes.parameter_bytes
    heads, keys = model.num_attention_heads, model.num_query_groups * model.kv_channels
    return (product * (2 * heads * model.kv_channels + keys + (keys if sizes.widened else 0)) + 4 * heads) / sizes.tp_size


def _chunks_in_flight(sizes: RunSizes, pp_rank: int) -> int:
    """Forward passes of a chunk whose backward is still to come, at most (1F1B: one per stage from here on)."""
    ahead = sizes.pp_size - pp_rank
    if sizes.num_chunks == 1:
        return min(sizes.num_micro_batches, ahead)
    warm_up = 2 * (ahead - 1) + (sizes.num_chunks - 1) * sizes.pp_size + 1  # torch's interleaved schedule
    return min(sizes.num_micro_batches * sizes.num_chunks, warm_up)


def layer_bytes_per_token(sizes: RunSizes) -> float:
    """What one decoder layer keeps for its backward pass, on one rank."""
    model, width, tp = sizes.model, sizes.parameter_bytes, sizes.tp_size
    product = 4 if sizes.widened else width  # of what attention and LoRA's products keep
    outside = tp if sizes.sequence_parallel else 1  # what lies between the cut matrices
    total = (3 * width * model.hidden_size + 8) / outside  # each norm: input, 1/rms; and the first one's output, which the linear keeps
    total += 2 * product * _rank(sizes)  # u = x A^T of linear_qkv and linear_proj
    total += _latent_attention(sizes, product) if model.latent else _attention(sizes)
    return total + _mlp_bytes_per_token(sizes)


def _attention(sizes: RunSizes) -> float:
    """Per token, between linear_qkv and linear_proj."""
    model, width, tp = sizes.model, sizes.parameter_bytes, sizes.tp_size
    heads, groups = model.num_attention_heads, model.num_query_groups
    queries, keys = heads * model.kv_channels, groups * model.kv_channels
    total = 0.0
    if model.qk_layernorm:
        total += (width * queries + 4 * (heads + groups)) / tp  # a contiguous copy of the queries; 1/rms
    if model.qk_layernorm or not sizes.widened or not _keeps_core(sizes):
        total += width * (queries + 2 * keys) / tp  # linear_qkv's output: keys (norm) and values (attention) are views of it
    if not _keeps_core(sizes):
        return total + width * (2 * queries + keys) / tp  # rotated query and key, and the output for linear_proj
    return total + _core(sizes) + (width * queries / tp if sizes.widened else 0)  # its output, narrowed again for linear_proj


def _latent_attention(sizes: RunSizes, product: int) -> float:
    """The same with latent attention: latents as they come, normed, and expanded; values as wide as the queries for attention."""
    model, width, tp = sizes.model, sizes.parameter_bytes, sizes.tp_size
    latent, heads = model.latent, model.num_attention_heads / sizes.tp_size
    assert latent is not None
    outside = tp if sizes.sequence_parallel and latent.q_rank else 1
    latents = (latent.q_rank or 0) + latent.kv_rank
    down = latents + latent.rope_head_dim + (0 if latent.q_rank else heads * latent.query_head_dim)
    total = (width * down + 8) / outside  # linear_qkv's output, of which the norms keep views; 1/rms
    total += width * (latents + (latent.rope_head_dim if tp > 1 and latent.q_rank else 0))  # normed, whole: for the up projections
    total += width * model.hidden_size if sizes.sequence_parallel and not latent.q_rank else 0  # gathered for linear_qkv
    total += 2 * product * _rank(sizes)  # u of the two up projections
    total += product * 4 * heads * latent.query_head_dim + 4 * heads  # attention's query, key, padded value and output; log-sum-exp
    return total + width * heads * latent.value_head_dim  # its output without the padding, for linear_proj


def _rank(sizes: RunSizes) -> int:
    return sizes.lora.widest if sizes.lora else 0


def _mlp_bytes_per_token(sizes: RunSizes) -> float:
    """The MLP's part of it, without its norm's own; of a model whose layers differ, the average."""
    model, width, outside = sizes.model, sizes.parameter_bytes, sizes.tp_size if sizes.sequence_parallel else 1

    def dense(ffn: int) -> float:
        """The norm's output, which linear_fc1 keeps; u of two linears; [gate | up], and their product for linear_fc2."""
        low_rank = 2 * (4 if sizes.widened else width) * _rank(sizes)
        return width * model.hidden_size / outside + low_rank + 3 * width * ffn / sizes.tp_size

    if model.experts is None:
        return dense(model.ffn_hidden_size)
    shape, first = model.experts, len(model.experts.dense_layers) / model.num_layers
    shared = dense(shape.shared_ffn_hidden_size) + width * model.hidden_size * shape.shared_gate if shape.shared_ffn_hidden_size else 0.0
    return first * dense(model.ffn_hidden_size) + (1 - first) * (_routed_bytes_per_token(sizes, shape) + shared)


def _expert_rows(sizes: RunSizes, shape: ExpertShape) -> float:
    """Rows of this rank's experts per token, where the router spreads tokens evenly."""
    return shape.routing.top_k * sizes.expert_tp_size / sizes.tp_size


def _routed_bytes_per_token(sizes: RunSizes, shape: ExpertShape) -> float:
    """Per row: [gate | up], the result that its weight scales, and what adapters or trained weights keep: each linear's input, u.

    Per token: the router's scores and, for each of its experts, weight, number and places (fp32 and int64).
    """
    hidden, width, ffn = sizes.model.hidden_size, sizes.parameter_bytes, shape.ffn_hidden_size / sizes.expert_tp_size
    low_rank, row = (4 if sizes.widened else width) * _rank(sizes), width * (2 * ffn + hidden)
    for module, size in (("linear_fc1", hidden), ("linear_fc2", ffn)):
        row += width * size + low_rank if sizes.lora is None or module in sizes.lora.targets else 0
    return _expert_rows(sizes, shape) * row + 4 * shape.count + 32 * shape.routing.top_k


def _receive_buffers(sizes: RunSizes, device_bytes: float | None) -> float:
    """Activations and their gradients of all micro-batches of one schedule call (see ``parallel/pipeline.py``)."""
    each = 2 * sizes.num_chunks * sizes.boundary_bytes
    budget = sizes.pipeline_buffer_fraction * device_bytes if device_bytes else float("inf")
    if sizes.num_micro_batches * each <= budget:
        return sizes.num_micro_batches * each
    return max(sizes.pp_size, int(budget // each) // sizes.pp_size * sizes.pp_size) * each


def _working(sizes: RunSizes, counts: StageParameters, pp_rank: int, recomputed: float) -> dict[str, float]:
    """The larger of what comes and goes: the loss head, or the backward pass of a layer with what is recomputed or gathered for it."""
    backward = {"recomputed layer": recomputed} if recomputed else {}
    if sizes.fsdp_base or sizes.qlora:  # of the layer that computes, and of the next one while it is gathered
        held = (NF4_BYTES if sizes.qlora else sizes.parameter_bytes) if sizes.fsdp_base else 0
        copies = 2 if sizes.device_type == "cpu" else 1  # gloo gathers into memory of its own
        backward["whole layers"] = counts.layer_linear * (sizes.parameter_bytes + copies * held)
    backward["backward of a layer"] = _layer_backward(sizes, counts)
    head = {"loss head": _loss_head(sizes)} if pp_rank == sizes.pp_size - 1 else {}
    return max(head, backward, key=lambda parts: sum(parts.values()))


def _loss_head(sizes: RunSizes) -> float:
    """A block of fp32 logits (of several, the new and the last), hidden states' sums, and the weight gradient of a trained head."""
    width, hidden = sizes.parameter_bytes, sizes.model.hidden_size
    tile = tile_of(sizes.device_type)
    rows = min(sizes.micro_batch_tokens, tile.tokens)
    vocabulary = sizes.model.padded_vocab_size / sizes.tp_size
    block = min(tile.columns(rows), vocabulary)
    blocks = 2 if block < vocabulary else 1
    logits = rows * block * (4 * blocks + (0 if width == 4 or sizes.widened else width))
    product = 4 if sizes.widened else width
    sums = rows * hidden * (4 + (0 if width == 4 else product)) + (4 * block * hidden if sizes.widened else 0)
    states = 3 * width * sizes.micro_batch_tokens * hidden  # the final norm's output, its trained rows, their gradient
    return logits + sums + states + (0 if sizes.lora else width * vocabulary * hidden)


def _layer_backward(sizes: RunSizes, counts: StageParameters) -> float:
    """Gradients inside the MLP: of the product, of [gate | up] and, widened, once more; and a trained weight's before it is added.

    Of routed experts: the rows' gradient and its product with the results or, widened, it and a linear's two sides in fp32, less what
    is free by then.
    """
    width, shape, tokens = sizes.parameter_bytes, sizes.model.experts, sizes.micro_batch_tokens
    ffn = sizes.model.ffn_hidden_size if shape is None or shape.dense_layers else shape.shared_ffn_hidden_size
    gradients = tokens * ffn / sizes.tp_size * (3 * width + (2 * 4 if sizes.widened else 0))
    if shape is not None:
        hidden, expert_ffn = sizes.model.hidden_size, shape.ffn_hidden_size / sizes.expert_tp_size
        row = 4 * hidden + 6 * expert_ffn if sizes.widened else 2 * width * hidden
        gradients = max(gradients, tokens * _expert_rows(sizes, shape) * row)
    trained = 0 if sizes.lora else counts.largest * (width + (4 if shape is not None and sizes.widened else 0))
    return gradients + trained


def describe(parts: Parts) -> str:
    """One line, in GiB, or MiB where it is little."""
    unit, word = (GIB, "GiB") if parts["total"] >= GIB / 4 else (MIB, "MiB")
    return ", ".join(f"{name} {size / unit:.2f}" for name, size in parts.items()) + f" {word}"
