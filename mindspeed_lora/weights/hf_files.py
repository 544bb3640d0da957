"""Reading a Hugging Face folder's weights one tensor at a time (safetensors format: 8-byte length, JSON header, bytes)."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from mindspeed_lora.errors import CheckpointError
from mindspeed_lora.weights.torch_files import load_torch_file

INDEX_NAME = "model.safetensors.index.json"
BIN_INDEX_NAME = "pytorch_model.bin.index.json"
INDEX_NAMES = (INDEX_NAME, BIN_INDEX_NAME)
SAFETENSORS_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_LARGEST_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies. ``start``, ``stop``: byte range in ``file``."""

    file: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    def read(self) -> torch.Tensor:
        """The tensor, a view of the file, which is mapped for this one only, so that no mapping stays behind."""
        try:
            bytes_ = torch.UntypedStorage.from_file(str(self.file), False, self.stop)[self.start : self.stop]
        except RuntimeError as error:
            raise CheckpointError(f"{self.file}: tensor {self.name} cannot be read ({str(error).splitlines()[0]})") from error
        return torch.empty(0, dtype=self.dtype).set_(bytes_).view(self.shape)

    def head(self, num_bytes: int) -> bytes:
        """The first bytes of the tensor's data."""
        with self.file.open("rb") as file:
            file.seek(self.start)
            return file.read(min(num_bytes, self.stop - self.start))


@dataclass(frozen=True)
class BinTensor:
    """A tensor of a ``pytorch_model.bin``; the file is mapped anew for each read, so that no mapping stays behind."""

    file: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    def read(self) -> torch.Tensor:
        """The tensor, a view of the mapped file."""
        tensor: torch.Tensor = load_torch_file(self.file)[self.name]
        return tensor

    def head(self, num_bytes: int) -> bytes:
        """The first bytes of the tensor's data."""
        flat = self.read().reshape(-1)[: -(-num_bytes // self.dtype.itemsize)].contiguous()
        return flat.view(torch.uint8).numpy().tobytes()[:num_bytes]


def read_bin_file(path: Path) -> dict[str, BinTensor]:
    """Tensors of one legacy file, read without running anything it contains.

    Raises:
        CheckpointError: missing, truncated, of torch before 1.6, or of a dtype that is not supported.
    """
    tensors = {}
    for name, value in load_torch_file(path).items():
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(f"{path}: {name} is {type(value).__name__}, expected a tensor")
        if value.dtype not in SAFETENSORS_DTYPES.values():
            raise CheckpointError(f"{path}: tensor {name} is {value.dtype}; supported are {', '.join(SAFETENSORS_DTYPES)}")
        tensors[str(name)] = BinTensor(path, str(name), value.dtype, tuple(value.shape))
    return tensors


def read_safetensors_header(path: Path) -> dict[str, StoredTensor]:
    """Tensors of one file, checked against its size.

    Raises:
        CheckpointError: missing, truncated, no safetensors file, or of a dtype that is not supported.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > _LARGEST_HEADER_BYTES:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        items = [(name, entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"]) for name, entry in header.items()]
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a safetensors file, or a truncated one ({error})") from error
    size = path.stat().st_size - 8 - length
    tensors = {}
    for name, dtype, shape, start, stop in items:
        if dtype not in SAFETENSORS_DTYPES:
            raise CheckpointError(f"{path}: tensor {name} is {dtype}; supported are {', '.join(SAFETENSORS_DTYPES)} (no quantised models)")
        if stop - start != prod(shape) * SAFETENSORS_DTYPES[dtype].itemsize or start < 0:
            raise CheckpointError(f"{path}: tensor {name} of {dtype} {list(shape)} has bytes {start} to {stop}; the file is damaged")
        if stop > size:
            raise CheckpointError(f"{path}: tensor {name} ends at byte {stop} of the data, but the file has {size}; it is truncated")
        tensors[name] = StoredTensor(path, name, SAFETENSORS_DTYPES[dtype], shape, 8 + length + start, 8 + length + stop)
    return tensors


def read_hf_folder(folder: Path) -> Mapping[str, StoredTensor | BinTensor]:
    """Tensors of ``model.safetensors`` or of the files that the index names; without either, of ``pytorch_model*.bin``.

    Raises:
        CheckpointError: no weights, a bad index, or as :func:`read_safetensors_header` and :func:`read_bin_file`.
    """
    files = _weight_files(folder, INDEX_NAME, "model*.safetensors")
    legacy = [] if files else _weight_files(folder, BIN_INDEX_NAME, "pytorch_model*.bin")
    if not files and not legacy:
        other = [path.name for pattern in ("*.bin", "*.pth", "*.safetensors") for path in folder.glob(pattern)]
        found = f"; it has {', '.join(other[:3])}, save it again with safe_serialization=True" if other else ""
        raise CheckpointError(f"{folder}: has no model.safetensors, no {INDEX_NAME} and no pytorch_model.bin{found}")
    tensors: dict[str, StoredTensor | BinTensor] = {}
    for file in files or legacy:
        found_here: Mapping[str, StoredTensor | BinTensor] = read_safetensors_header(file) if files else read_bin_file(file)
        for name, tensor in found_here.items():
            if name in tensors:
                raise CheckpointError(f"{file}: tensor {name} is also in {tensors[name].file.name}")
            tensors[name] = tensor
    return tensors


def _weight_files(folder: Path, index_name: str, pattern: str) -> list[Path]:
    index = folder / index_name
    return list(_indexed_files(index)) if index.is_file() else sorted(folder.glob(pattern))


def _indexed_files(index: Path) -> Iterator[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index}: not an index of weight files ({error})") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{index}: names the file {name!r}; only files of this folder are read")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index}: names {name}, which is not there; copy the whole model folder again")
        yield index.parent / name
