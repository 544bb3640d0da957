"""Reads the index of a ``torch.distributed.checkpoint`` folder without executing what it names.

The library unpickles ``.metadata`` as it is; a resume folder may come from somebody else. Here only the library's own record
classes, torch's sizes and dtypes, and paths are made; any other name is refused. (Tensors are read with ``weights_only``.)
"""

from __future__ import annotations

import pathlib
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.metadata import Metadata

from mindspeed_lora.errors import CheckpointError

INDEX_FILE = ".metadata"
_PATHS = ("Path", "PosixPath", "PurePath", "PurePosixPath")


class _IndexUnpickler(pickle.Unpickler):
    """Knows the names that an index needs."""

    def find_class(self, module: str, name: str) -> Any:
        """What ``module.name`` stands for.

        Raises:
            UnpicklingError: it is none of them.
        """
        if module == metadata.__name__ and isinstance(found := getattr(metadata, name, None), type) and found.__module__ == module:
            return found
        if (module, name) == (filesystem.__name__, "_StorageInfo"):
            return filesystem._StorageInfo
        if (module, name) == ("torch.serialization", "_get_layout"):
            return torch.serialization._get_layout
        if module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)):
            return getattr(torch, name)
        if module.partition(".")[0] == "pathlib" and name in _PATHS:
            return getattr(pathlib, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no index needs")


def read_index(folder: Path) -> Metadata:
    """The index of ``folder``.

    Raises:
        CheckpointError: it is missing, damaged, or names something that no index needs.
    """
    path = folder / INDEX_FILE
    try:
        with path.open("rb") as file:
            index = _IndexUnpickler(file).load()
        if not isinstance(index, Metadata):
            raise pickle.UnpicklingError(f"it holds a {type(index).__name__}")
    except (OSError, pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        raise CheckpointError(
            f"{path}: not a readable index of training state ({error}); "
            "pass --no-load-optim --no-load-rng, or --finetune to start from the weights at iteration 0"
        ) from error
    return index


class IndexedReader(dcp.FileSystemReader):
    """The library's reader with :func:`read_index` for its index."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._folder = Path(folder)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """As the library's."""
        index = read_index(self._folder)
        if index.storage_meta is None:
            index.storage_meta = metadata.StorageMeta()
        index.storage_meta.load_id = self.load_id
        return index
