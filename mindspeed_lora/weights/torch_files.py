"""Reading another program's ``.pt`` (any pickle protocol) without running anything it contains.

Such a file is a zip archive of ``data.pkl`` and one uncompressed record per storage. torch's own restricted reader knows pickle
protocol 2 only; the one here knows all, and resolves every name by :mod:`mindspeed_lora.weights.inert`, so that no code outside
that file can be reached. Storages are ranges of one private memory map of the file.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from mindspeed_lora.errors import CheckpointError
from mindspeed_lora.weights.inert import InertObject, StoredElements, stand_in

_LOCAL_HEADER = struct.Struct("<4s5H3L2H")  # zip: signature, versions and flags, crc, sizes, name and extra lengths
_DAMAGE = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    struct.error,
    RuntimeError,
    EOFError,
    LookupError,
    ValueError,
    OverflowError,
    OSError,
    TypeError,
    AttributeError,
    NotImplementedError,
)


class _RefusedName(Exception):
    """The pickle refers to something that no Megatron checkpoint needs."""


class _Records:
    """The zip archive's records, and the storages among them mapped from the file."""

    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        self.path, self.archive = path, archive
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("no data.pkl in it")
        self.prefix = pickles[0].removesuffix("data.pkl")
        self.infos = {info.filename: info for info in archive.infolist()}
        self.size = path.stat().st_size
        self._map: Any = None
        order = self.prefix + "byteorder"
        if order in self.infos and archive.read(order) != b"little":
            raise ValueError("its numbers are not little-endian")

    def pickle(self) -> bytes:
        """The pickled dictionary."""
        name = self.prefix + "data.pkl"
        if self.infos[name].compress_type != zipfile.ZIP_STORED:
            raise ValueError("its data.pkl is compressed, which torch never does")
        return self.archive.read(name)

    def storage(self, key: str, num_bytes: int) -> torch.UntypedStorage:
        """The mapped bytes of one storage."""
        info = self.infos.get(f"{self.prefix}data/{key}")
        if info is None or info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"storage {key!r} is not in it, or compressed")
        if num_bytes > info.file_size or num_bytes < 0:
            raise ValueError(f"storage {key!r} has {info.file_size} bytes, {num_bytes} are needed")
        if num_bytes == 0:
            return torch.UntypedStorage(0)
        assert self.archive.fp is not None
        header = _LOCAL_HEADER.unpack(os.pread(self.archive.fp.fileno(), _LOCAL_HEADER.size, info.header_offset))
        start = info.header_offset + _LOCAL_HEADER.size + header[-2] + header[-1]
        if start + num_bytes > self.size:
            raise ValueError(f"storage {key!r} ends beyond the file; it is truncated")
        if self._map is None:
            self._map = torch.UntypedStorage.from_file(str(self.path), False, self.size)
        mapped: torch.UntypedStorage = self._map[start : start + num_bytes]
        return mapped


class _Unpickler(pickle.Unpickler):
    """An unpickler that finds stand-ins instead of classes and functions."""

    def __init__(self, records: _Records) -> None:
        super().__init__(io.BytesIO(records.pickle()), encoding="utf-8")
        self.records = records
        self.found: dict[tuple[str, str], Any] = {}
        self.storages: dict[str, torch.UntypedStorage] = {}

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in of a name; importing nothing."""
        if (module, name) not in self.found:
            try:
                self.found[module, name] = stand_in(module, name)
            except LookupError as error:
                raise _RefusedName(f"{module}.{name}") from error
        return self.found[module, name]

    def persistent_load(self, pid: Any) -> StoredElements:
        """``("storage", type, key, location, number of elements)``; the location (cpu, npu:0, ...) does not matter."""
        kind, storage_type, key, _, count = pid
        dtype = storage_type if isinstance(storage_type, torch.dtype) else getattr(storage_type, "element_type", None)
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"an object of kind {kind!r} and type {storage_type!r}")
        if key not in self.storages:
            self.storages[key] = self.records.storage(str(key), int(count) * dtype.itemsize)
        return StoredElements(self.storages[key], dtype)


def load_torch_file(path: Path) -> dict[str, Any]:
    """Read a zip-format ``.pt``; its tensors stay in the file (memory-mapped, private) until they are used.

    Raises:
        CheckpointError: the file is missing, truncated, no such file, or refers to something outside the known modules.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"{path}: not a complete torch checkpoint (no zip directory at its end); the file is truncated or something else"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            content = _Unpickler(_Records(path, archive)).load()
    except _RefusedName as error:
        raise CheckpointError(
            f"{path}: refers to {error}, which no Megatron checkpoint needs; refused, nothing of it was run. "
            "Take the file from a source you trust, saved without such objects"
        ) from error
    except _DAMAGE as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path}: damaged or no torch checkpoint ({reason})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds {type(content).__name__}, expected a dictionary with the key 'model'")
    return content


def as_namespace(value: Any) -> SimpleNamespace | None:
    """``args`` of a checkpoint as plain values; objects of unknown classes stay inert. None: there are no args to read."""
    values = vars(value) if isinstance(value, InertObject) else value
    return SimpleNamespace(**{str(key): item for key, item in values.items()}) if isinstance(values, Mapping) else None
