"""LoRA adapters as sources: what all have in common, and ours and the peer's Megatron files; PEFT folders are in ``peft_adapter``."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mindspeed_lora.errors import CheckpointError
from mindspeed_lora.manifest import MANIFEST_NAME, Manifest, read_manifest
from mindspeed_lora.weights.lora_blocks import LoraParts, Pair, adapted_entries, is_block_sparse, module_of, split_pairs
from mindspeed_lora.weights.lora_spec import LoraSpec, ModuleLora
from mindspeed_lora.weights.megatron_folder import MegatronFolder, Place
from mindspeed_lora.weights.table import LORA_RANK, LoraRow, Row, WeightTable, adapter_rows, unshard


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

    def spec(self, table: WeightTable) -> LoraSpec | None:
        """``lora`` for one base model: with its linears' own ranks where they are not all alike."""
        return self.lora

    @abstractmethod
    def lora_parts(self, row: Row, layer: int | None) -> LoraParts:
        """A and B of a base row that is adapted, fused (see :mod:`mindspeed_lora.weights.lora_blocks`), in the file's dtype.

        Raises:
            CheckpointError: a tensor is missing, of another shape, or the adapter does not target the row.
        """

    @abstractmethod
    def pairs(self, row: Row, layer: int | None) -> list[Pair | None]:
        """A and B of each HF part of a row, None where it is not adapted; Raises as :meth:`lora_parts`."""

    @abstractmethod
    def check_coverage(self, table: WeightTable) -> None:
        """Whether the adapter has exactly the tensors that its targets ask for in this model.

        Raises:
            CheckpointError: it has fewer, more, or of other shapes.
        """

    def fingerprint(self, table: WeightTable, spec: LoraSpec) -> str:
        """Identity of the adapter, the same for every layout: ``spec`` and every byte of its tensors. Raises as :meth:`pairs`."""
        digest = hashlib.sha256(json.dumps(spec.entry(), sort_keys=True).encode())
        for row, layer, _ in adapted_entries(table, spec):
            for tensor in (tensor for pair in self.pairs(row, layer) for tensor in pair or ()):
                digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        return f"sha256:{digest.hexdigest()}"


def lora_spec_from_manifest(manifest: Manifest | None) -> LoraSpec | None:
    """r, alpha and targets of our own artefacts."""
    if manifest is None or not manifest.lora:
        return None
    try:
        return LoraSpec.from_entry(manifest.lora)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"mindspeed_lora.json: its lora values are not readable ({error})") from error


def lora_spec_from_args(args: Any) -> LoraSpec | None:
    """r, alpha and targets of a peer's ``args``; None where its target list is empty (then the values are only defaults)."""
    targets = getattr(args, "lora_target_modules", None)
    if not targets:
        return None
    return LoraSpec(int(args.lora_r), float(args.lora_alpha), tuple(targets))


def found_widths(path: Path, index: Mapping[str, list[Place]], folder: MegatronFolder) -> dict[str, int]:
    """Linear -> rows of its A, as the LoRA tensors of a Megatron folder show them."""
    end = ".lora_A.default.weight"
    widths = {name.removesuffix(end): int(folder.shards(places[0])[0].shape[0]) for name, places in index.items() if name.endswith(end)}
    if not widths:
        raise CheckpointError(f"{path}: holds no LoRA tensors (names with {end})")
    return widths


def targets_of(widths: Mapping[str, int]) -> tuple[str, ...]:
    """Target modules of adapted linears."""
    return ordered_targets({name.rpartition(".")[2] for name in widths})


def lora_spec_of(path: Path, widths: Mapping[str, int], folder: MegatronFolder, manifest: Manifest | None) -> LoraSpec | None:
    """r, alpha, targets from the manifest or the args, checked against the tensors.

    Raises:
        CheckpointError: they disagree, or nothing says how tensors of several ranks are to be read.
    """
    described = lora_spec_from_manifest(manifest)
    spec = described or lora_spec_from_args(folder.args)
    if spec is None:
        if len(set(widths.values())) > 1:
            raise CheckpointError(
                f"{path}: its LoRA tensors have different ranks {sorted(set(widths.values()))}, and no {MANIFEST_NAME} says how their "
                "parts lie in them; copy that file too"
            )
        return None
    source = MANIFEST_NAME if described else "the stored args"
    found_targets = targets_of(widths)
    if set(spec.targets) != set(found_targets):
        raise CheckpointError(
            f"{path}: {source} say LoRA targets {' '.join(spec.targets)}, but the tensors are of {' '.join(found_targets)}"
        )
    for name, width in widths.items():
        module = spec.module(name)
        if module is None or module.width != width:
            asked = "nothing of this linear" if module is None else f"LoRA r {' + '.join(map(str, module.ranks))}"
            raise CheckpointError(f"{path}: {source} say {asked}, but the tensors have r {width} ({name})")
    if missing := sorted(set(spec.modules) - set(widths)):
        raise CheckpointError(f"{path}: {source} name {len(missing)} linears without adapter tensors: {', '.join(missing[:5])}")
    return replace(spec, targets=found_targets)


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

    def __init__(self, path: Path, lora: LoraSpec | None = None) -> None:
        """``lora``: what the run that is writing it knows; None: what its manifest or ``args`` say."""
        self.path = path
        self.folder = MegatronFolder(path)
        self.iteration = self.folder.iteration
        self.num_layers = self.folder.num_layers
        self.manifest = read_manifest(self.folder.iteration_dir) or read_manifest(path)
        self._index = self.folder.index()
        widths = found_widths(path, self._index, self.folder)
        self.lora = lora or lora_spec_of(path, widths, self.folder, self.manifest)
        self.found_r = next(iter(widths.values())) if self.lora is None else self.lora.r
        self.found_targets = targets_of(widths)
        self.base_reference = base_reference_of(self.manifest)

    def _module(self, row: Row, layer: int | None) -> ModuleLora:
        module = module_of(self.lora or LoraSpec(self.found_r, self.found_r, self.found_targets), row, layer)
        if module is None:
            targets = " ".join(self.found_targets)
            raise CheckpointError(f"{self.path}: does not adapt {row.name(layer)} ({row.module}); its targets are {targets}")
        return module

    def _whole(self, row: LoraRow, layer: int | None, r: int) -> list[torch.Tensor]:
        name = row.name(layer)
        if name not in self._index:
            raise CheckpointError(f"{self.path}: adapter tensor {name} (layers numbered over all stages) is missing")
        shards = self.folder.shards(self._index[name][0])
        whole = [sum(shape[0] for shape in row.part_shapes), *row.part_shapes[0][1:]]
        expected = [r if size == LORA_RANK else size for size in whole]
        if row.axis is not None:
            expected[row.axis] //= len(shards)
        for tp_rank, shard in enumerate(shards):
            if list(shard.shape) != expected:
                raise CheckpointError(
                    f"{self.path}, tensor rank {tp_rank}: {name} has shape {list(shard.shape)}, "
                    f"but r {r} and the base model ask for {expected}"
                )
            if row.axis is None and not torch.equal(shard, shards[0]):
                raise CheckpointError(f"{self.path}: {name} is replicated, but tensor rank {tp_rank}'s copy differs from rank 0's")
        return unshard(row, shards)

    def lora_parts(self, row: Row, layer: int | None) -> LoraParts:
        """See the base class."""
        module = self._module(row, layer)
        a_row, b_row = adapter_rows(row)
        matrices_b = self._whole(b_row, layer, module.width)
        if not is_block_sparse(row, module, matrices_b):
            raise CheckpointError(
                f"{self.path}: {b_row.name(layer)} is not zero outside the blocks of its parts that {MANIFEST_NAME} names; "
                "it was changed by another program"
            )
        return self._whole(a_row, layer, module.width)[0], matrices_b

    def pairs(self, row: Row, layer: int | None) -> list[Pair | None]:
        """See the base class."""
        return split_pairs(self._module(row, layer), self.lora_parts(row, layer))

    def check_coverage(self, table: WeightTable) -> None:
        """See the base class."""
        if self.num_layers != table.config.num_layers and not (self.lora and self.lora.modules):
            raise CheckpointError(f"{self.path}: the adapter has {self.num_layers} layers, the base model {table.config.num_layers}")
        spec = self.lora or LoraSpec(self.found_r, self.found_r, self.found_targets)
        entries = adapted_entries(table, spec)
        for row, layer, _ in entries:
            self.lora_parts(row, layer)
        if unknown := sorted(set(spec.modules) - {row.name(layer).removesuffix(".weight") for row, layer, _ in entries}):
            raise CheckpointError(f"{self.path}: {len(unknown)} adapted linears fit nothing in the base model: {', '.join(unknown[:5])}")
