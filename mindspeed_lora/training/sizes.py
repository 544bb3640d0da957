"""The numbers that decide what a run needs: the model, how it is cut, and what one step holds. Read from no device and no process group.

The memory estimate, the time estimate and ``--dry-run``'s advice are functions of this value alone, so that "what if" is one
``dataclasses.replace``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from mindspeed_lora.arguments.configs import RecomputeFlags
from mindspeed_lora.parallel.pipeline import bubble_fraction
from mindspeed_lora.weights.config import ModelConfig, stage_layers
from mindspeed_lora.weights.lora_spec import LoraSpec
from mindspeed_lora.weights.table import Row, WeightTable


@dataclass(frozen=True)
class RunSizes:
    """One training run. ``length``: padded tokens of a row; ``parameter_bytes``: of weights and activations; ``rows_per_record``:
    2 for preference pairs; ``reference_copy``: a frozen model beside the trained one.
    """

    model: ModelConfig
    lora: LoraSpec | None
    parameter_bytes: int
    tp_size: int = 1
    pp_size: int = 1
    dp_size: int = 1
    ep_size: int = 1
    expert_tensor_parallel_size: int | None = None  # None: tp_size
    layers_per_virtual_stage: int | None = None
    sequence_parallel: bool = False
    micro_batch_size: int = 1
    num_micro_batches: int = 1  # per replica and step
    rows_per_record: int = 1
    reference_copy: bool = False
    length: int = 4096
    recompute: RecomputeFlags = field(default_factory=RecomputeFlags)
    fusion: bool = True
    sharded_optimizer: bool = False
    fsdp_base: bool = False
    qlora: bool = False
    pipeline_buffer_fraction: float = 0.05
    device_type: str = "cuda"  # cpu, or what else computes
    widened: bool = False  # 16-bit values become fp32 where they are multiplied, in attention and experts too: ops.products.widens

    @property
    def world_size(self) -> int:
        """Devices."""
        return self.tp_size * self.pp_size * self.dp_size

    @property
    def expert_tp_size(self) -> int:
        """Over how many ranks an expert's matrices are cut."""
        return self.expert_tensor_parallel_size or self.tp_size

    @property
    def expert_dp_size(self) -> int:
        """How many ranks of a stage hold the same part of the same experts."""
        return self.dp_size * self.tp_size // (self.ep_size * self.expert_tp_size)

    @property
    def micro_batch_tokens(self) -> int:
        """Padded tokens of one forward pass."""
        return self.micro_batch_size * self.rows_per_record * self.length

    @property
    def boundary_bytes(self) -> float:
        """Hidden states of a micro-batch between two layers: [s, b, h], cut over t with sequence parallelism."""
        whole = self.micro_batch_tokens * self.model.hidden_size * self.parameter_bytes
        return whole / (self.tp_size if self.sequence_parallel else 1)

    @property
    def global_batch_size(self) -> int:
        """Rows of one step."""
        return self.micro_batch_size * self.num_micro_batches * self.dp_size

    @property
    def num_chunks(self) -> int:
        """Model chunks of a pipeline stage (1 without virtual stages)."""
        return len(stage_layers(self.model.num_layers, self.pp_size, self.layers_per_virtual_stage)[0])

    @property
    def layers_per_stage(self) -> int:
        """Decoder layers of a rank."""
        return self.model.num_layers // self.pp_size

    @property
    def bubble(self) -> float:
        """Idle share of the pipeline."""
        return bubble_fraction(self.num_micro_batches, self.pp_size, self.num_chunks)

    def recomputed_layers(self, chunk_layers: int) -> int:
        """Of a chunk's layers, those whose activations are computed again."""
        if self.recompute.granularity != "full":
            return 0
        return min(self.recompute.num_layers or chunk_layers, chunk_layers) if self.recompute.method == "block" else chunk_layers

    def describe(self) -> str:
        """The layout in one phrase."""
        sequence = " with sequence parallelism" if self.sequence_parallel and self.tp_size > 1 else ""
        return f"TP {self.tp_size}{sequence} x PP {self.pp_size} x DP {self.dp_size}{self.describe_experts()}"

    def describe_experts(self) -> str:
        """Where the experts of a stage lie, in one phrase; empty for a dense model."""
        if self.model.experts is None:
            return ""
        count, cut = self.model.experts.count, f" cut over TP {self.tp_size}" if self.expert_tp_size > 1 else ""
        return f" (EP {self.ep_size}: {count // self.ep_size} of {count} experts a rank{cut})"


@dataclass(frozen=True)
class StageParameters:
    """Elements on one rank of a stage, norms and biases included. ``layer_base``: frozen or trained weights of one decoder layer."""

    embedding: int
    head: int  # own head weight (0 where it is the embedding itself) and the final norm
    layer_base: int
    layer_linear: int  # of layer_base, what --qlora quantises
    layer_adapter: int
    layers: int
    largest: int  # of one tensor
    expert_base: int  # of base, what belongs to routed experts
    expert_adapter: int  # of adapter, likewise

    @property
    def base(self) -> int:
        """The model's own weights."""
        return self.embedding + self.head + self.layers * self.layer_base

    @property
    def adapter(self) -> int:
        """LoRA A and B."""
        return self.layers * self.layer_adapter


def stage_parameters(sizes: RunSizes, pp_rank: int) -> StageParameters:
    """Counts of every rank of stage ``pp_rank``, from the weight table; where layers differ, a layer has their average."""
    table, lora = WeightTable(sizes.model), sizes.lora
    is_first, is_last = pp_rank == 0, pp_rank == sizes.pp_size - 1

    count = sizes.model.experts.count // sizes.ep_size if sizes.model.experts else 0

    def local(row: Row, r: int | None = None) -> int:
        if row.expert is not None and row.expert >= count:  # of another EP rank
            return 0
        in_layers = 1.0 if row.layers is None else len(row.layers) / sizes.model.num_layers
        cut = sizes.tp_size if row.expert is None else sizes.expert_tp_size
        return round(in_layers * math.prod(table.local_shape(row, cut, r)))

    def of_experts(rows: list[Row]) -> list[Row]:
        return [row for row in rows if row.expert is not None]

    places = {"embedding": is_first, "head": is_last, "layer": True}
    present = [row for row in table.rows if places[row.place] and not (row.alias_of and is_first)]
    total = {place: sum(local(row) for row in present if row.place == place) for place in places}
    layer_rows = [row for row in present if row.place == "layer"]
    shared = lora is not None and lora.shared_experts  # then the first expert's stand for all, and lie on every rank
    adapted = [row for row in layer_rows if lora and row.module in lora.targets and not (shared and row.expert)]
    pairs: list[Row] = [matrix for row in adapted for matrix in table.lora_pair(row)]
    r = lora.widest if lora else None
    return StageParameters(
        embedding=total["embedding"],
        head=total["head"],
        layer_base=total["layer"],
        layer_linear=sum(local(row) for row in layer_rows if row.module),
        layer_adapter=sum(local(row, r) for row in pairs),
        layers=sizes.layers_per_stage,
        largest=max(local(row) * (1 if row.expert is None else count) for row in present),  # a rank's experts are one tensor
        expert_base=sizes.layers_per_stage * sum(local(row) for row in of_experts(layer_rows)),
        expert_adapter=0 if shared else sizes.layers_per_stage * sum(local(row, r) for row in of_experts(pairs)),
    )
