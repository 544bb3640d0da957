"""The parallel grid: which process group this rank belongs to on each axis, as a value that constructors take.

Ranks lie on a grid ``[dp, pp, tp]``, tp fastest::

    rank = (dp_rank * pp_size + pp_rank) * tp_size + tp_rank

so that the ranks of one tensor-parallel group sit on one machine.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from mindspeed_lora.device import collective_backend, select_device
from mindspeed_lora.errors import UsageError


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
            f"does not divide the {world_size} processes that torchrun started (--nproc_per_node x --nnodes); "
            f"start a multiple of {model_size}"
        )
    return world_size // model_size


def single_process_context(device: torch.device | None = None) -> ParallelContext:
    """The grid of one process, without any process group."""
    return ParallelContext(device=device or torch.device("cpu"))


def _embedding_group(pp_size: int, grid: torch.Tensor, rank: int) -> dist.ProcessGroup | None:
    """Pairs (first stage, last stage) of equal dp and tp rank; every rank takes part in making every pair."""
    if pp_size == 1:
        return None
    own = None
    for dp_rank in range(grid.shape[0]):
        for tp_rank in range(grid.shape[2]):
            pair = [int(grid[dp_rank, 0, tp_rank]), int(grid[dp_rank, -1, tp_rank])]
            group = dist.new_group(pair)
            if rank in pair:
                own = group
    return own


def build_context(
    device: torch.device, tensor_parallel_size: int = 1, pipeline_parallel_size: int = 1, sequence_parallel: bool = False
) -> ParallelContext:
    """Lay the grid over the already initialised process group (or over one process when there is none).

    Collective: every rank calls it with the same sizes. ``sequence_parallel`` has no effect at tp size 1.
    """
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    dp_size = data_parallel_size(world_size, tensor_parallel_size, pipeline_parallel_size)
    if world_size == 1:
        return ParallelContext(device=device)
    mesh = init_device_mesh(device.type, (dp_size, pipeline_parallel_size, tensor_parallel_size), mesh_dim_names=("dp", "pp", "tp"))
    sizes = {"dp": dp_size, "pp": pipeline_parallel_size, "tp": tensor_parallel_size}
    groups = {name: mesh.get_group(name) if size > 1 else None for name, size in sizes.items()}
    dp_rank, pp_rank, tp_rank = (int(value) for value in mesh.get_coordinate() or (0, 0, 0))
    model_group = None
    for replica in range(dp_size):
        group = dist.new_group(mesh.mesh[replica].flatten().tolist())
        model_group = group if replica == dp_rank else model_group
    return ParallelContext(
        device=device,
        tp_size=tensor_parallel_size,
        pp_size=pipeline_parallel_size,
        dp_size=dp_size,
        tp_rank=tp_rank,
        pp_rank=pp_rank,
        dp_rank=dp_rank,
        tp_group=groups["tp"],
        pp_group=groups["pp"],
        dp_group=groups["dp"],
        model_group=model_group if tensor_parallel_size * pipeline_parallel_size > 1 else None,
        embedding_group=_embedding_group(pipeline_parallel_size, mesh.mesh, dist.get_rank()),
        sequence_parallel=sequence_parallel and tensor_parallel_size > 1,
    )


def initialize(
    device_name: str, tensor_parallel_size: int, pipeline_parallel_size: int, sequence_parallel: bool, timeout_minutes: int
) -> ParallelContext:
    """Choose the device, join torchrun's process group if there is one, and lay the grid. Called by entry verbs only."""
    world_size = world_size_from_environment()
    data_parallel_size(world_size, tensor_parallel_size, pipeline_parallel_size)
    device = select_device(device_name, int(os.environ.get("LOCAL_RANK", "0")))
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        dist.init_process_group(collective_backend(device), timeout=timedelta(minutes=timeout_minutes))
    return build_context(device, tensor_parallel_size, pipeline_parallel_size, sequence_parallel)


def shutdown() -> None:
    """Leave the process group, if one was joined."""
    if dist.is_initialized():
        dist.destroy_process_group()
