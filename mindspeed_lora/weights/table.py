"""The weight table: for one model, every tensor's names, shapes, cut and place, in both worlds.

```
fuse:   cut each HF part into `units` equal blocks along dim 0 and lay them block after block
        units = query groups: linear_qkv;  units = tp size: linear_fc1;  units = 1: concatenation
shard:  chunk the fused tensor by tp along `axis`
```
One operation serves weights ``[out, in]``, biases ``[out]`` and LoRA B ``[out, r]``. No process group, model or device.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from mindspeed_lora.errors import CheckpointError, UsageError
from mindspeed_lora.weights.config import ModelConfig, stage_layers
from mindspeed_lora.weights.rows import DROPPED, ROWS, RowSpec, sizes

LORA_RANK = -1  # stands for r in the part shapes of adapter rows
_LAYER_NUMBER = re.compile(r"^(decoder\.layers\.)(\d+)(\..*)$")
_HF_LAYER_NUMBER = re.compile(r"^(model\.layers\.)(\d+)(\..*)$")
_STACK = ".mlp.experts.linear_"  # in the name of a parameter that holds a linear of several experts, [experts, ...]


@dataclass(frozen=True)
class Row:
    """One Megatron tensor. ``{layer}`` in names stands for the global layer number.

    ``part_shapes``: shape of each HF part (of each logical part, for an adapter row).
    ``grad_sum``: when the gradient of a replicated parameter is partial over TP: never, with sequence parallel, always.
    ``module``: name among LoRA's target modules, for the weight of a targetable linear.
    """

    megatron: str
    hf: tuple[str, ...]
    part_shapes: tuple[tuple[int, ...], ...]
    axis: int | None  # 0 column-parallel, 1 row-parallel, None replicated
    unit: str  # "group" | "rank" | "whole"
    place: str  # "embedding" | "layer" | "head"
    grad_sum: str  # "never" | "sp" | "always"
    module: str | None = None
    padded: bool = False  # dim 0 is the vocabulary, padded with copies of the last row
    linear: bool = False
    alias_of: str | None = None  # Megatron name of the tensor that this one is a copy of
    groups: int = 1  # query groups of the model
    layers: frozenset[int] | None = None  # that have this tensor; None: all
    expert: int | None = None  # global number of the routed expert that it belongs to

    def exists(self, layer: int | None) -> bool:
        """Whether a layer has this tensor."""
        return self.layers is None or layer in self.layers

    def units(self, tp_size: int) -> int:
        """Number of equal blocks that each part is cut into when parts are fused."""
        return {"group": self.groups, "rank": tp_size, "whole": 1}[self.unit]

    def name(self, layer: int | None) -> str:
        """Megatron name with the layer number filled in."""
        return self.megatron.format(layer=layer)

    def hf_names(self, layer: int | None) -> list[str]:
        """HF names with the layer number filled in."""
        return [name.format(layer=layer) for name in self.hf]


@dataclass(frozen=True)
class LoraRow(Row):
    """One adapter tensor beside ``base``: ``matrix`` "A" ``[r, in]`` or "B" ``[out, r]``."""

    base: Row | None = None
    matrix: str = ""


def _resolve(spec: RowSpec, config: ModelConfig, expert: int | None = None) -> Row:
    size = sizes(config)
    kinds = {"dense": False, "experts": True}
    layers = None
    if config.experts is not None and spec.layers in kinds:
        layers = frozenset(layer for layer in range(config.num_layers) if config.has_experts(layer) == kinds[spec.layers])

    def filled(name: str) -> str:
        return name if expert is None else name.replace("{expert}", str(expert))

    return Row(
        filled(spec.megatron),
        tuple(filled(name) for name in spec.hf),
        tuple(tuple(size[letter] for letter in dims) for dims in spec.dims),
        spec.axis,
        spec.unit,
        spec.place,
        spec.grad_sum,
        spec.module,
        spec.padded,
        spec.linear,
        spec.alias_of,
        config.num_query_groups,
        layers,
        expert,
    )


def _resolve_all(config: ModelConfig) -> list[Row]:
    """The model's rows in the order of the peer's files: experts one after the other, each with both its linears."""
    present = [spec for spec in ROWS if spec.when(config) and (spec.layers != "experts" or config.experts is not None)]
    routed = [spec for spec in present if "{expert}" in spec.megatron]
    rows: list[Row] = []
    for spec in present:
        if spec not in routed:
            rows.append(_resolve(spec, config))
        elif spec is routed[0] and config.experts is not None:
            rows += [_resolve(each, config, expert) for expert in range(config.experts.count) for each in routed]
    return [row for row in rows if row.layers is None or row.layers]


def adapter_rows(base: Row) -> tuple[LoraRow, LoraRow]:
    """Of a column-parallel base A is whole and B cut like the base; of a row-parallel one A cut, B whole; of a replicated one both are."""
    stem = base.megatron.removesuffix("weight")
    a_shape = ((LORA_RANK, base.part_shapes[0][1]),)
    b_shapes = tuple((shape[0], LORA_RANK) for shape in base.part_shapes)
    column = base.axis == 0

    def peft_names(matrix: str) -> tuple[str, ...]:
        return tuple(f"base_model.model.{name.removesuffix('weight')}lora_{matrix}.weight" for name in base.hf)

    inside = base.expert is not None or ".shared_experts." in base.megatron  # of a mixture, which is summed over TP as a whole
    a_sum, b_sum = {0: ("always", "never"), 1: ("never", "always" if inside else "sp"), None: (base.grad_sum, base.grad_sum)}[base.axis]

    a_row = LoraRow(
        f"{stem}lora_A.default.weight",
        peft_names("A"),
        a_shape,
        1 if base.axis == 1 else None,
        "whole",
        base.place,
        a_sum,
        base.module,
        groups=base.groups,
        layers=base.layers,
        expert=base.expert,
        base=base,
        matrix="A",
    )
    b_row = LoraRow(
        f"{stem}lora_B.default.weight",
        peft_names("B"),
        b_shapes,
        0 if column else None,
        base.unit,
        base.place,
        b_sum,
        base.module,
        groups=base.groups,
        layers=base.layers,
        expert=base.expert,
        base=base,
        matrix="B",
    )
    return a_row, b_row


def _interleaved(parts: Sequence[torch.Tensor], units: int) -> list[torch.Tensor]:
    """The blocks of the fused tensor in order, as views."""
    if len(parts) == 1:
        return [parts[0]]
    blocks = [part.split(part.shape[0] // units) for part in parts]
    return [block for unit in zip(*blocks, strict=True) for block in unit]


def _interleave(parts: Sequence[torch.Tensor], units: int) -> torch.Tensor:
    return _join(_interleaved(parts, units), 0)


def _blocks(tensor: torch.Tensor, sizes: Sequence[int], units: int) -> list[list[torch.Tensor]]:
    """Views of ``tensor`` that belong to each part, in order; ``sizes`` are the parts' rows in this tensor."""
    if len(sizes) == 1:
        return [[tensor]]
    pieces = tensor.split([size // units for size in sizes] * units)
    return [list(pieces[index :: len(sizes)]) for index in range(len(sizes))]


def _join(blocks: list[torch.Tensor], dim: int) -> torch.Tensor:
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=dim)


def _unpadded(row: Row, parts: list[torch.Tensor]) -> list[torch.Tensor]:
    return [parts[0][: row.part_shapes[0][0]]] if row.padded else parts


def shard_blocks(row: Row, shards: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    """For each HF part, the views of the shards that make it up when joined along ``row.axis`` (no copy)."""
    tp_size = len(shards)
    if row.axis is None:
        return _blocks(shards[0], [shape[0] for shape in row.part_shapes], row.units(tp_size))
    if row.axis == 1 or len(row.part_shapes) == 1:
        return [list(shards)]
    units = max(row.units(tp_size) // tp_size, 1)
    sizes = [shape[0] // tp_size for shape in row.part_shapes]
    pieces = [_blocks(shard, sizes, units) for shard in shards]
    return [[block for piece in pieces for block in piece[index]] for index in range(len(sizes))]


def section(blocks: Sequence[torch.Tensor], dim: int, index: int, count: int) -> torch.Tensor:
    """Section ``index`` of ``count`` equal ones of what ``blocks``, joined along ``dim``, would be; other blocks are not touched."""
    total = sum(block.shape[dim] for block in blocks)
    return span(blocks, dim, index * total // count, (index + 1) * total // count)


def span(blocks: Sequence[torch.Tensor], dim: int, start: int, stop: int) -> torch.Tensor:
    """``[start, stop)`` along ``dim`` of what ``blocks``, joined along it, would be; a view where one block holds all of it."""
    first, pieces = 0, []
    for block in blocks:
        low, high = max(start - first, 0), min(stop - first, block.shape[dim])
        if high > low:
            pieces.append(block.narrow(dim, low, high - low))
        first += block.shape[dim]
    return _join(pieces, dim)


def rows_of(pieces: Sequence[torch.Tensor], axis: int | None, columns: slice, start: int, stop: int) -> torch.Tensor:
    """Rows, and where the pieces lie side by side (``axis`` 1) columns, of what they would be if joined; nothing else is touched."""
    if axis != 1:
        return span(pieces, 0, start, stop)
    width = sum(piece.shape[1] for piece in pieces)
    return span([piece[start:stop] for piece in pieces], 1, *columns.indices(width)[:2])


def joined(row: Row, pieces: Sequence[list[torch.Tensor]]) -> list[torch.Tensor]:
    """Pieces of each HF part, as :func:`shard_blocks` gives them -> HF parts; vocabulary padding is cut off."""
    return _unpadded(row, [_join(blocks, row.axis or 0) for blocks in pieces])


def unshard(row: Row, shards: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """All ranks' shards -> HF parts; vocabulary padding is cut off. Needs no table: the row knows its parts."""
    return joined(row, shard_blocks(row, shards))


class WeightTable:
    """All rows of one model; pure."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        present = _resolve_all(config)
        self.rows = tuple(present)
        self._by_name = {row.megatron: row for row in present}
        self._lora = {adapter.megatron: adapter for row in present if row.module for adapter in adapter_rows(row)}

    def parse(self, name: str) -> tuple[Row, int | None]:
        """Row and global layer of a Megatron name, plain or with LoRA's ``base_layer``; of a stack of experts, the first one's.

        Raises:
            CheckpointError: the model has no such tensor.
        """
        template, layer = _split_layer(unstacked_name(name.replace(".base_layer.", "."), 0), _LAYER_NUMBER)
        row = self._by_name.get(template)
        if row is None or (layer is not None and layer >= self.config.num_layers) or not row.exists(layer):
            raise CheckpointError(f"{name}: a {self.config.family} model of {self.config.num_layers} layers has no tensor of this name")
        return row, layer

    def row(self, name: str) -> Row:
        """Row of a Megatron name; Raises as :meth:`parse`."""
        return self.parse(name)[0]

    def parse_lora(self, name: str) -> tuple[LoraRow, int | None]:
        """Adapter row and global layer of a name such as ``...linear_fc1.lora_A.default.weight``; otherwise as :meth:`parse`."""
        template, layer = _split_layer(unstacked_name(name, 0), _LAYER_NUMBER)
        row = self._lora.get(template)
        if row is None or (layer is not None and layer >= self.config.num_layers) or not row.exists(layer):
            raise CheckpointError(
                f"{name}: a {self.config.family} model of {self.config.num_layers} layers has no adapter tensor of this name"
            )
        return row, layer

    def lora_row(self, name: str) -> LoraRow:
        """Adapter row of a name; Raises as :meth:`parse`."""
        return self.parse_lora(name)[0]

    def lora_rows(self, targets: Sequence[str]) -> list[LoraRow]:
        """A and B rows of the targeted modules, in the table's order.

        Raises:
            UsageError: a target matches nothing.
        """
        known = {row.module for row in self.rows if row.module}
        for target in targets:
            if target not in known:
                raise UsageError(
                    f"--lora-target-modules {target} matches nothing in a {self.config.family} model; it has {', '.join(sorted(known))}"
                )
        return [row for row in self._lora.values() if row.module in targets]

    def lora_pair(self, base: Row) -> tuple[LoraRow, LoraRow]:
        """A and B rows of one targetable base row."""
        stem = base.megatron.removesuffix("weight")
        return self._lora[f"{stem}lora_A.default.weight"], self._lora[f"{stem}lora_B.default.weight"]

    def entries(self) -> Iterator[tuple[Row, int | None]]:
        """Every tensor of the model once (aliases left out): embedding, layers in order, head."""
        own = [row for row in self.rows if row.alias_of is None]
        yield from ((row, None) for row in own if row.place == "embedding")
        yield from ((row, layer) for layer in range(self.config.num_layers) for row in own if row.place == "layer" and row.exists(layer))
        yield from ((row, None) for row in own if row.place == "head")

    def target_entries(self, targets: Sequence[str]) -> list[tuple[Row, int | None]]:
        """The base weights that LoRA adapts."""
        return [(row, layer) for row, layer in self.entries() if row.module in targets]

    def hf_keys(self) -> dict[str, tuple[int, ...]]:
        """HF name -> shape of every tensor that a Hugging Face folder must hold."""
        return {name: shape for row, layer in self.entries() for name, shape in zip(row.hf_names(layer), row.part_shapes, strict=True)}

    def is_dropped(self, name: str) -> bool:
        """Whether a key is known to hold no weight, or belongs to a layer that is left out (multi-token prediction)."""
        if name.endswith(tuple(suffix for suffix, _ in DROPPED)):
            return True
        _, layer = split_hf_layer(name)
        own = self.config.num_layers
        return layer is not None and own <= layer < own + self.config.left_out_layers

    def shape(self, row: Row, r: int | None = None) -> tuple[int, ...]:
        """Shape of the whole Megatron tensor; ``r`` is needed for adapter rows."""
        rows = self.config.padded_vocab_size if row.padded else sum(shape[0] for shape in row.part_shapes)
        full = (rows, *row.part_shapes[0][1:])
        if LORA_RANK in full and r is None:
            raise ValueError(f"{row.megatron}: the shape of an adapter tensor needs r")
        return tuple(size if size != LORA_RANK or r is None else r for size in full)

    def local_shape(self, row: Row, tp_size: int, r: int | None = None) -> tuple[int, ...]:
        """Shape of one rank's shard."""
        full = list(self.shape(row, r))
        if row.axis is not None:
            full[row.axis] //= tp_size
        return tuple(full)

    def fuse(self, row: Row, parts: Sequence[torch.Tensor], tp_size: int) -> torch.Tensor:
        """HF parts -> the whole Megatron tensor whose ``tp_size`` chunks along ``row.axis`` are the ranks' shards."""
        return _interleave(self._padded(row, parts), row.units(tp_size))

    def unfuse(self, row: Row, tensor: torch.Tensor, tp_size: int) -> list[torch.Tensor]:
        """Inverse of :meth:`fuse`; vocabulary padding is cut off."""
        sizes = [shape[0] for shape in row.part_shapes]
        parts = [_join(blocks, 0) for blocks in _blocks(tensor, sizes, row.units(tp_size))]
        return _unpadded(row, parts)

    def shard(self, row: Row, parts: Sequence[torch.Tensor], tp_rank: int, tp_size: int) -> torch.Tensor:
        """One rank's contiguous shard, without making the whole fused tensor."""
        if row.axis is None:
            return _interleave(parts, row.units(tp_size)).contiguous()
        if row.axis == 1:
            return parts[0].chunk(tp_size, dim=1)[tp_rank].contiguous()
        if row.padded:
            return self._vocabulary_shard(row, parts[0], tp_rank, tp_size)
        return self.shard_of_own(row, [part.chunk(tp_size)[tp_rank] for part in parts], tp_size)

    def shard_of_own(self, row: Row, own: Sequence[torch.Tensor], tp_size: int) -> torch.Tensor:
        """One rank's contiguous shard of a cut row, from its own section of each part along ``row.axis``."""
        return _interleave(own, max(row.units(tp_size) // tp_size, 1)).contiguous()

    def shard_rows(
        self, row: Row, pieces: Sequence[Sequence[torch.Tensor]], tp_rank: int, tp_size: int, start: int, stop: int
    ) -> torch.Tensor:
        """Rows [start, stop) of one rank's shard of a layer's tensor; of ``pieces`` (see :func:`shard_blocks`) no other row is read."""
        columns, found, first = self.shard_columns(row, tp_rank, tp_size), [], 0
        for part, low, high in self.shard_ranges(row, tp_rank, tp_size):
            skipped, taken = max(start - first, 0), min(stop - first, high - low)
            if taken > skipped:
                found.append(rows_of(pieces[part], row.axis, columns, low + skipped, low + taken))
            first += high - low
        return _join(found, 0).contiguous()

    def shard_ranges(self, row: Row, tp_rank: int, tp_size: int) -> list[tuple[int, int, int]]:
        """(part, start, stop): the rows of HF parts that one rank's shard of a layer's tensor holds, one after the other."""
        count = tp_size if row.axis == 0 else 1
        units = max(row.units(tp_size) // count, 1) if len(row.hf) > 1 else 1
        own = [(shape[0] // count // units, shape[0] // count * (tp_rank if count > 1 else 0)) for shape in row.part_shapes]
        return [(part, start + unit * size, start + (unit + 1) * size) for unit in range(units) for part, (size, start) in enumerate(own)]

    def shard_columns(self, row: Row, tp_rank: int, tp_size: int) -> slice:
        """The columns of those rows: a section where the tensor is row-parallel, else all."""
        width = row.part_shapes[0][1] // tp_size if row.axis == 1 else 0
        return slice(tp_rank * width, (tp_rank + 1) * width) if row.axis == 1 else slice(None)

    @staticmethod
    def unshard(row: Row, shards: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """All ranks' shards -> HF parts; vocabulary padding is cut off."""
        return unshard(row, shards)

    def _padded(self, row: Row, parts: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        missing = self.config.padded_vocab_size - parts[0].shape[0] if row.padded else 0
        return [torch.cat([parts[0], parts[0][-1:].expand(missing, -1)])] if missing > 0 else parts

    def vocabulary_range(self, row: Row, tp_rank: int, tp_size: int) -> tuple[int, int, int]:
        """(start, stop, missing): one rank's own rows of an embedding or head, and the copies of the last row that pad its shard."""
        size, count = self.config.padded_vocab_size // tp_size, row.part_shapes[0][0]
        start, stop = min(tp_rank * size, count), min((tp_rank + 1) * size, count)
        return start, stop, size - (stop - start)

    def _vocabulary_shard(self, row: Row, part: torch.Tensor, tp_rank: int, tp_size: int) -> torch.Tensor:
        start, stop, missing = self.vocabulary_range(row, tp_rank, tp_size)
        own = part[start:stop]
        return torch.cat([own, part[-1:].expand(missing, -1)]) if missing else own.contiguous()

    def check_tensor_parallel(self, tp_size: int) -> None:
        """Whether every cut tensor divides by ``tp_size``.

        Raises:
            UsageError: one does not; the message says which sizes work.
        """
        config = self.config
        sizes = {
            "num_query_groups": config.num_query_groups,
            "ffn_hidden_size": config.ffn_hidden_size if any(not config.has_experts(n) for n in range(config.num_layers)) else 0,
            "padded_vocab_size": config.padded_vocab_size,
        }
        if tp_size < 1:
            raise UsageError(f"tensor parallel size {tp_size} must be at least 1")
        for name, size in sizes.items():
            if size % tp_size:
                judged = [value for key, value in sizes.items() if key != "padded_vocab_size" or key == name]  # padding follows the size
                valid = [n for n in range(1, config.num_query_groups + 1) if all(value % n == 0 for value in judged)]
                hint = "; or pad the vocabulary with --make-vocab-size-divisible-by" if name == "padded_vocab_size" else ""
                raise UsageError(f"tensor parallel size {tp_size} does not divide the model's {name} {size}; use one of {valid}{hint}")

    def check_pipeline(self, pp_size: int, layers_per_virtual_stage: int | None = None) -> list[list[range]]:
        """Global layers as ``[stage][chunk] -> range``; Raises UsageError as :func:`~mindspeed_lora.weights.config.stage_layers`."""
        return stage_layers(self.config.num_layers, pp_size, layers_per_virtual_stage)

    def describe(self) -> str:
        """The table as aligned text, for people and docs."""
        header = ("Megatron", "Hugging Face", "shape", "axis", "unit", "place", "grad_sum", "LoRA")
        lines = [header]
        for row in self.rows:
            if row.expert:  # the first expert stands for all
                continue
            names = ", ".join(name.split("{layer}.")[-1] for name in row.hf) + (" (copy)" if row.alias_of else "")
            shape = "x".join(str(size) for size in self.shape(row))
            lines.append((row.megatron, names, shape, str(row.axis), row.unit, row.place, row.grad_sum, row.module or "-"))
        widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def _split_layer(name: str, pattern: re.Pattern[str]) -> tuple[str, int | None]:
    match = pattern.match(name)
    if match is None:
        return name, None
    return f"{match[1]}{{layer}}{match[3]}", int(match[2])


def split_hf_layer(name: str) -> tuple[str, int | None]:
    """``model.layers.3.x`` -> (``model.layers.{layer}.x``, 3)."""
    return _split_layer(name, _HF_LAYER_NUMBER)


def is_stack(name: str, tensor: torch.Tensor) -> bool:
    """Whether a parameter holds one linear of several experts, ``[experts, ...]``."""
    return _STACK in name and tensor.dim() == 3


def is_shared(name: str, tensor: torch.Tensor) -> bool:
    """Whether it is an adapter's matrix that serves all experts of a layer."""
    return _STACK in name and tensor.dim() == 2


def unstacked_name(name: str, expert: int) -> str:
    """``...mlp.experts.linear_fc1.weight`` -> ``...mlp.experts.local_experts.3.linear_fc1.weight``; other names stay."""
    return name.replace(_STACK, f".mlp.experts.local_experts.{expert}.linear_")


def named_slices(named: Iterable[tuple[str, torch.Tensor]], experts: range) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors under the table's names: a stack ``[len(experts), ...]`` gives one view per expert, by its global number.

    A matrix that serves all experts comes once for each of them.
    """
    for name, tensor in named:
        if is_stack(name, tensor):
            yield from ((unstacked_name(name, expert), tensor[local]) for local, expert in enumerate(experts))
        elif is_shared(name, tensor):
            yield from ((unstacked_name(name, expert), tensor) for expert in experts)
        else:
            yield name, tensor
