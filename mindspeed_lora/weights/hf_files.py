"""Reading a Hugging Face folder's safetensors one tensor at a time (safetensors format: 8-byte length, JSON header, bytes)."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from mindspeed_lora.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
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
        """The tensor; the file is opened for this one only, so that no mapping stays behind."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.file, framework="pt") as file:
                return file.get_tensor(self.name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.file}: tensor {self.name} cannot be read ({error})") from error

    def head(self, num_bytes: int) -> bytes:
        """The first bytes of the tensor's data."""
        with self.file.open("rb") as file:
            file.seek(self.start)
            return file.read(min(num_bytes, self.stop - self.start))


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
        if stop > size:
            raise CheckpointError(f"{path}: tensor {name} ends at byte {stop} of the data, but the file has {size}; it is truncated")
        tensors[name] = StoredTensor(path, name, SAFETENSORS_DTYPES[dtype], shape, 8 + length + start, 8 + length + stop)
    return tensors


def read_hf_folder(folder: Path) -> dict[str, StoredTensor]:
    """Tensors of ``model.safetensors`` or of the files that the index names.

    Raises:
        CheckpointError: no safetensors, a bad index, or as :func:`read_safetensors_header`.
    """
    index = folder / INDEX_NAME
    files = list(_indexed_files(index)) if index.is_file() else sorted(folder.glob("model*.safetensors"))
    if not files:
        other = [path.name for pattern in ("*.bin", "*.pth", "*.safetensors") for path in folder.glob(pattern)]
        found = f"; it has {', '.join(other[:3])}, save it again with safe_serialization=True" if other else ""
        raise CheckpointError(f"{folder}: has no model.safetensors and no {INDEX_NAME}{found}")
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in read_safetensors_header(file).items():
            if name in tensors:
                raise CheckpointError(f"{file}: tensor {name} is also in {tensors[name].file.name}")
            tensors[name] = tensor
    return tensors


def _indexed_files(index: Path) -> Iterator[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index}: not a safetensors index ({error})") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{index}: names the file {name!r}; only files of this folder are read")
        yield index.parent / name
