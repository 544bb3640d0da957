"""Reading another program's ``.pt`` without running anything it contains.

Classes that the file refers to are replaced by inert ones (``torch.serialization.safe_globals``), and only
``torch.load(weights_only=True)`` ever reads it: a pickled call makes an inert object and runs nothing.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from mindspeed_lora.errors import CheckpointError

# Modules whose classes occur in Megatron checkpoints; a name from anywhere else is refused rather than made inert.
_EXPECTED_MODULES = (
    "argparse",
    "collections",
    "datetime",
    "enum",
    "megatron",
    "mindspeed",
    "mindspeed_llm",
    "numpy",
    "pathlib",
    "torch",
    "transformers",
)
_EXPECTED_BUILTINS = tuple(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in ("list", "dict", "set", "int", "float"))


class InertObject:
    """Stands for an instance of a class that is not loaded; keeps what it was made of and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> InertObject:
        """Accept any arguments."""
        instance = super().__new__(cls)
        instance.arguments = args
        return instance

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.arguments = args

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.state = state


class InertMapping:
    """Stands for ``collections.defaultdict``: making one gives a plain ordered dictionary, without the factory."""

    def __new__(cls, *args: Any, **kwargs: Any) -> OrderedDict[Any, Any]:  # type: ignore[misc]
        """A dictionary of a type that torch's restricted reader fills."""
        return OrderedDict()


def _stand_in(name: str) -> type:
    base = InertMapping if name == "collections.defaultdict" else InertObject
    return type(f"Inert_{name.rpartition('.')[2]}", (base,), {})


def _unreadable_reason(message: str) -> str:
    if "Unsupported operand" in message:  # torch's restricted reader knows pickle protocol 2
        return (
            "its pickle protocol is not 2, as in the files of the peer's convert_ckpt_v2.py, and cannot be read without running code; "
            "write the checkpoint again with convert_ckpt.py"
        )
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    reason = next(
        (line for line in lines if line.startswith(("Can only", "Unsupported", "Trying"))), lines[0] if lines else "no reason given"
    )
    return f"holds something that cannot be read without running code ({reason})"


def _is_expected(name: str) -> bool:
    return name.partition(".")[0] in _EXPECTED_MODULES or name in _EXPECTED_BUILTINS


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
        names = get_unsafe_globals_in_checkpoint(path)
        refused = [name for name in names if not _is_expected(name)]
        if refused:
            raise CheckpointError(
                f"{path}: refers to {', '.join(sorted(refused))}, which no Megatron checkpoint needs; refused, nothing of it was run. "
                "Take the file from a source you trust, saved without such objects"
            )
        with safe_globals([(_stand_in(name), name) for name in names]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: {_unreadable_reason(str(error))}") from error
    except (RuntimeError, EOFError, KeyError, ValueError, OSError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged or no torch checkpoint ({str(error).splitlines()[0]})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds {type(content).__name__}, expected a dictionary with the key 'model'")
    return content


def as_namespace(value: Any) -> SimpleNamespace | None:
    """``args`` of a checkpoint as plain values; objects of unknown classes stay inert."""
    if value is None:
        return None
    return SimpleNamespace(**{str(key): item for key, item in vars(value).items()})
