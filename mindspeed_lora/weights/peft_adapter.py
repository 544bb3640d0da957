"""PEFT folders as adapters, also those whose modules differ in A, r and alpha.

A fused Megatron module (q, k, v; gate, up) of an adapter trained elsewhere usually has parts with different A. They are held exactly,
see :mod:`mindspeed_lora.weights.lora_blocks`.

Over transformers 5, peft adapts a layer's experts as two parameters (``target_parameters``), the pairs of all E experts side by side::

    ...mlp.experts.base_layer.lora_A [E r, h]    lora_B [2 f, r E]    gate_up_proj (where both are adapted; one alone has down_proj's name)
    ...mlp.experts.lora_A            [E r, f]    lora_B [h, r E]      down_proj
    expert e: A rows e r .. (e + 1) r;  B columns e, e + E, e + 2 E, ..

Up to 0.19.0, peft took a parameter's axes, which are (expert, out, in), for (expert, in, out): its file has lora_A [E r, 2 f] and
lora_B [h, r E], an expert's A is its part of lora_B transposed, its B that of lora_A. Shapes tell the two apart, but for square weights:
there ``peft_version`` of the configuration does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mindspeed_lora.errors import CheckpointError
from mindspeed_lora.manifest import read_manifest
from mindspeed_lora.weights.adapters import Adapter, base_reference_of, ordered_targets
from mindspeed_lora.weights.hf_files import StoredTensor, read_safetensors_header
from mindspeed_lora.weights.lora_blocks import LoraParts, Pair, join_pairs
from mindspeed_lora.weights.lora_spec import LoraSpec, ModuleLora
from mindspeed_lora.weights.rows import ROWS
from mindspeed_lora.weights.table import Row, WeightTable, split_hf_layer

_TENSOR = re.compile(r"^(?:base_model\.model\.)?(.+)\.lora_([AB])\.(?:default\.)?weight$")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_STACKED = re.compile(r"^(.+\.experts)(\.base_layer)?$")
_PARAMETERS = {"gate_up_proj": "linear_fc1", "down_proj": "linear_fc2"}
_VERSION = re.compile(r"(\d+)\.(\d+)\.(\d+)")
_LAST_EXCHANGED = (0, 19, 0)  # peft's last version with A and B of experts' parameters the other way round


@dataclass(frozen=True)
class _OfExpert:
    """One expert's A or B, or ``rows`` of it, in the matrix of all ``count`` experts; ``half``: "A" or "B", whose layout that has."""

    stored: StoredTensor
    half: str
    expert: int
    count: int
    transposed: bool = False
    rows: slice | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of :meth:`read`'s result."""
        height, width = self.stored.shape
        height, width = (height // self.count, width) if self.half == "A" else (height, width // self.count)
        height, width = (width, height) if self.transposed else (height, width)
        return (height if self.rows is None else self.rows.stop - self.rows.start, width)

    def read(self) -> torch.Tensor:
        """A view of the file."""
        whole = self.stored.read()
        one = (
            whole.unflatten(0, (self.count, -1))[self.expert]
            if self.half == "A"
            else whole.unflatten(1, (-1, self.count))[..., self.expert]
        )
        one = one.t() if self.transposed else one
        return one if self.rows is None else one[self.rows]


_Half = StoredTensor | _OfExpert


@dataclass(frozen=True)
class _Module:
    """The pair of one HF linear, or of the experts' parameter; None: that half is missing in the file."""

    name: str  # model.layers.0.self_attn.q_proj
    layer: int | None
    target: str  # Megatron's module
    a: _Half | None
    b: _Half | None
    r: int
    alpha: float


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
        self._stacks: dict[tuple[int | None, str], _Module] = {}  # (layer, target) -> the parameter of all experts
        self._modules = self._read_modules(read_safetensors_header(path / "adapter_model.safetensors"))
        found = (*self._modules.values(), *self._stacks.values())
        self.found_targets = ordered_targets({module.target for module in found})
        self.num_layers = 1 + max((module.layer for module in found if module.layer is not None), default=-1)
        self.lora: LoraSpec = LoraSpec(self.found_r, self._alpha, self.found_targets, bool(self.values.get("use_rslora")))
        base_path = self.values.get("base_model_name_or_path")
        self.base_reference = base_reference_of(self.manifest) or ({"path": str(base_path), "fingerprint": None} if base_path else None)

    @property
    def _alpha(self) -> float:
        return float(self.values.get("lora_alpha", 8))  # peft's default

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
        for written, pair in halves.items():
            stack = _STACKED.match(written)
            if stack is None:
                name, (target, layer) = written, _target_of(written, self.path)
            else:
                parameter = self._parameter(written, f"{stack[1]}.base_layer" in halves)
                name, target = f"{stack[1]}.{parameter}", _PARAMETERS[parameter]
                layer = split_hf_layer(name)[1]
            r, alpha = int(_at(ranks, name, self.found_r)), float(_at(alphas, name, self._alpha))
            module = _Module(name, layer, target, pair.get("A"), pair.get("B"), r, alpha)
            if stack is None:
                modules[name] = module
            else:
                self._stacks[layer, target] = module
        return modules

    def _parameter(self, written: str, two: bool) -> str:
        """Which parameter of the experts a pair belongs to: of two, peft wraps gate_up_proj first."""
        if two:
            return "gate_up_proj" if written.endswith(".base_layer") else "down_proj"
        named = [name for name in _PARAMETERS if any(str(each).endswith(name) for each in self.values.get("target_parameters") or ())]
        if len(named) != 1:
            raise CheckpointError(
                f"{self.path}: {written} is one parameter of the experts, and target_parameters of adapter_config.json names "
                f"{' and '.join(named) or 'neither gate_up_proj nor down_proj'}; it must name the one"
            )
        return named[0]

    def _parts(self, row: Row, layer: int | None) -> list[_Module | None]:
        stack = None if row.expert is None else self._stacks.get((layer, row.module or ""))
        if stack is None:
            return [self._modules.get(name.removesuffix(".weight")) for name in row.hf_names(layer)]
        return self._of_expert(stack, row)

    def _of_expert(self, stack: _Module, row: Row) -> list[_Module | None]:
        """The pairs of one expert's HF linears (gate and up with one A) in the parameter's matrices."""
        a, b, modules, start = stack.a, stack.b, [], 0
        assert row.expert is not None
        if not isinstance(a, StoredTensor) or not isinstance(b, StoredTensor):
            raise CheckpointError(f"{self.path}: {stack.name} has only one of lora_A and lora_B")
        count, inside = a.shape[0] // stack.r, (sum(shape[0] for shape in row.part_shapes), row.part_shapes[0][1])
        found = b.shape[0], a.shape[1]
        fits = found in (inside, inside[::-1]) and a.shape[0] == b.shape[1] == count * stack.r
        if not fits or row.expert >= count:
            raise CheckpointError(
                f"{self.path}: {stack.name} has lora_A {list(a.shape)} and lora_B {list(b.shape)}, which do not hold r {stack.r} of "
                f"each expert of {list(inside)} in the base model"
            )
        exchanged = self._exchanged(stack.name) if inside[0] == inside[1] else found != inside
        of_a, of_b = (_OfExpert(stored, half, row.expert, count, exchanged) for stored, half in ((a, "A"), (b, "B")))
        if exchanged:
            of_a, of_b = of_b, of_a
        for shape in row.part_shapes:
            rows = slice(start, start + shape[0])
            modules.append(_Module(stack.name, stack.layer, stack.target, of_a, replace(of_b, rows=rows), stack.r, stack.alpha))
            start = rows.stop
        return list(modules)

    def _exchanged(self, name: str) -> bool:
        """Whether A and B of experts' parameters are the other way round, by the version of peft that wrote them."""
        written = self.values.get("peft_version")
        match = _VERSION.match(str(written))
        if match is None:
            raise CheckpointError(
                f"{self.path}: {name} is square, so only the version of peft that wrote the adapter tells its A from its B, and "
                f"peft_version in adapter_config.json is {written!r}; put the version there (peft before 0.18 left it out)"
            )
        return tuple(map(int, match.groups())) <= _LAST_EXCHANGED

    def _module_lora(self, row: Row, layer: int | None) -> ModuleLora | None:
        """One entry where all parts have one A, r and alpha, else one for each part; None: no part is adapted."""
        modules = self._parts(row, layer)
        present = [module for module in modules if module is not None]
        if not present:
            return None
        if len(present) == len(modules) and len({(module.r, module.alpha) for module in present}) == 1 and _one_a(present):
            return ModuleLora((present[0].r,), (present[0].alpha,))
        return ModuleLora(
            tuple(module.r if module else 0 for module in modules), tuple(module.alpha if module else 0.0 for module in modules)
        )

    def spec(self, table: WeightTable) -> LoraSpec:
        """See the base class."""
        found = {}
        for row, layer in table.target_entries(self.found_targets):
            found[row.name(layer).removesuffix(".weight")] = self._module_lora(row, layer)
        if all(module == self.lora.uniform for module in found.values()):
            return self.lora
        return replace(self.lora, modules={name: module for name, module in found.items() if module is not None})

    def _stored(self, module: _Module, half: str, shape: tuple[int, int]) -> _Half:
        stored = module.a if half == "A" else module.b
        if stored is None:
            raise CheckpointError(f"{self.path}: {module.name}.lora_{half}.weight is missing beside its other half")
        if stored.shape != shape:
            raise CheckpointError(
                f"{self.path}: {module.name}.lora_{half}.weight has shape {list(stored.shape)}, "
                f"but r and the base model ask for {list(shape)}"
            )
        return stored

    def _stored_pairs(self, row: Row, layer: int | None) -> list[tuple[_Half, _Half] | None]:
        return [
            None if module is None else (self._stored(module, "A", (module.r, shape[1])), self._stored(module, "B", (shape[0], module.r)))
            for module, shape in zip(self._parts(row, layer), row.part_shapes, strict=True)
        ]

    def pairs(self, row: Row, layer: int | None) -> list[Pair | None]:
        """See the base class."""
        return [pair and (pair[0].read(), pair[1].read()) for pair in self._stored_pairs(row, layer)]

    def lora_parts(self, row: Row, layer: int | None) -> LoraParts:
        """See the base class."""
        module = self._module_lora(row, layer)
        if module is None:
            raise CheckpointError(f"{self.path}: does not adapt {row.name(layer)}")
        return join_pairs(row, module, self.pairs(row, layer))

    def check_coverage(self, table: WeightTable) -> None:
        """See the base class; what ``target_modules`` names must be there in every layer that ``layers_to_transform`` names."""
        entries = [(row, layer) for row, layer in table.entries() if row.module is not None]
        known = {name.removesuffix(".weight") for row, layer in entries for name in row.hf_names(layer)}
        with_experts = {(layer, row.module) for row, layer in entries if row.expert is not None}
        unknown = sorted(set(self._modules) - known) + [stack.name for key, stack in self._stacks.items() if key not in with_experts]
        if unknown:
            raise CheckpointError(f"{self.path}: {len(unknown)} adapted modules fit nothing in the base model: {', '.join(unknown[:5])}")
        for row, layer in table.target_entries(self.found_targets):
            self._stored_pairs(row, layer)
        stacked = {
            name.removesuffix(".weight")
            for row, layer in entries
            if row.expert is not None and (layer, row.module) in self._stacks
            for name in row.hf_names(layer)
        }
        missing = sorted(name for name in known - set(self._modules) - stacked if self._is_target(name))
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


def _one_a(modules: list[_Module]) -> bool:
    """Whether all have the same A."""
    stored = [module.a for module in modules if module.a is not None]
    if len(stored) < len(modules) or len({tensor.shape for tensor in stored}) > 1:
        return False
    first = stored[0].read()
    return all(torch.equal(tensor.read(), first) for tensor in stored[1:])


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
