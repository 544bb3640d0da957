"""Opening weights wherever they lie: a base model (Hugging Face or Megatron folder), an adapter (Megatron or PEFT folder).

A source hands out logical HF-order tensors by row and global layer, so that nothing else depends on a layout.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import torch

from mindspeed_lora.errors import CheckpointError
from mindspeed_lora.manifest import Manifest, read_manifest
from mindspeed_lora.weights.adapters import Adapter, MegatronAdapter
from mindspeed_lora.weights.config import ModelConfig
from mindspeed_lora.weights.families import model_config_from_hf, model_config_from_megatron_args
from mindspeed_lora.weights.hf_files import INDEX_NAMES, BinTensor, StoredTensor, read_hf_folder
from mindspeed_lora.weights.megatron_folder import MegatronFolder, is_megatron_folder
from mindspeed_lora.weights.peft_adapter import PeftAdapter
from mindspeed_lora.weights.table import Row, WeightTable, joined, section, shard_blocks, span

FINGERPRINT_BYTES = 4096  # of each logical tensor
_COMPARE_ROWS = 4096


class Base(ABC):
    """A base model's weights. ``config`` None: no ``config.json`` lies beside a peer's checkpoint."""

    kind: str  # "hf" | "mg"
    path: Path
    config: ModelConfig | None
    config_dir: Path | None
    dtype: torch.dtype
    manifest: Manifest | None
    args: SimpleNamespace | None = None
    unified = False  # base and adapter in one

    @abstractmethod
    def pieces(self, row: Row, layer: int | None) -> list[list[torch.Tensor]]:
        """Of each HF part of one row, the tensors that make it up when joined along ``row.axis``, mapped from the files where possible.

        The vocabulary may be longer than the model's, by rows that pad it.

        Raises:
            CheckpointError: one is missing or of another shape than the row's.
        """

    def parts(self, row: Row, layer: int | None) -> list[torch.Tensor]:
        """The HF tensors of one row, in the file's dtype; Raises as :meth:`pieces`."""
        return joined(row, self.pieces(row, layer))

    def shard(self, table: WeightTable, row: Row, layer: int | None, tp_rank: int, tp_size: int) -> torch.Tensor:
        """One rank's Megatron tensor; of the files only its own bytes are read. Raises as :meth:`parts`."""
        return table.shard(row, self.parts(row, layer), tp_rank, tp_size)

    @abstractmethod
    def part_dtypes(self, row: Row, layer: int | None) -> list[torch.dtype]:
        """dtype of each part, without reading it; Raises as :meth:`parts`."""

    @abstractmethod
    def check_coverage(self, table: WeightTable) -> None:
        """Whether every key is accounted for exactly once, with the right shape.

        Raises:
            CheckpointError: naming missing, unknown or misshapen tensors.
        """

    @abstractmethod
    def _head(self, table: WeightTable, row: Row, layer: int | None) -> list[tuple[torch.dtype, bytes]]:
        """dtype and first bytes of each part of a row."""

    @property
    def model_config(self) -> ModelConfig:
        """``config``, or what a peer's ``args`` say about the sizes (its rotary base is then None)."""
        if self.config is not None:
            return self.config
        if self.args is None:
            raise CheckpointError(f"{self.path}: has neither config.json nor stored args; put the model's config.json beside it")
        return model_config_from_megatron_args(self.args, str(self.path))

    def fingerprint(self, table: WeightTable | None = None) -> str:
        """Identity of the weights, the same for every layout: names, shapes, dtypes and 4 KiB of each logical tensor."""
        table = table or WeightTable(self.model_config)
        digest = hashlib.sha256()
        for row, layer in table.entries():
            heads = self._head(table, row, layer)
            for name, shape, (dtype, data) in zip(row.hf_names(layer), row.part_shapes, heads, strict=True):
                digest.update(f"{name} {list(shape)} {dtype} {len(data)}\n".encode())
                digest.update(data)
        return f"sha256:{digest.hexdigest()}"


def _list(names: Iterable[str], limit: int = 5) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _check_names(path: Path, expected: set[str], found: set[str]) -> None:
    if missing := sorted(expected - found):
        raise CheckpointError(f"{path}: {len(missing)} of {len(expected)} tensors are missing: {_list(missing)}")
    if unknown := sorted(found - expected):
        raise CheckpointError(
            f"{path}: {len(unknown)} tensors are unknown to this model's weight table: {_list(unknown)}; is config.json of another model?"
        )


def _check_shape(where: str, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found != expected:
        raise CheckpointError(f"{where}: {name} has shape {list(found)}, but config.json and the layout ask for {list(expected)}")


class HFBase(Base):
    """A Hugging Face folder of safetensors, or of the older ``pytorch_model.bin``."""

    kind = "hf"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_dir = path
        self.config = model_config_from_hf(path)
        self.manifest = read_manifest(path)
        self.tensors = read_hf_folder(path)
        self.dtype = Counter(tensor.dtype for tensor in self.tensors.values()).most_common(1)[0][0] if self.tensors else torch.float32

    def _stored(self, row: Row, layer: int | None) -> list[StoredTensor | BinTensor]:
        stored: list[StoredTensor | BinTensor] = []
        for name, shape in zip(row.hf_names(layer), row.part_shapes, strict=True):
            if name not in self.tensors:
                raise CheckpointError(f"{self.path}: tensor {name} is missing")
            _check_shape(str(self.tensors[name].file), name, self.tensors[name].shape, shape)
            stored.append(self.tensors[name])
        return stored

    def pieces(self, row: Row, layer: int | None) -> list[list[torch.Tensor]]:
        """See the base class."""
        return [[stored.read()] for stored in self._stored(row, layer)]

    def part_dtypes(self, row: Row, layer: int | None) -> list[torch.dtype]:
        """See the base class."""
        return [stored.dtype for stored in self._stored(row, layer)]

    def _head(self, table: WeightTable, row: Row, layer: int | None) -> list[tuple[torch.dtype, bytes]]:
        return [(stored.dtype, stored.head(FINGERPRINT_BYTES)) for stored in self._stored(row, layer)]

    def check_coverage(self, table: WeightTable) -> None:
        """See the base class."""
        expected = table.hf_keys()
        found = {name for name in self.tensors if not table.is_dropped(name)}
        if table.config.tied_embeddings and "lm_head.weight" in found:
            found.discard("lm_head.weight")
            self._check_tied_copy()
        _check_names(self.path, set(expected), found)
        for name, shape in expected.items():
            _check_shape(str(self.tensors[name].file), name, self.tensors[name].shape, shape)

    def _check_tied_copy(self) -> None:
        """A head kept in the file although the embeddings are tied must be their copy."""
        head, embedding = (self.tensors[name].read() for name in ("lm_head.weight", "model.embed_tokens.weight"))
        if head.shape != embedding.shape or not _equal(head, embedding):
            raise CheckpointError(
                f"{self.path}: config.json says tie_word_embeddings, but lm_head.weight differs from model.embed_tokens.weight; "
                "set tie_word_embeddings to false, or remove lm_head.weight"
            )


def _equal(first: torch.Tensor, second: torch.Tensor) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.split(_COMPARE_ROWS), second.split(_COMPARE_ROWS), strict=True))


class MegatronBase(Base):
    """A Megatron V1 folder that holds base weights, plain or unified with an adapter."""

    kind = "mg"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folder = MegatronFolder(path)
        self.iteration = self.folder.iteration
        self.args = self.folder.args
        places = (self.folder.iteration_dir, path, self.folder.iteration_dir.parent)  # the last: ``path`` is an iteration itself
        self.config_dir = next((place for place in places if (place / "config.json").is_file()), None)
        self.config = model_config_from_hf(self.config_dir) if self.config_dir else None
        self.manifest = read_manifest(self.folder.iteration_dir) or read_manifest(path)
        self._index = self.folder.index()
        base_names = [name for name in self._index if "lora_" not in name]
        if not base_names:
            raise CheckpointError(
                f"{path}: holds LoRA tensors only, no base model; give the base with --load-dir (--load) and this folder with --lora-load"
            )
        self.dtype = self.folder.shards(self._index[base_names[0]][0])[0].dtype
        self.unified = len(base_names) < len(self._index)

    def _shards(self, row: Row, layer: int | None) -> list[torch.Tensor]:
        name = row.alias_of or row.name(layer)
        places = self._index.get(name)
        if not places:
            raise CheckpointError(f"{self.path}: tensor {name} (layers numbered over all stages) is missing")
        return self.folder.shards(places[0])

    def pieces(self, row: Row, layer: int | None) -> list[list[torch.Tensor]]:
        """See the base class."""
        shards = self._shards(row, layer)
        self._check_shapes(row, layer, shards)
        self.folder.note_read(shards)
        return shard_blocks(row, shards)

    def shard(self, table: WeightTable, row: Row, layer: int | None, tp_rank: int, tp_size: int) -> torch.Tensor:
        """See the base class; stored and wanted cut may differ."""
        if row.padded:
            return self._vocabulary_shard(row, *table.vocabulary_range(row, tp_rank, tp_size))
        if row.axis is None:
            return super().shard(table, row, layer, tp_rank, tp_size)
        shards = self._shards(row, layer)
        self._check_shapes(row, layer, shards)
        own = [section(blocks, row.axis, tp_rank, tp_size) for blocks in shard_blocks(row, shards)]
        self.folder.note_read(own)
        return table.shard_of_own(row, own, tp_size)

    def _vocabulary_shard(self, row: Row, start: int, stop: int, missing: int) -> torch.Tensor:
        """Rows of an embedding or head and ``missing`` copies of the last one; the others are not read."""
        shards, count = self._shards(row, None), row.part_shapes[0][0]
        self._check_shapes(row, None, shards)
        own = [span(shards, 0, start, stop)] if stop > start else []
        last = [span(shards, 0, count - 1, count)] if missing else []
        self.folder.note_read(own + last)
        return torch.cat([*own, *(each.expand(missing, -1) for each in last)])

    def part_dtypes(self, row: Row, layer: int | None) -> list[torch.dtype]:
        """See the base class."""
        return [self._shards(row, layer)[0].dtype] * len(row.hf)

    def _check_shapes(self, row: Row, layer: int | None, shards: list[torch.Tensor]) -> None:
        name, tp_size = row.name(layer), len(shards)
        full = [sum(shape[0] for shape in row.part_shapes), *row.part_shapes[0][1:]]
        if row.padded:
            rows = sum(shard.shape[0] for shard in shards)
            if rows < full[0] or any(tuple(shard.shape[1:]) != tuple(full[1:]) for shard in shards):
                raise CheckpointError(
                    f"{self.path}: {name} has {rows} rows of {list(shards[0].shape[1:])} in all, "
                    f"but the model asks for at least {full[0]} of {full[1:]}"
                )
            return
        if row.axis is not None:
            if full[row.axis] % tp_size:
                raise CheckpointError(f"{self.path}: {name} of {full} is stored in {tp_size} shards, which do not divide it")
            full[row.axis] //= tp_size
        for tp_rank, shard in enumerate(shards):
            _check_shape(f"{self.path}, tensor rank {tp_rank}", name, tuple(shard.shape), tuple(full))

    def _head(self, table: WeightTable, row: Row, layer: int | None) -> list[tuple[torch.dtype, bytes]]:
        shards = self._shards(row, layer)
        self._check_shapes(row, layer, shards)
        heads = []
        for blocks in shard_blocks(row, shards):
            if row.axis == 1:
                rows = -(-FINGERPRINT_BYTES // max(blocks[0][0].nbytes, 1))
                blocks = [torch.cat([block[:rows] for block in blocks], dim=1)]
            data = b""
            for block in blocks:
                if len(data) >= FINGERPRINT_BYTES:
                    break
                rows = -(-FINGERPRINT_BYTES // max(block[0].nbytes, 1))
                data += block[:rows].contiguous().view(torch.uint8).numpy().tobytes()
            heads.append((blocks[0].dtype, data[:FINGERPRINT_BYTES]))
        return heads

    def check_coverage(self, table: WeightTable) -> None:
        """See the base class."""
        self.folder.check_equal_names()
        if self.folder.num_layers != table.config.num_layers:
            raise CheckpointError(f"{self.path}: holds {self.folder.num_layers} layers, but config.json says {table.config.num_layers}")
        found = {name for name in self._index if "lora_" not in name and not table.is_dropped(name)}
        aliases = {row.megatron for row in table.rows if row.alias_of}
        _check_names(self.path, {row.name(layer) for row, layer in table.entries()}, found - aliases)
        for row, layer in table.entries():
            self._check_shapes(row, layer, self._shards(row, layer))
        for row in table.rows:
            if row.alias_of and row.megatron in found:
                self._check_alias(row)

    def _check_alias(self, row: Row) -> None:
        copies, originals = self.folder.shards(self._index[row.megatron][0]), self._shards(row, None)
        self.folder.note_read([*copies, *originals])
        for copy, own in zip(copies, originals, strict=True):
            if copy.shape != own.shape or not _equal(copy, own):
                raise CheckpointError(f"{self.path}: embeddings are tied, but {row.megatron} differs from {row.alias_of}")


def open_base(path: Path, kind: str | None = None) -> Base:
    """Open a base model's folder. ``kind`` "hf" or "mg" where the user said so; None: recognised.

    Raises:
        CheckpointError: missing, of neither kind, of both kinds, or damaged.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; give a Hugging Face or Megatron checkpoint folder")
    megatron = is_megatron_folder(path)
    weights = (*INDEX_NAMES, "*.safetensors", "pytorch_model*.bin")
    hugging_face = any(file.is_file() for pattern in weights for file in path.glob(pattern))
    if kind is None and megatron and hugging_face:
        raise CheckpointError(f"{path}: holds both safetensors and a Megatron checkpoint; keep them in separate folders")
    if (path / "adapter_config.json").is_file() and not megatron:
        raise CheckpointError(f"{path}: is a PEFT adapter, not a base model; give it with --lora-load")
    if kind == "mg" and not megatron and hugging_face:
        raise CheckpointError(f"{path}: is a Hugging Face folder, not a Megatron one; use --load-model-type hf")
    if kind == "hf" and megatron and not hugging_face:
        raise CheckpointError(f"{path}: is a Megatron folder, not a Hugging Face one; use --load-model-type mg")
    if kind == "mg" or (kind is None and megatron):
        return MegatronBase(path)
    if kind == "hf" or hugging_face or (path / "config.json").is_file():
        return HFBase(path)
    raise CheckpointError(
        f"{path}: neither a Hugging Face folder (config.json, *.safetensors) nor a Megatron one (latest_checkpointed_iteration.txt)"
    )


def open_adapter(path: Path) -> Adapter:
    """Open an adapter: a Megatron save folder (LoRA only, or unified) or a PEFT folder.

    Raises:
        CheckpointError: missing, of neither kind, without LoRA tensors, or damaged.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; give a training run's save folder or a PEFT adapter folder")
    if (path / "adapter_config.json").is_file():
        return PeftAdapter(path)
    if is_megatron_folder(path):
        return MegatronAdapter(path)
    inside = sorted(str(child) for child in path.iterdir() if (child / "adapter_config.json").is_file() or is_megatron_folder(child))
    remedy = (
        f"give one of its folders: {', '.join(inside[:4])}" if inside else "give a training run's --save folder or a PEFT adapter folder"
    )
    raise CheckpointError(
        f"{path}: neither a PEFT adapter (adapter_config.json) nor a Megatron save folder (latest_checkpointed_iteration.txt); {remedy}"
    )
