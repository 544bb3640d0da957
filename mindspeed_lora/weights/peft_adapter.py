"""PEFT folders as adapters, also those whose modules differ in A, r and alpha.

A fused Megatron module (q, k, v; gate, up) of an adapter trained elsewhere usually has parts with different A. They are held exactly:
A stacked to ``[r_q + r_k + r_v, in]``, each part's B ``[out_part, r_q + r_k + r_v]`` zero outside its own columns. Each part keeps
its own scale, and a part that is not adapted has scale 0.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from mindspeed_lora.errors import CheckpointError
from mindspeed_lora.manifest import read_manifest
from mindspeed_lora.weights.adapters import Adapter, LoraParts, base_reference_of, ordered_targets
from mindspeed_lora.weights.hf_files import StoredTensor, read_safetensors_header
from mindspeed_lora.weights.lora_spec import LoraSpec
from mindspeed_lora.weights.rows import ROWS
from mindspeed_lora.weights.table import Row, WeightTable, split_hf_layer

_TENSOR = re.compile(r"^(?:base_model\.model\.)?(.+)\.lora_([AB])\.(?:default\.)?weight$")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")


@dataclass(frozen=True)
class _Module:
    """The pair of one HF linear; None: that half is missing in the file."""

    name: str  # model.layers.0.self_attn.q_proj
    layer: int | None
    target: str  # Megatron's module
    a: StoredTensor | None
    b: StoredTensor | None
    r: int
    scale: float


def _at(pattern: Mapping[str, Any], name: str, default: Any) -> Any:
    """Value of ``rank_pattern`` or ``alpha_pattern`` for a module: the first key that is the name, or its end (a regular expression)."""
    for key, value in pattern.items():
        try:
            if re.match(rf"(.*\.)?({key})$", name):
                return value
        except re.error as error:
            raise CheckpointError(f"adapter_config.json: {key!r} in rank_pattern or alpha_pattern is no pattern ({error})") from error
    return default


def _target_of(name: str, path: Path) -> tuple[str, int | None]:
    """(Megatron module, layer) of an HF linear."""
    plain, layer = split_hf_layer(name + ".weight")
    plain = _EXPERT.sub(".experts.{expert}.", plain)
    for spec in ROWS:
        if spec.module and plain in spec.hf:
            return spec.module, layer
    raise CheckpointError(f"{path}: {name} belongs to no module that can be adapted here")


class PeftAdapter(Adapter):
    """A PEFT folder: ``adapter_config.json`` and ``adapter_model.safetensors``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.iteration = 0
        self.manifest = read_manifest(path)
        self.values = _read_adapter_config(path / "adapter_config.json")
        self.found_r = int(self.values["r"])
        self._modules = self._read_modules(read_safetensors_header(path / "adapter_model.safetensors"))
        self.found_targets = ordered_targets({module.target for module in self._modules.values()})
        self.num_layers = 1 + max((module.layer for module in self._modules.values() if module.layer is not None), default=-1)
        self.lora = LoraSpec(self.found_r, self._scale(self.found_r, self._alpha) * self.found_r, self.found_targets)
        base_path = self.values.get("base_model_name_or_path")
        self.base_reference = base_reference_of(self.manifest) or ({"path": str(base_path), "fingerprint": None} if base_path else None)

    @property
    def _alpha(self) -> float:
        return float(self.values.get("lora_alpha", 8))  # peft's default

    def _scale(self, r: int, alpha: float) -> float:
        return alpha / math.sqrt(r) if self.values.get("use_rslora") else alpha / r

    def _read_modules(self, tensors: Mapping[str, StoredTensor]) -> dict[str, _Module]:
        halves: dict[str, dict[str, StoredTensor]] = {}
        for name, tensor in tensors.items():
            match = _TENSOR.match(name)
            if match is None:
                raise CheckpointError(f"{self.path}: {name} is no LoRA matrix of a linear layer; only those can be adapted here")
            halves.setdefault(match[1], {})[match[2]] = tensor
        if not halves:
            raise CheckpointError(f"{self.path}: adapter_model.safetensors holds no tensors")
        modules = {}
        ranks, alphas = self.values.get("rank_pattern") or {}, self.values.get("alpha_pattern") or {}
        for name, pair in halves.items():
            target, layer = _target_of(name, self.path)
            r, alpha = int(_at(ranks, name, self.found_r)), float(_at(alphas, name, self._alpha))
            modules[name] = _Module(name, layer, target, pair.get("A"), pair.get("B"), r, self._scale(r, alpha))
        return modules

    def _parts(self, row: Row, layer: int | None) -> list[_Module | None]:
        return [self._modules.get(name.removesuffix(".weight")) for name in row.hf_names(layer)]

    def _fused_with(self, module: _Module) -> tuple[str, ...]:
        """Names of the linears that lie in one Megatron tensor with a module, itself among them."""
        latent = any(name.endswith(".kv_a_proj_with_mqa") for name in self._modules)
        expert = _EXPERT.search(module.name)
        for spec in ROWS:
            if spec.module is None or (latent != any("kv_a_proj_with_mqa" in name for name in spec.hf) and spec.module == "linear_qkv"):
                continue
            names = tuple(name.format(layer=module.layer, expert=expert[1] if expert else None).removesuffix(".weight") for name in spec.hf)
            if module.name in names:
                return names
        return (module.name,)

    def part_scales(self, row: Row, layer: int | None, lora: LoraSpec) -> list[float]:
        """See the base class; the modules' own scales (``lora`` repeats the folder's r and alpha)."""
        return [module.scale if module else 0.0 for module in self._parts(row, layer)]

    def _matrix(self, module: _Module, half: str, shape: tuple[int, int]) -> torch.Tensor:
        stored = module.a if half == "A" else module.b
        if stored is None:
            raise CheckpointError(f"{self.path}: {module.name}.lora_{half}.weight is missing beside its other half")
        if stored.shape != shape:
            raise CheckpointError(
                f"{self.path}: {module.name}.lora_{half}.weight has shape {list(stored.shape)}, "
                f"but r and the base model ask for {list(shape)}"
            )
        return stored.read()

    def lora_parts(self, row: Row, layer: int | None) -> LoraParts:
        """See the base class. Parts with one common A give ``[r, in]``, others are stacked."""
        modules = self._parts(row, layer)
        present = [module for module in modules if module is not None]
        width = row.part_shapes[0][1]
        matrices = [self._matrix(module, "A", (module.r, width)) for module in present]
        own = [
            self._matrix(module, "B", (shape[0], module.r)) if module else None
            for module, shape in zip(modules, row.part_shapes, strict=True)
        ]
        if len(present) == len(modules) and all(torch.equal(matrix, matrices[0]) for matrix in matrices):
            return matrices[0], [matrix for matrix in own if matrix is not None]
        stacked = torch.cat(matrices) if matrices else torch.zeros(1, width)
        placed, column = [], 0
        for module, matrix, shape in zip(modules, own, row.part_shapes, strict=True):
            wide = torch.zeros(shape[0], stacked.shape[0], dtype=stacked.dtype)
            if module is not None and matrix is not None:
                wide[:, column : column + module.r] = matrix
                column += module.r
            placed.append(wide)
        return stacked, placed

    @cached_property
    def _why_not_uniform(self) -> str | None:
        """The first thing that keeps the adapter from being held at one r and scale; None: nothing does."""
        for module in self._modules.values():
            if module.r != self.found_r or self.lora is None or not math.isclose(module.scale, self.lora.scale):
                return f"{module.name} has r {module.r} and scale {module.scale:g}, others have r {self.found_r}"
        for names in {self._fused_with(module) for module in self._modules.values()}:
            found = [self._modules[name] for name in names if name in self._modules]
            if len(found) != len(names):
                return f"{found[0].name} is adapted, but {', '.join(sorted(set(names) - {each.name for each in found}))} is not"
            first = [module.a.read() for module in found if module.a is not None]
            if any(matrix.shape != first[0].shape or not torch.equal(matrix, first[0]) for matrix in first):
                return f"{', '.join(module.name for module in found)} have different A"
        return None

    def require_uniform(self, purpose: str) -> None:
        """See the base class."""
        if self._why_not_uniform is not None:
            raise CheckpointError(
                f"{self.path}: cannot {purpose}: {self._why_not_uniform}, and here q, k, v (and gate, up) share one A "
                "and all modules one r; merge this adapter into its base with convert_ckpt.py --lora-load, and start from the result"
            )

    def check_coverage(self, table: WeightTable) -> None:
        """See the base class; what ``target_modules`` names must be there in every layer that ``layers_to_transform`` names."""
        entries = [(row, layer) for row, layer in table.entries() if row.module is not None]
        known = {name.removesuffix(".weight") for row, layer in entries for name in row.hf_names(layer)}
        unknown = sorted(set(self._modules) - known)
        if unknown:
            raise CheckpointError(f"{self.path}: {len(unknown)} adapted modules fit nothing in the base model: {', '.join(unknown[:5])}")
        for row, layer in table.target_entries(self.found_targets):
            self.lora_parts(row, layer)
        missing = sorted(name for name in known - set(self._modules) if self._is_target(name))
        if missing:
            raise CheckpointError(
                f"{self.path}: {len(missing)} modules that target_modules names have no adapter tensors: {', '.join(missing[:5])}"
            )

    def _is_target(self, name: str) -> bool:
        """Whether adapter_config.json says that a module is adapted; its regular expressions are not followed."""
        targets, layers = self.values.get("target_modules"), self.values.get("layers_to_transform")
        _, layer = split_hf_layer(name + ".weight")
        if layers is not None and layer not in ([layers] if isinstance(layers, int) else layers):
            return False
        excluded = self.values.get("exclude_modules") or ()
        if isinstance(targets, str) or isinstance(excluded, str):
            return False
        return _ends_in(name, targets or ()) and not _ends_in(name, excluded)


def _ends_in(name: str, endings: Iterable[str]) -> bool:
    return any(name == ending or name.endswith(f".{ending}") for ending in endings)


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
        "fan_in_fan_out": (False, None),
        "target_parameters": (None, []),
        "trainable_token_indices": (None,),
    }
    for key, accepted in neutral.items():
        if values.get(key) not in accepted:
            raise CheckpointError(f"{path}: {key} is {values[key]!r}, which is not supported; supported: {accepted[0]!r}")
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = values.get(key) or {}
        if not isinstance(pattern, dict) or any(
            isinstance(value, bool) or not isinstance(value, int | float) for value in pattern.values()
        ):
            raise CheckpointError(f"{path}: {key} is {pattern!r}, expected names with numbers above 0")
    return dict(values)
