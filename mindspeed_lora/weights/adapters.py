"""LoRA adapters as sources: what all have in common, and ours and the peer's Megatron files; PEFT folders are in ``peft_adapter``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from mindspeed_lora.errors import CheckpointError
from mindspeed_lora.manifest import Manifest, read_manifest
from mindspeed_lora.weights.lora_spec import LoraSpec
from mindspeed_lora.weights.megatron_folder import MegatronFolder, Place
from mindspeed_lora.weights.table import LORA_RANK, LoraRow, Row, WeightTable, adapter_rows, unshard

LoraParts = tuple[torch.Tensor, list[torch.Tensor]]


class Adapter(ABC):
    """An adapter's tensors, whole and in HF order.

    ``lora`` None: nothing says r, alpha and targets (a peer's file whose args have no targets), the user must.
    ``found_r``, ``found_targets``: what the tensors themselves show.
    """

    path: Path
    lora: LoraSpec | None
    iteration: int
    manifest: Manifest | None
    base_reference: dict[str, str | None] | None  # path and fingerprint of the base it was trained on
    found_r: int
    found_targets: tuple[str, ...]
    num_layers: int

    def part_scales(self, row: Row, layer: int | None, lora: LoraSpec) -> list[float]:
        """Factor of each HF part's contribution; 0 where a part is not adapted."""
        return [lora.scale] * len(row.hf)

    @abstractmethod
    def require_uniform(self, purpose: str) -> None:
        """Refuse an adapter that can only be merged, where ``purpose`` needs one r, one scale and one A for each fused module.

        Raises:
            CheckpointError: it has several.
        """

    @abstractmethod
    def lora_parts(self, row: Row, layer: int | None) -> LoraParts:
        """``(A [r, in], [B [out_part, r] per HF name])`` of a targeted base row, in the file's dtype.

        Raises:
            CheckpointError: a tensor is missing, of another shape, or the adapter does not target the row.
        """

    def check_coverage(self, table: WeightTable) -> None:
        """Whether the adapter has exactly the tensors that its targets ask for in this model.

        Raises:
            CheckpointError: it has fewer, more, or of other shapes.
        """
        if self.num_layers != table.config.num_layers:
            raise CheckpointError(f"{self.path}: the adapter has {self.num_layers} layers, the base model {table.config.num_layers}")
        for row, layer in table.target_entries(self.found_targets):
            self.lora_parts(row, layer)


def lora_spec_from_manifest(manifest: Manifest | None) -> LoraSpec | None:
    """r, alpha and targets of our own artefacts."""
    if manifest is None or not manifest.lora:
        return None
    try:
        return LoraSpec(int(manifest.lora["r"]), float(manifest.lora["alpha"]), tuple(manifest.lora["targets"]))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"mindspeed_lora.json: its lora values are not readable ({error})") from error


def lora_spec_from_args(args: Any) -> LoraSpec | None:
    """r, alpha and targets of a peer's ``args``; None where its target list is empty (then the values are only defaults)."""
    targets = getattr(args, "lora_target_modules", None)
    if not targets:
        return None
    return LoraSpec(int(args.lora_r), float(args.lora_alpha), tuple(targets))


def found_rank_and_targets(path: Path, index: Mapping[str, list[Place]], folder: MegatronFolder) -> tuple[int, tuple[str, ...]]:
    """r and target modules as the LoRA tensors of a Megatron folder show them."""
    ranks, targets = set(), set()
    for name, places in index.items():
        if name.endswith(".lora_A.default.weight"):
            ranks.add(folder.shards(places[0])[0].shape[0])
            targets.add(name.split(".")[-4])
    if not targets:
        raise CheckpointError(f"{path}: holds no LoRA tensors (names with .lora_A.default.weight)")
    if len(ranks) > 1:
        raise CheckpointError(f"{path}: its LoRA tensors have different ranks {sorted(ranks)}; one r for all modules is supported")
    return ranks.pop(), ordered_targets(targets)


def lora_spec_of(path: Path, index: Mapping[str, list[Place]], folder: MegatronFolder, manifest: Manifest | None) -> LoraSpec | None:
    """r, alpha, targets from the manifest or the args, checked against the tensors.

    Raises:
        CheckpointError: they disagree.
    """
    found_r, found_targets = found_rank_and_targets(path, index, folder)
    spec = lora_spec_from_manifest(manifest) or lora_spec_from_args(folder.args)
    if spec is None:
        return None
    source = "mindspeed_lora.json" if lora_spec_from_manifest(manifest) else "the stored args"
    if spec.r != found_r:
        raise CheckpointError(f"{path}: {source} say LoRA r {spec.r}, but the tensors have r {found_r}")
    if set(spec.targets) != set(found_targets):
        raise CheckpointError(
            f"{path}: {source} say LoRA targets {' '.join(spec.targets)}, but the tensors are of {' '.join(found_targets)}"
        )
    return LoraSpec(spec.r, spec.alpha, found_targets)


def ordered_targets(targets: Iterable[str]) -> tuple[str, ...]:
    """Target modules in the order in which they are always named."""
    order = {module: index for index, module in enumerate(("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"))}
    return tuple(sorted(targets, key=lambda target: (order.get(target, len(order)), target)))


def base_reference_of(manifest: Manifest | None) -> dict[str, str | None] | None:
    """Path and fingerprint of the base, where the manifest names it."""
    if manifest is None or not manifest.base:
        return None
    return {"path": str(manifest.base.get("path", "")), "fingerprint": manifest.base.get("fingerprint")}


class MegatronAdapter(Adapter):
    """The LoRA tensors of a Megatron folder; a unified one's base tensors are not looked at."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folder = MegatronFolder(path)
        self.iteration = self.folder.iteration
        self.num_layers = self.folder.num_layers
        self.manifest = read_manifest(self.folder.iteration_dir) or read_manifest(path)
        self._index = self.folder.index()
        self.found_r, self.found_targets = found_rank_and_targets(path, self._index, self.folder)
        self.lora = lora_spec_of(path, self._index, self.folder, self.manifest)
        self.base_reference = base_reference_of(self.manifest)

    def _whole(self, row: LoraRow, layer: int | None) -> list[torch.Tensor]:
        name = row.name(layer)
        if name not in self._index:
            raise CheckpointError(f"{self.path}: adapter tensor {name} (layers numbered over all stages) is missing")
        shards = self.folder.shards(self._index[name][0])
        whole = [sum(shape[0] for shape in row.part_shapes), *row.part_shapes[0][1:]]
        expected = [self.found_r if size == LORA_RANK else size for size in whole]
        if row.axis is not None:
            expected[row.axis] //= len(shards)
        for tp_rank, shard in enumerate(shards):
            if list(shard.shape) != expected:
                raise CheckpointError(
                    f"{self.path}, tensor rank {tp_rank}: {name} has shape {list(shard.shape)}, "
                    f"but r {self.found_r} and the base model ask for {expected}"
                )
            if row.axis is None and not torch.equal(shard, shards[0]):
                raise CheckpointError(f"{self.path}: {name} is replicated, but tensor rank {tp_rank}'s copy differs from rank 0's")
        return unshard(row, shards)

    def require_uniform(self, purpose: str) -> None:
        """See the base class; it always is: opening has found one r, and its args hold one alpha."""

    def lora_parts(self, row: Row, layer: int | None) -> LoraParts:
        """See the base class."""
        if row.module not in self.found_targets:
            raise CheckpointError(f"{self.path}: does not adapt {row.module}; its targets are {' '.join(self.found_targets)}")
        a_row, b_row = adapter_rows(row)
        return self._whole(a_row, layer)[0], self._whole(b_row, layer)
