"""Where layers and experts lie in a layout: which slot of which stage, which experts of which rank."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mindspeed_lora.errors import UsageError
from mindspeed_lora.weights.config import Layout, ModelConfig, stage_layers
from mindspeed_lora.weights.table import Row

Slots = list[tuple[int, int]]  # (number inside the chunk, global layer)


def listed_numbers(value: Any) -> tuple[int, ...]:
    """``noop_layers`` or ``num_layer_list`` of stored args: None, "1,2", or a collection of numbers."""
    if isinstance(value, str):
        value = [part for part in value.split(",") if part.strip()]
    if not isinstance(value, Iterable):
        return ()
    return tuple(int(number) for number in value)


def _list_slots(num_layers: int, layout: Layout, counts: tuple[int, ...]) -> list[list[Slots]]:
    shown = ",".join(map(str, counts))
    if layout.layers_per_virtual_stage or layout.noop_layers:
        raise UsageError(f"--num-layer-list {shown} cannot be combined with virtual pipeline stages or --noop-layers")
    if len(counts) != layout.pipeline_parallel_size:
        raise UsageError(
            f"--num-layer-list {shown} has {len(counts)} numbers; the pipeline parallel size is {layout.pipeline_parallel_size}"
        )
    if sum(counts) != num_layers or min(counts) < 1:
        raise UsageError(
            f"--num-layer-list {shown} adds up to {sum(counts)}; the model has {num_layers} layers, at least one for each stage"
        )
    starts = [sum(counts[:stage]) for stage in range(len(counts))]
    return [[[(local, start + local) for local in range(count)]] for start, count in zip(starts, counts, strict=True)]


def place_layers(num_layers: int, layout: Layout) -> list[list[Slots]]:
    """``[stage][chunk] -> [(number inside the chunk, global layer)]``; a no-op slot leaves a gap in the numbers.

    Raises:
        UsageError: the layers do not fit the stages, the list or the no-op slots.
    """
    if layout.num_layer_list is not None:
        return _list_slots(num_layers, layout, layout.num_layer_list)
    noops = layout.noop_layers
    slots = num_layers + len(noops)
    if len(set(noops)) != len(noops) or any(not 0 <= number < slots for number in noops):
        raise UsageError(
            f"--noop-layers {','.join(map(str, noops))}: numbers must differ and lie in 0..{slots - 1} "
            f"({num_layers} layers and {len(noops)} empty slots)"
        )
    stages = stage_layers(slots, layout.pipeline_parallel_size, layout.layers_per_virtual_stage)
    layers = {slot: layer for layer, slot in enumerate(slot for slot in range(slots) if slot not in noops)}
    return [[[(local, layers[slot]) for local, slot in enumerate(chunk) if slot in layers] for chunk in chunks] for chunks in stages]


def expert_tensor_size(layout: Layout) -> int:
    """Over how many tensor ranks one expert is cut: all of them, or 1."""
    if layout.experts_over_tensor_ranks:
        return 1
    return layout.expert_tensor_parallel_size or layout.tensor_parallel_size


def row_cut(layout: Layout, row: Row, tp_rank: int) -> tuple[int, int]:
    """(rank, size) of the group over which a row is cut."""
    return (0, 1) if row.expert is not None and expert_tensor_size(layout) == 1 else (tp_rank, layout.tensor_parallel_size)


def expert_blocks(layout: Layout) -> int:
    """Into how many blocks of consecutive experts the experts are dealt out."""
    return layout.expert_parallel_size * (layout.tensor_parallel_size if layout.experts_over_tensor_ranks else 1)


def stage_ranks(layout: Layout) -> list[tuple[int, int]]:
    """(tensor rank, expert rank) of every file of a stage; with uncut experts only the pairs that occur."""
    tp_size, ep_size = layout.tensor_parallel_size, layout.expert_parallel_size
    if expert_tensor_size(layout) == tp_size or layout.experts_over_tensor_ranks:
        return [(tp_rank, ep_rank) for tp_rank in range(tp_size) for ep_rank in range(ep_size)]
    return sorted((rank % tp_size, rank % ep_size) for rank in range(max(tp_size, ep_size)))


def block_ranks(layout: Layout, block: int) -> list[tuple[int, int]]:
    """(tensor rank, expert rank) of the files whose shards together are the experts of one block, in shard order."""
    tp_size = layout.tensor_parallel_size
    if layout.experts_over_tensor_ranks:
        return [(block % tp_size, block // tp_size)]
    ranks = [rank for rank in stage_ranks(layout) if rank[1] == block]
    return ranks if expert_tensor_size(layout) == tp_size else ranks[:1]


def expert_block(layout: Layout, tp_rank: int, ep_rank: int) -> int:
    """Number of the block of experts that one rank holds."""
    return ep_rank * layout.tensor_parallel_size + tp_rank if layout.experts_over_tensor_ranks else ep_rank


def experts_of(layout: Layout, tp_rank: int, ep_rank: int, count: int) -> range:
    """Global numbers of the experts that one rank holds."""
    size = count // expert_blocks(layout)
    start = expert_block(layout, tp_rank, ep_rank) * size
    return range(start, start + size)


def check_experts(config: ModelConfig, layout: Layout, flag: str = "--target-expert-parallel-size") -> None:
    """Whether the experts can be dealt out and cut; ``flag`` gave the expert parallel size.

    Raises:
        UsageError: a size does not divide, or the model has no experts.
    """
    tp_size, ep_size, experts = layout.tensor_parallel_size, layout.expert_parallel_size, config.experts
    if experts is None:
        for words, given in (
            (f"{flag} {ep_size}", ep_size != 1),
            (f"--expert-tensor-parallel-size {layout.expert_tensor_parallel_size}", expert_tensor_size(layout) not in (1, tp_size)),
            ("--moe-grouped-gemm", layout.grouped_gemm),
            ("--moe-tp-extend-ep", layout.experts_over_tensor_ranks),
        ):
            if given:
                raise UsageError(f"{words}: a {config.family} model has no experts; leave the flag out")
        return
    etp_size = expert_tensor_size(layout)
    if etp_size not in (1, tp_size):
        raise UsageError(f"--expert-tensor-parallel-size {etp_size} is not supported; use 1 or the tensor parallel size {tp_size}")
    if experts.count % expert_blocks(layout):
        divisors = [size for size in range(1, experts.count + 1) if experts.count % size == 0]
        raise UsageError(
            f"{flag} {ep_size}: {experts.count} experts cannot be dealt out evenly over {expert_blocks(layout)} blocks; "
            f"use one of {divisors}"
        )
    uneven = max(tp_size, ep_size) % min(tp_size, ep_size)
    if etp_size == 1 and not layout.experts_over_tensor_ranks and uneven:
        raise UsageError(
            f"--expert-tensor-parallel-size 1 needs a tensor parallel size ({tp_size}) and an expert parallel size ({ep_size}) "
            "of which one divides the other"
        )
    for name, size, parts in (
        ("moe_intermediate_size", experts.ffn_hidden_size, etp_size),
        ("shared experts' intermediate size", experts.shared_ffn_hidden_size, tp_size),
    ):
        if size % parts:
            raise UsageError(f"tensor parallel size {parts} does not divide the model's {name} {size}")
