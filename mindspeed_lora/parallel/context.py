"""The parallel grid: which process group this rank belongs to on each axis, as a value that constructors take.

Ranks lie on a grid ``[dp, pp, tp]``, tp fastest::

    rank = (dp_rank * pp_size + pp_rank) * tp_size + tp_rank

so that the ranks of one tensor-parallel group sit on one machine. Experts see the same ranks of a pipeline stage on a grid of their
own, ``[edp, ep, etp]`` with etp fastest, laid over their numbers in the order of (dp_rank, tp_rank)::

    dp_rank * tp_size + tp_rank = (edp_rank * ep_size + ep_rank) * etp_size + etp_rank

With etp = tp, ``ep_rank = dp_rank % ep_size``: the ranks that share the experts are neighbours on the data-parallel axis. With etp = 1
they are neighbours on one machine first, and the pairs (tp_rank, ep_rank) are those of the peer's rank folders.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist

from mindspeed_lora.device import collective_backend, keep_freed_memory, select_device
from mindspeed_lora.errors import UsageError

_LAST_COLLECTIVE_S = 0.05


@dataclass(frozen=True)
class ExpertGrid:
    """This rank's place in the experts' grid: "tp" are the ranks that cut an expert, "dp" those that hold the same part of the same ones.

    ``same_tokens``: the ranks of an EP group compute the same tokens (asking); False: each has its own (training).
    """

    ep_size: int = 1
    ep_rank: int = 0
    ep_group: dist.ProcessGroup | None = None
    tp_size: int = 1
    tp_rank: int = 0
    tp_group: dist.ProcessGroup | None = None
    dp_size: int = 1
    dp_rank: int = 0
    dp_group: dist.ProcessGroup | None = None
    model_group: dist.ProcessGroup | None = None  # all ranks of one copy of the experts: ep x tp x pp
    same_tokens: bool = False


@dataclass(frozen=True)
class ParallelContext:
    """This rank's place in the grid; a group is None where its size is 1 (no process group is needed at all for one rank)."""

    device: torch.device
    tp_size: int = 1
    pp_size: int = 1
    dp_size: int = 1
    tp_rank: int = 0
    pp_rank: int = 0
    dp_rank: int = 0
    tp_group: dist.ProcessGroup | None = None
    pp_group: dist.ProcessGroup | None = None
    dp_group: dist.ProcessGroup | None = None
    model_group: dist.ProcessGroup | None = None  # all tp x pp ranks of this replica
    embedding_group: dist.ProcessGroup | None = None  # first and last stage, same tp rank (tied embeddings)
    sequence_parallel: bool = False  # activations between blocks are [s/tp, b, h]
    expert_grid: ExpertGrid | None = None  # None: experts lie as everything else does

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.tp_size * self.pp_size * self.dp_size

    @property
    def rank(self) -> int:
        """This process's place in the grid."""
        return (self.dp_rank * self.pp_size + self.pp_rank) * self.tp_size + self.tp_rank

    @property
    def is_first_stage(self) -> bool:
        """Whether the embedding is here."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether the loss head is here."""
        return self.pp_rank == self.pp_size - 1

    @property
    def experts(self) -> ExpertGrid:
        """This rank's place in the experts' grid."""
        tp, dp = (self.tp_size, self.tp_rank, self.tp_group), (self.dp_size, self.dp_rank, self.dp_group)
        return self.expert_grid or ExpertGrid(1, 0, None, *tp, *dp, self.model_group)

    def for_experts(self) -> ParallelContext:
        """The context of what belongs to experts: its tp, dp and model groups are the experts' (and its ``rank`` is no process's)."""
        grid = self.expert_grid
        if grid is None:
            return self
        return replace(
            self,
            tp_size=grid.tp_size,
            tp_rank=grid.tp_rank,
            tp_group=grid.tp_group,
            dp_size=grid.dp_size,
            dp_rank=grid.dp_rank,
            dp_group=grid.dp_group,
            model_group=grid.model_group,
        )

    def cut(self, of_expert: bool) -> tuple[int, int]:
        """(rank, size) of the group over which a tensor is cut, an expert's or another."""
        return (self.experts.tp_rank, self.experts.tp_size) if of_expert else (self.tp_rank, self.tp_size)

    def own_experts(self, count: int) -> range:
        """Global numbers of the experts of this rank, of ``count``."""
        size = count // self.experts.ep_size
        return range(self.experts.ep_rank * size, (self.experts.ep_rank + 1) * size)

    @property
    def has_first_copy(self) -> bool:
        """Whether this rank is the first with its part of the dense weights and of the experts together: the one that saves them."""
        place = self.dp_rank * self.tp_size + self.tp_rank
        return place < max(self.tp_size, self.experts.ep_size * self.experts.tp_size)

    @property
    def dp_ranks_of_replica(self) -> int:
        """Over how many neighbours on the data-parallel axis one whole copy of the model, all experts included, extends."""
        return max(1, self.experts.ep_size * self.experts.tp_size // self.tp_size)

    @property
    def replica_rank(self) -> int:
        """Which whole copy of the model this rank belongs to."""
        return self.dp_rank // self.dp_ranks_of_replica

    @property
    def replicas(self) -> int:
        """Whole copies of the model."""
        return self.dp_size // self.dp_ranks_of_replica

    @property
    def speaks(self) -> bool:
        """Whether this rank is the one of its stage that hands on what all of a replica's ranks of the stage computed alike."""
        return self.tp_rank == 0 and self.dp_rank % self.dp_ranks_of_replica == 0


def world_size_from_environment() -> int:
    """torchrun's WORLD_SIZE, 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def data_parallel_size(world_size: int, tensor_parallel_size: int, pipeline_parallel_size: int) -> int:
    """world / (tp x pp).

    Raises:
        UsageError: the product does not divide the number of processes.
    """
    model_size = tensor_parallel_size * pipeline_parallel_size
    if world_size % model_size:
        raise UsageError(
            f"--tensor-model-parallel-size {tensor_parallel_size} x --pipeline-model-parallel-size {pipeline_parallel_size} = {model_size} "
            f"does not divide the number of processes, {world_size}; start a multiple of {model_size} with torchrun "
            "(--nproc_per_node x --nnodes)"
        )
    return world_size // model_size


def check_expert_grid(dp_size: int, tp_size: int, ep_size: int, etp_size: int | None) -> int:
    """Of how many ranks a pipeline stage's experts have a copy: dp x tp / (ep x etp).

    Raises:
        UsageError: the experts' grid does not cover the stage's ranks.
    """
    size = ep_size * (etp_size or tp_size)
    if dp_size * tp_size % size:
        raise UsageError(
            f"--expert-model-parallel-size {ep_size} x expert tensor parallel size {etp_size or tp_size} = {size} does not divide the "
            f"{dp_size * tp_size} processes of a pipeline stage (data parallel size {dp_size} x tensor parallel size {tp_size}); "
            "start more processes, or use a smaller --expert-model-parallel-size"
        )
    return dp_size * tp_size // size


def single_process_context(device: torch.device | None = None) -> ParallelContext:
    """The grid of one process, without any process group."""
    return ParallelContext(device=device or torch.device("cpu"))


def _own_group(grid: torch.Tensor, timeout: timedelta | None) -> dist.ProcessGroup | None:
    """This rank's group of the rows of ``grid`` ``[.., size]``, which all ranks make together; None where it would be alone.

    Not a DeviceMesh's: those wait for the backend's own time, whatever ``timeout`` the whole job has.
    """
    if grid.shape[-1] in (1, dist.get_world_size()):
        return None if grid.shape[-1] == 1 else dist.group.WORLD
    own = None
    for ranks in grid.reshape(-1, grid.shape[-1]).tolist():
        group = dist.new_group(ranks, timeout=timeout)
        own = group if dist.get_rank() in ranks else own
    return own


def _expert_grid(
    context: ParallelContext, grid: torch.Tensor, ep_size: int, etp_size: int, same_tokens: bool, timeout: timedelta | None
) -> ExpertGrid | None:
    """The grid ``[edp, ep, etp]`` over the ranks ``grid`` ``[dp, pp, tp]``; None where experts lie as everything else does."""
    if ep_size == 1 and etp_size == context.tp_size:
        return None
    dp_size = check_expert_grid(context.dp_size, context.tp_size, ep_size, etp_size)
    cut = etp_size == context.tp_size
    place = context.dp_rank * context.tp_size + context.tp_rank
    ranks = grid.transpose(0, 1).reshape(context.pp_size, dp_size, ep_size, etp_size)  # [pp, edp, ep, etp]
    return ExpertGrid(
        ep_size=ep_size,
        ep_rank=place // etp_size % ep_size,
        ep_group=_own_group(ranks.transpose(2, 3), timeout),
        tp_size=etp_size,
        tp_rank=context.tp_rank if cut else 0,
        tp_group=context.tp_group if cut else None,
        dp_size=dp_size,
        dp_rank=place // (etp_size * ep_size),
        dp_group=_own_group(ranks.permute(0, 2, 3, 1), timeout),
        model_group=_own_group(ranks.transpose(0, 1).flatten(1), timeout),
        same_tokens=same_tokens,
    )


def build_context(
    device: torch.device,
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    sequence_parallel: bool = False,
    expert_parallel_size: int = 1,
    expert_tensor_parallel_size: int | None = None,
    same_tokens: bool = False,
    timeout: timedelta | None = None,
) -> ParallelContext:
    """Lay the grid over the already initialised process group (or over one process when there is none).

    Collective: every rank calls it with the same sizes. ``sequence_parallel`` has no effect at tp size 1. The expert tensor parallel
    size is 1 or the tensor parallel size (None); ``same_tokens``: see :class:`ExpertGrid`.
    ``timeout``: of each group's collectives; None: the backend's own.
    """
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    dp_size = data_parallel_size(world_size, tensor_parallel_size, pipeline_parallel_size)
    etp_size = expert_tensor_parallel_size or tensor_parallel_size
    check_expert_grid(dp_size, tensor_parallel_size, expert_parallel_size, etp_size)
    if world_size == 1:
        return ParallelContext(device=device)
    grid = torch.arange(world_size).view(dp_size, pipeline_parallel_size, tensor_parallel_size)
    dp_rank, pp_rank, tp_rank = (int(place) for place in torch.nonzero(grid == dist.get_rank())[0])
    context = ParallelContext(
        device=device,
        tp_size=tensor_parallel_size,
        pp_size=pipeline_parallel_size,
        dp_size=dp_size,
        tp_rank=tp_rank,
        pp_rank=pp_rank,
        dp_rank=dp_rank,
        tp_group=_own_group(grid, timeout),
        pp_group=_own_group(grid.transpose(1, 2), timeout),
        dp_group=_own_group(grid.permute(1, 2, 0), timeout),
        model_group=_own_group(grid.flatten(1), timeout),
        embedding_group=_own_group(grid[:, [0, -1]].transpose(1, 2), timeout) if pipeline_parallel_size > 1 else None,
        sequence_parallel=sequence_parallel and tensor_parallel_size > 1,
    )
    return replace(context, expert_grid=_expert_grid(context, grid, expert_parallel_size, etp_size, same_tokens, timeout))


def initialize(
    device_name: str,
    tensor_parallel_size: int,
    pipeline_parallel_size: int,
    sequence_parallel: bool,
    timeout_minutes: int,
    expert_parallel_size: int = 1,
    expert_tensor_parallel_size: int | None = None,
    same_tokens: bool = False,
) -> ParallelContext:
    """Choose the device, join torchrun's process group if there is one, and lay the grid. Called by entry verbs only."""
    dp_size = data_parallel_size(world_size_from_environment(), tensor_parallel_size, pipeline_parallel_size)
    check_expert_grid(dp_size, tensor_parallel_size, expert_parallel_size, expert_tensor_parallel_size)
    device, timeout = select_device(device_name, int(os.environ.get("LOCAL_RANK", "0"))), timedelta(minutes=timeout_minutes)
    if device.type == "cpu":
        keep_freed_memory()
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        dist.init_process_group(collective_backend(device), timeout=timeout)
    experts = (expert_parallel_size, expert_tensor_parallel_size, same_tokens)
    return build_context(device, tensor_parallel_size, pipeline_parallel_size, sequence_parallel, *experts, timeout)


def shutdown() -> None:
    """Leave the process group, if one was joined.

    torch 2.7's gloo joins its threads with Python's lock held. A thread that is just letting go of the last collective's tensors waits
    for that lock: then neither ever ends. The pause gives it the lock.
    """
    if dist.is_initialized():
        time.sleep(_LAST_COLLECTIVE_S)
        dist.destroy_process_group()
