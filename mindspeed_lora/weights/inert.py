"""Stand-ins for what a pickle refers to: inert objects, and the few calls that make tensors and containers.

Nothing that a pickle names is ever imported. A name is looked up in the table of this file; one that is not there but comes from
a module that Megatron checkpoints use becomes a class whose instances only remember their arguments; any other name is refused.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch

# Modules whose classes occur in Megatron checkpoints; a name from anywhere else is refused rather than made inert.
_EXPECTED_MODULES = (
    "_codecs",
    "argparse",
    "collections",
    "copyreg",
    "datetime",
    "enum",
    "megatron",
    "mindspeed",
    "mindspeed_llm",
    "numpy",
    "pathlib",
    "torch",
    "torch_npu",
    "transformers",
)
_EXPECTED_BUILTINS = ("list", "dict", "set", "frozenset", "tuple", "int", "float", "bool", "str", "bytearray", "complex", "slice", "object")
STORAGE_DTYPES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
    "UntypedStorage": torch.uint8,
}


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

    def __setitem__(self, key: Any, value: Any) -> None:
        """Accept the items of a mapping, and forget them."""

    def append(self, value: Any) -> None:
        """Accept an item of a list, and forget it."""

    def extend(self, values: Any) -> None:
        """Accept the items of a list, and forget them."""


class AllowedCall:
    """One of this file's own functions, as the unpickler sees it: it can be called and nothing else."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        """Run this file's own function."""
        return self._function(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a pickle tries to change a function")


class StoredElements:
    """A storage of the file: mapped bytes and the dtype of their elements."""

    __slots__ = ("data", "dtype")

    def __init__(self, data: torch.UntypedStorage, dtype: torch.dtype) -> None:
        self.data, self.dtype = data, dtype

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a pickle tries to change a storage")


def _tensor(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> torch.Tensor:
    """``torch._utils._rebuild_tensor_v2`` without hooks; further arguments (gradient flag, hooks, NPU format) change no value."""
    if not isinstance(storage, StoredElements):
        raise pickle.UnpicklingError(f"a tensor is made of {type(storage).__name__}, not of a storage")
    sizes, strides = [int(n) for n in size], [int(n) for n in stride]
    reach = 0 if 0 in sizes else offset + 1 + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True))
    if offset < 0 or min([0, *sizes, *strides]) < 0 or reach * storage.dtype.itemsize > storage.data.nbytes():
        raise pickle.UnpicklingError(f"a tensor of {sizes} reaches beyond its storage of {storage.data.nbytes()} bytes")
    return torch.empty(0, dtype=storage.dtype).set_(storage.data, offset, sizes, strides)


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _mapping(*items: Any) -> OrderedDict[Any, Any]:
    """An ordered dictionary; a ``defaultdict``'s factory is left away."""
    pairs = items[-1] if items and isinstance(items[-1], list | dict) else ()
    return OrderedDict(pairs)


_ALLOWED: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _mapping,
    "collections.defaultdict": _mapping,
    "torch.Size": lambda sizes=(): tuple(sizes),
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch_npu.utils.storage._rebuild_npu_tensor": _tensor,  # same arguments, and the format of the device memory
}


def stand_in(module: str, name: str) -> Any:
    """What takes the place of ``module.name``.

    Raises:
        LookupError: no Megatron checkpoint needs it.
    """
    full = f"{module}.{name}"
    if full in _ALLOWED:
        return AllowedCall(_ALLOWED[full])
    if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
        return getattr(torch, name)
    if module in ("torch", "torch.storage") and name in STORAGE_DTYPES:
        return type(f"Inert_{name}", (InertObject,), {"element_type": STORAGE_DTYPES[name]})
    expected = name in _EXPECTED_BUILTINS if module in ("builtins", "__builtin__") else module.partition(".")[0] in _EXPECTED_MODULES
    if not expected:
        raise LookupError(full)
    return type(f"Inert_{name.rpartition('.')[2]}", (InertObject,), {})
