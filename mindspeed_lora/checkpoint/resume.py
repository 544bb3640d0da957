"""Training state that another layout can continue: optimizer tensors through torch.distributed.checkpoint, the rest as JSON.

::

    iter_0000010/resume/trainer_state.json     counters, what the data order depends on, schedule, layout
    iter_0000010/resume/*.distcp, .metadata    "<kind>.<global name>" fp32 (kind: master, exp_avg, exp_avg_sq), "rng.<kind>.<rank>"

A tensor that is cut over TP, or a stack of experts over EP, is stored as the whole logical tensor (a DTensor while saving and loading),
so TP, PP, EP and DP may all change. Gate and up, which each rank holds as ``[gate_r; up_r]``, are stored as ``[2, f, ...]`` cut along
dim 1.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from mindspeed_lora.checkpoint.resume_reader import INDEX_FILE, IndexedReader, read_index
from mindspeed_lora.checkpoint.together import together
from mindspeed_lora.device import rng_state, set_rng_state
from mindspeed_lora.errors import CheckpointError
from mindspeed_lora.files import write_json
from mindspeed_lora.parallel.context import ParallelContext
from mindspeed_lora.weights.table import Row, WeightTable, is_shared, is_stack

RESUME_FOLDER = "resume"
STATE_FILE = "trainer_state.json"
_LATER_FIELDS = ("best_loss", "best_iteration", "loss_scale")  # which the first saves did not have
_TIED = {"output_layer.weight": "embedding.word_embeddings.weight"}


class StateItem(Protocol):
    """A trained parameter; ``cut``: over TP."""

    @property
    def name(self) -> str:
        """Global Megatron name."""
        ...

    @property
    def parameter(self) -> torch.nn.Parameter:
        """This rank's shard."""
        ...

    @property
    def cut(self) -> bool:
        """Whether it is cut over TP."""
        ...


class OptimizerState(Protocol):
    """What is saved of an optimizer (see :class:`mindspeed_lora.training.optimizer.Optimizer`)."""

    kinds: tuple[str, ...]

    @property
    def items(self) -> Sequence[StateItem]:
        """The trained parameters."""
        ...

    def make_room(self) -> Any:
        """Memory for :meth:`gather`; what may fail, apart from the collectives."""
        ...

    def gather(self, room: Any) -> None:
        """Make the states whole over dp; nothing but collectives."""
        ...

    def export(self, kind: str, room: Any) -> Iterator[tuple[StateItem, torch.Tensor]]:
        """Each parameter's shard of one state, whole over dp, after :meth:`gather`."""
        ...

    def restore(self, kind: str, fetch: Callable[[StateItem], torch.Tensor]) -> None:
        """Overwrite one state."""
        ...

    def set_steps(self, steps: int) -> None:
        """Continue Adam's count."""
        ...

    def publish(self) -> None:
        """Write the masters into the weights."""
        ...


@dataclass
class TrainerState:
    """Counters of a run. ``schedule_samples`` counts successful steps only, ``optimizer_steps`` is Adam's count.

    ``origin``: what the data order and the schedule were made from, compared when the run is continued. ``best_loss``: the lowest
    validation loss of --save-best, at ``best_iteration``. ``loss_scale``: of fp16 (see :mod:`mindspeed_lora.training.loss_scale`).
    """

    iteration: int = 0
    consumed_samples: int = 0
    schedule_samples: int = 0
    optimizer_steps: int = 0
    skipped_samples: int = 0
    skipped_iterations: int = 0
    origin: dict[str, Any] = field(default_factory=dict)
    best_loss: float | None = None
    best_iteration: int | None = None
    loss_scale: dict[str, float] | None = None


def table_row(table: WeightTable, name: str) -> Row:
    """Row of a trained parameter, LoRA or base."""
    return table.lora_row(name) if ".lora_" in name else table.row(name)


class _Exchange:
    """Turns a rank's shards into what torch.distributed.checkpoint stores, and back."""

    def __init__(self, table: WeightTable, context: ParallelContext) -> None:
        self.table, self.context = table, context
        self._meshes: dict[tuple[bool, bool], DeviceMesh | None] = {}

    def stored_form(self, name: str, shard: torch.Tensor) -> torch.Tensor:
        """``shard`` (CPU, fp32) as a view, wrapped where it is cut over more than one rank."""
        row = table_row(self.table, name)
        axis, parts, whole = row.axis, len(row.part_shapes), shard
        outer = shard.shape[:1] if is_stack(name, shard) else ()  # experts
        if row.unit == "rank" and parts > 1:
            size, *inner = shard.shape[len(outer) :]
            shard, axis = shard.view(*outer, parts, size // parts, *inner), 1 if row.axis == 0 else None
        mesh = self._mesh(bool(outer), axis is not None)
        if mesh is None or (is_shared(name, whole) and self.context.experts.tp_size < self.context.tp_size):
            return shard
        placements = [Shard(0)] if outer and self.context.experts.ep_group is not None else []
        if len(placements) < mesh.ndim and axis is not None:
            placements.append(Shard(axis + len(outer)))
        return DTensor.from_local(shard, mesh, placements, run_check=False)

    def _mesh(self, stack: bool, cut: bool) -> DeviceMesh | None:
        """The ranks over which a tensor's parts lie: ``[tp]``; of a stack of experts ``[ep]``, ``[etp]`` or ``[ep, etp]``; None: one."""
        if (stack, cut) not in self._meshes:
            experts = self.context.experts
            groups = (experts.ep_group if stack else None, (experts.tp_group if stack else self.context.tp_group) if cut else None)
            self._meshes[stack, cut] = _mesh_of([group for group in groups if group is not None])
        return self._meshes[stack, cut]


def _mesh_of(groups: list[dist.ProcessGroup]) -> DeviceMesh | None:
    """A CPU mesh over one or two groups, of which the second's ranks follow one another."""
    if len(groups) < 2:
        return DeviceMesh.from_group(groups[0], "cpu") if groups else None
    outer, inner = (dist.get_process_group_ranks(group) for group in groups)
    offsets = torch.tensor(inner) - dist.get_rank()
    return DeviceMesh.from_group(groups, "cpu", torch.tensor(outer).unsqueeze(1) + offsets, mesh_dim_names=("ep", "tp"))


def write_resume(
    folder: Path, state: TrainerState, optimizer: OptimizerState | None, table: WeightTable, context: ParallelContext, save_rng: bool
) -> None:
    """Write the state into ``folder`` (which exists). Collective over all ranks; ``optimizer`` None leaves its tensors out.

    Raises:
        CheckpointError: a rank failed; every rank raises.
    """
    tensors = {} if optimizer is None else _optimizer_tensors(optimizer, table, context)
    with together(context, "saving the counters and the random state"):
        if save_rng:
            tensors |= {f"rng.{kind}.{context.rank}": value for kind, value in rng_state(context.device).items()}
        if context.rank == 0:
            write_json(folder / STATE_FILE, {**asdict(state), "world_size": context.world_size})
    if optimizer is not None or save_rng:
        try:
            with _quiet():  # its ranks agree among themselves
                dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder), no_dist=context.world_size == 1)
        except CheckpointException as error:
            raise CheckpointError(f"saving the training state failed: {_causes(error)}") from error


def _optimizer_tensors(optimizer: OptimizerState, table: WeightTable, context: ParallelContext) -> dict[str, torch.Tensor]:
    """By name, what this rank stores. Collective; see :func:`write_resume`."""
    with together(context, "making room for the optimizer's state"):
        room = optimizer.make_room()
    optimizer.gather(room)
    tensors: dict[str, torch.Tensor] = {}
    with together(context, "collecting the optimizer's state"):
        exchange = _Exchange(table, context)
        for kind in optimizer.kinds:
            for item, shard in optimizer.export(kind, room):
                if item.cut or context.cut(is_stack(item.name, shard))[0] == 0:
                    tensors[f"{kind}.{item.name}"] = exchange.stored_form(item.name, shard.contiguous())
    return tensors


def _causes(error: CheckpointException) -> str:
    """The ranks' errors without their tracebacks."""
    causes = {rank: cause for rank, (cause, _) in error.failures.items()}
    return "; ".join(f"rank {rank}: {type(cause).__name__} {cause}".rstrip() for rank, cause in sorted(causes.items()))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's remark that one process saves alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _load(folder: Path, wanted: dict[str, torch.Tensor], context: ParallelContext) -> None:
    """Fill ``wanted`` in place; Raises CheckpointError where a file is damaged. Collective."""
    try:
        with _quiet():
            dcp.load(wanted, storage_reader=IndexedReader(folder), no_dist=context.world_size == 1)
    except CheckpointException as error:
        raise CheckpointError(
            f"{folder}: the training state cannot be read ({_causes(error)}); pass --no-load-optim --no-load-rng, or --finetune"
        ) from error


def read_trainer_state(folder: Path) -> TrainerState:
    """The counters of a resume folder.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = folder / STATE_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        later = {key for key in _LATER_FIELDS if key not in values}
        return TrainerState(**{key: values[key] for key in TrainerState.__dataclass_fields__ if key not in later})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: not a readable training state ({error}); pass --finetune to start from the weights at iteration 0"
        ) from error


def has_training_state(iteration_folder: Path) -> bool:
    """Whether an iteration can be continued."""
    return (iteration_folder / RESUME_FOLDER / STATE_FILE).is_file()


def _stored_sizes(folder: Path) -> dict[str, tuple[int, ...]]:
    if not (folder / INDEX_FILE).is_file():
        return {}
    return {name: tuple(getattr(entry, "size", ())) for name, entry in read_index(folder).state_dict_metadata.items()}


def restore_optimizer(folder: Path, optimizer: OptimizerState, steps: int, table: WeightTable, context: ParallelContext) -> None:
    """Load masters and moments at this run's layout and write the weights from the masters. Collective.

    Raises:
        CheckpointError: the state lacks a trained parameter, or has it in another shape.
    """
    sizes = _stored_sizes(folder)
    exchange = _Exchange(table, context)
    for kind in optimizer.kinds:
        shards = {item.name: torch.empty(item.parameter.shape, dtype=torch.float32) for item in optimizer.items}
        wanted: dict[str, torch.Tensor] = {}
        for name, shard in shards.items():
            key = f"{kind}.{name}"
            if key not in sizes and name in _TIED:
                key = f"{kind}.{_TIED[name]}"
            form = exchange.stored_form(name, shard)
            _check_stored(folder, key, sizes, tuple(form.shape))
            wanted[key] = form
        _load(folder, wanted, context)

        def fetch(item: StateItem, shards: dict[str, torch.Tensor] = shards) -> torch.Tensor:
            return shards[item.name]

        optimizer.restore(kind, fetch)
    optimizer.set_steps(steps)
    optimizer.publish()


def _check_stored(folder: Path, key: str, sizes: dict[str, tuple[int, ...]], shape: tuple[int, ...]) -> None:
    if key not in sizes:
        raise CheckpointError(
            f"{folder}: holds no optimizer state for {key}; it was saved with --no-save-optim or trains other parameters; "
            "pass --no-load-optim, or --finetune to start from the weights at iteration 0"
        )
    if sizes[key] != shape:
        raise CheckpointError(
            f"{folder}: {key} has shape {list(sizes[key])}, this run needs {list(shape)}; "
            "a vocabulary padded otherwise? pass the same --padded-vocab-size, or --no-load-optim"
        )


def restore_rng(folder: Path, context: ParallelContext) -> bool:
    """Continue this rank's random state; False where it was not saved for this rank (another number of processes)."""
    state = {kind: value.clone() for kind, value in rng_state(context.device).items()}
    wanted = {f"rng.{kind}.{context.rank}": value for kind, value in state.items()}
    sizes = _stored_sizes(folder)
    there = all(sizes.get(key) == tuple(value.shape) for key, value in wanted.items())
    if sizes:
        _load(folder, wanted if there else {}, context)
    if there:
        set_rng_state(context.device, state)
    return there
