"""LoRA adapters as sources: ours and the peer's Megatron files, and PEFT folders."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from mindspeed_lora.errors import CheckpointError
from mindspeed_lora.manifest import Manifest, read_manifest
from mindspeed_lora.weights.hf_files import read_safetensors_header
from mindspeed_lora.weights.lora_spec import LoraSpec
from mindspeed_lora.weights.megatron_folder import MegatronFolder, Place
from mindspeed_lora.weights.rows import ROWS
from mindspeed_lora.weights.table import LORA_RANK, LoraRow, Row, WeightTable, adapter_rows, split_hf_layer, unshard

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
    return ranks.pop(), _ordered(targets)


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


def _ordered(targets: Iterable[str]) -> tuple[str, ...]:
    order = {module: index for index, module in enumerate(("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"))}
    return tuple(sorted(targets, key=lambda target: (order.get(target, len(order)), target)))


def _reference(manifest: Manifest | None) -> dict[str, str | None] | None:
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
        self.base_reference = _reference(self.manifest)

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

    def lora_parts(self, row: Row, layer: int | None) -> LoraParts:
        """See the base class."""
        if row.module not in self.found_targets:
            raise CheckpointError(f"{self.path}: does not adapt {row.module}; its targets are {' '.join(self.found_targets)}")
        a_row, b_row = adapter_rows(row)
        return self._whole(a_row, layer)[0], self._whole(b_row, layer)


class PeftAdapter(Adapter):
    """A PEFT folder whose fused modules (q, k, v; gate, up) share one A, as the ones written here do."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.iteration = 0
        self.manifest = read_manifest(path)
        values = _read_adapter_config(path / "adapter_config.json")
        self._tensors = read_safetensors_header(path / "adapter_model.safetensors")
        self.found_r = int(values["r"])
        self._modules = _peft_modules(self._tensors, path)
        self.found_targets = _ordered({module for module, _ in self._modules.values()})
        layers = {layer for _, layer in self._modules.values() if layer is not None}
        self.num_layers = max(layers) + 1 if layers else 0
        alpha = float(values.get("lora_alpha", self.found_r))
        if values.get("use_rslora"):  # scale = alpha / sqrt(r)
            alpha *= math.sqrt(self.found_r)
        self.lora = LoraSpec(self.found_r, alpha, self.found_targets)
        reference = _reference(self.manifest)
        base_path = values.get("base_model_name_or_path")
        self.base_reference = reference or ({"path": str(base_path), "fingerprint": None} if base_path else None)

    def _read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name not in self._tensors:
            raise CheckpointError(f"{self.path}: adapter tensor {name} is missing; every part of a fused module must be adapted")
        if self._tensors[name].shape != shape:
            raise CheckpointError(
                f"{self.path}: {name} has shape {list(self._tensors[name].shape)}, but r and the base model ask for {list(shape)}"
            )
        return self._tensors[name].read()

    def lora_parts(self, row: Row, layer: int | None) -> LoraParts:
        """See the base class."""
        a_row, b_row = adapter_rows(row)
        a_shape = (self.found_r, row.part_shapes[0][1])
        matrices = [self._read(name, a_shape) for name in a_row.hf_names(layer)]
        for name, matrix in zip(a_row.hf_names(layer), matrices, strict=True):
            if not torch.equal(matrix, matrices[0]):
                raise CheckpointError(
                    f"{self.path}: {name} differs from {a_row.hf_names(layer)[0]}; adapters whose q, k, v (gate, up) have different A "
                    "are not supported yet: merge this one with peft's merge_and_unload"
                )
        b_names = zip(b_row.hf_names(layer), row.part_shapes, strict=True)
        return matrices[0], [self._read(name, (shape[0], self.found_r)) for name, shape in b_names]

    def check_coverage(self, table: WeightTable) -> None:
        """See the base class."""
        super().check_coverage(table)
        expected = {
            name
            for row, layer in table.target_entries(self.found_targets)
            for adapter in adapter_rows(row)
            for name in adapter.hf_names(layer)
        }
        unknown = sorted(set(self._tensors) - expected)
        if unknown:
            raise CheckpointError(f"{self.path}: {len(unknown)} adapter tensors fit nothing in the base model: {', '.join(unknown[:5])}")


def _read_adapter_config(path: Path) -> dict[str, Any]:
    """``adapter_config.json``; what would change the function and is not computed here is refused."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        peft_type, r = values.get("peft_type"), values["r"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a readable PEFT LoRA configuration ({error})") from error
    if peft_type != "LORA" or not isinstance(r, int) or r < 1:
        raise CheckpointError(f"{path}: peft_type {peft_type!r}, r {r!r}; only LORA with r >= 1 is supported")
    neutral: dict[str, tuple[Any, ...]] = {
        "use_dora": (False, None),
        "modules_to_save": (None, []),
        "bias": ("none", None),
        "lora_bias": (False, None),
        "rank_pattern": ({}, None),
        "alpha_pattern": ({}, None),
        "fan_in_fan_out": (False, None),
        "target_parameters": (None, []),
        "trainable_token_indices": (None,),
    }
    for key, accepted in neutral.items():
        if values.get(key) not in accepted:
            raise CheckpointError(f"{path}: {key} is {values[key]!r}, which is not supported; supported: {accepted[0]!r}")
    return values


def _peft_modules(tensors: Iterable[str], path: Path) -> dict[str, tuple[str, int | None]]:
    """PEFT tensor name -> (Megatron module, layer).

    Raises:
        CheckpointError: a tensor belongs to no targetable module.
    """
    by_stem = {name.removesuffix("weight"): spec.module for spec in ROWS if spec.module for name in spec.hf}
    found: dict[str, tuple[str, int | None]] = {}
    for name in tensors:
        plain, layer = split_hf_layer(name.removeprefix("base_model.model."))
        module = by_stem.get(plain.rpartition("lora_")[0])
        if module is None:
            raise CheckpointError(f"{path}: adapter tensor {name} belongs to no module that can be adapted here")
        found[name] = (module, layer)
    if not found:
        raise CheckpointError(f"{path}: adapter_model.safetensors holds no tensors")
    return found
