"""Products of rows that lie group after group with one matrix per group: the experts of a rank, each with its own tokens.

| method     | per group e                     | shapes                                             |
|------------|---------------------------------|----------------------------------------------------|
| matmul     | ``y_e = x_e W_e``               | ``[n, k], [E, k, m] -> [n, m]``                    |
| add_matmul | ``y_e += s x_e W_e``            | in place                                           |
| outer      | ``W_e = y_e^T x_e``             | ``[n, p], [n, q] -> [E, p, q]``                    |

An empty group gives no rows, and a zero matrix. The classes give the same within rounding:

| class        | how                                                  | where                                       |
|--------------|------------------------------------------------------|---------------------------------------------|
| Sequential   | one product after the other                          | anywhere                                    |
| Windowed     | the same, of few numbers of rows                     | a CPU that multiplies 16 bits fast          |
| TorchGrouped | ``torch.nn.functional.grouped_mm``, one call for all | CUDA (a kernel for bf16, sm 90 on), CPU     |
| NpuGrouped   | ``npu_grouped_matmul``                               | NPU                                         |

``widen`` gives rows the dtype of their products (:mod:`~mindspeed_lora.ops.products`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Protocol

import torch

from mindspeed_lora.device import load_torch_npu, torch_version
from mindspeed_lora.ops.products import product, widens

_FEW_ROWS_A_GROUP = 4  # below this reading a large matrix is all that its product costs, and widening it doubles that
_FEW_GROUPS = 4  # with fewer than one in four that has rows, a view of each is cheaper than splitting (8 of 128: 41 us, not 452)
_WINDOW = 32  # rows: lengths of windows are multiples of it
_ALIGNMENT = 16  # bytes, of every stride and address that torch's grouped product takes


@dataclass(frozen=True, eq=False)
class RowGroups:
    """``counts`` ``[E]`` int64: rows of each group, in order; their sum is the number of rows."""

    counts: torch.Tensor

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """The counts on the host: waits for the device, once."""
        return tuple(self.counts.tolist())

    @cached_property
    def filled(self) -> tuple[tuple[int, int, int], ...]:
        """(group, first row, row after the last) of the groups that have rows, on the host."""
        stops = accumulate(self.lengths)
        return tuple((group, stop - length, stop) for group, (length, stop) in enumerate(zip(self.lengths, stops, strict=True)) if length)

    @cached_property
    def ends(self) -> torch.Tensor:
        """int32 ``[E]``: the row after each group's last, on the device."""
        return self.counts.cumsum(0, dtype=torch.int32)

    @cached_property
    def empty(self) -> torch.Tensor:
        """bool ``[E, 1, 1]``, on the device."""
        return (self.counts == 0).view(-1, 1, 1)

    def split(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Views ``[n_e, ...]`` of ``rows``, one per group."""
        return rows.split(self.lengths)


class Products(Protocol):
    """See the module's tables. Factors of one dtype, but that the first may be what ``widen`` made of it."""

    name: str

    def widen(self, rows: torch.Tensor, groups: RowGroups) -> torch.Tensor:
        """Rows ``[n, k]`` in the dtype of their products."""
        ...

    def matmul(self, x: torch.Tensor, weight: torch.Tensor, groups: RowGroups) -> torch.Tensor:
        """x ``[n, k]``, weight ``[E, k, m]`` -> ``[n, m]`` in x's dtype."""
        ...

    def add_matmul(self, y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, groups: RowGroups, scale: float = 1.0) -> torch.Tensor:
        """``y += scale * matmul(x, weight)`` in place; returns y ``[n, m]``."""
        ...

    def outer(self, y: torch.Tensor, x: torch.Tensor, groups: RowGroups) -> torch.Tensor:
        """y ``[n, p]``, x ``[n, q]`` -> ``[E, p, q]`` in y's dtype."""
        ...


class Sequential:
    """One group after the other."""

    name = "one expert after the other"

    def widen(self, rows: torch.Tensor, groups: RowGroups) -> torch.Tensor:
        """See the protocol."""
        return rows.float() if widens(rows.device.type, rows.dtype) and not _are_few(rows, groups) else rows

    def matmul(self, x: torch.Tensor, weight: torch.Tensor, groups: RowGroups) -> torch.Tensor:
        """See the protocol."""
        y = x.new_empty(x.shape[0], weight.shape[2])
        multiply = product if _are_few(x, groups) else torch.mm  # oneDNN's, where it is faster, of few rows only: see Windowed
        for rows, matrix, out in _parts(groups, x, weight, y):
            multiply(rows, matrix.to(rows.dtype), out=out)
        return y

    def add_matmul(self, y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, groups: RowGroups, scale: float = 1.0) -> torch.Tensor:
        """See the protocol."""
        for rows, matrix, out in _parts(groups, x, weight, y):
            out.addmm_(rows, matrix.to(rows.dtype), alpha=scale)
        return y

    def outer(self, y: torch.Tensor, x: torch.Tensor, groups: RowGroups) -> torch.Tensor:
        """See the protocol."""
        result = y.new_empty(len(groups.lengths), y.shape[1], x.shape[1])
        for length, left, right, out in zip(groups.lengths, groups.split(y), groups.split(x), result, strict=True):
            torch.mm(left.t(), right.to(left.dtype), out=out) if length else out.zero_()
        return result


def _are_few(rows: torch.Tensor, groups: RowGroups) -> bool:
    return rows.shape[0] < _FEW_ROWS_A_GROUP * len(groups.counts)


def _parts(
    groups: RowGroups, x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(rows, matrix, result's rows) of every group that has rows; where they are few (a token's experts), no views of the others."""
    if _FEW_GROUPS * len(groups.filled) <= len(groups.lengths):
        return ((x[start:stop], weight[group], y[start:stop]) for group, start, stop in groups.filled)
    parts = zip(groups.lengths, groups.split(x), weight, groups.split(y), strict=True)
    return ((rows, matrix, out) for length, rows, matrix, out in parts if length)


class Windowed(Sequential):
    """One group after the other in windows of few lengths: oneDNN, which multiplies 16 bits, compiles a kernel for each new one (0.4 ms).

    A window begins with a group's first row and reaches into the rows of groups behind it, whose results are written later.
    """

    name = "one expert after the other, in windows"

    def widen(self, rows: torch.Tensor, groups: RowGroups) -> torch.Tensor:
        """As they are."""
        return rows

    def matmul(self, x: torch.Tensor, weight: torch.Tensor, groups: RowGroups) -> torch.Tensor:
        """See the protocol."""
        if _are_few(x, groups):
            return super().matmul(x, weight, groups)
        y = x.new_empty(x.shape[0], weight.shape[2])
        for group, own, window in _windows(groups, len(x)):
            if window.start == own.start:
                torch.mm(x[window], weight[group], out=y[window])
            else:
                y[own] = torch.mm(x[window], weight[group])[_inside(own, window)]
        return y

    def add_matmul(self, y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, groups: RowGroups, scale: float = 1.0) -> torch.Tensor:
        """See the protocol."""
        return y.add_(self.matmul(x, weight, groups), alpha=scale)

    def outer(self, y: torch.Tensor, x: torch.Tensor, groups: RowGroups) -> torch.Tensor:
        """See the protocol; what is not finite in a row may reach other groups."""
        if _are_few(x, groups):
            return super().outer(y, x, groups)
        result = y.new_zeros(len(groups.lengths), y.shape[1], x.shape[1])
        for group, own, window in _windows(groups, len(x)):
            left = y.new_zeros(window.stop - window.start, y.shape[1])
            left[_inside(own, window)] = y[own]
            torch.mm(left.t(), x[window], out=result[group])
        return result


def _windows(groups: RowGroups, count: int) -> Iterator[tuple[int, slice, slice]]:
    """(group, its rows, its window of the ``count`` rows) of every group that has rows; at the end windows begin before their group."""
    for group, start, stop in groups.filled:
        length = stop - start
        step = max(_WINDOW, 1 << length.bit_length() >> 4)  # long ones reach an eighth beyond, at most
        size = -(-length // step) * step
        end = min(start + size, count)
        yield group, slice(start, stop), slice(max(0, end - size), end)


def _inside(own: slice, window: slice) -> slice:
    return slice(own.start - window.start, own.stop - window.start)


class TorchGrouped:
    """torch's grouped product; :func:`grouped_refusal` says where it may be used."""

    name = "torch's grouped product"

    def widen(self, rows: torch.Tensor, groups: RowGroups) -> torch.Tensor:
        """See the protocol; on a CPU always, as it is a loop there whose products have new numbers of rows (see ``Windowed``)."""
        return rows.float() if rows.device.type == "cpu" and rows.dtype.itemsize == 2 and not _are_few(rows, groups) else rows

    def matmul(self, x: torch.Tensor, weight: torch.Tensor, groups: RowGroups) -> torch.Tensor:
        """See the protocol."""
        if not x.shape[0]:
            return x.new_empty(0, weight.shape[2])
        return _grouped_mm(_aligned(x), _aligned(weight.to(x.dtype)), groups.ends)

    def add_matmul(self, y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, groups: RowGroups, scale: float = 1.0) -> torch.Tensor:
        """See the protocol."""
        return y.add_(self.matmul(x, weight, groups), alpha=scale)

    def outer(self, y: torch.Tensor, x: torch.Tensor, groups: RowGroups) -> torch.Tensor:
        """See the protocol."""
        if not x.shape[0]:
            return y.new_zeros(len(groups.counts), y.shape[1], x.shape[1])
        return _grouped_mm(_aligned(y).t(), _aligned(x.to(y.dtype)), groups.ends).masked_fill_(groups.empty, 0)


def _grouped_mm(left: torch.Tensor, right: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    function = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm  # the public name: torch 2.10 on
    return function(left, right, offs=ends)


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """A copy where the tensor starts at an address that the kernel does not take: a view into a flat buffer may."""
    return tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()


class NpuGrouped:
    """``npu_grouped_matmul``: ``group_type`` 0 cuts the rows of x, 2 the dimension that is summed over."""

    name = "npu_grouped_matmul"

    def widen(self, rows: torch.Tensor, groups: RowGroups) -> torch.Tensor:
        """As they are."""
        return rows

    def matmul(self, x: torch.Tensor, weight: torch.Tensor, groups: RowGroups) -> torch.Tensor:
        """See the protocol."""
        if not x.shape[0]:
            return x.new_empty(0, weight.shape[2])
        return _npu_grouped(x, weight, groups, group_type=0)

    def add_matmul(self, y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, groups: RowGroups, scale: float = 1.0) -> torch.Tensor:
        """See the protocol."""
        return y.add_(self.matmul(x, weight, groups), alpha=scale)

    def outer(self, y: torch.Tensor, x: torch.Tensor, groups: RowGroups) -> torch.Tensor:
        """See the protocol."""
        if not x.shape[0]:
            return y.new_zeros(len(groups.counts), y.shape[1], x.shape[1])
        return _npu_grouped(y.t(), x, groups, group_type=2).masked_fill_(groups.empty, 0)


def _npu_grouped(left: torch.Tensor, right: torch.Tensor, groups: RowGroups, group_type: int) -> torch.Tensor:
    """``split_item`` 3: one tensor comes back; ``group_list_type`` 1: the list holds counts."""
    return load_torch_npu().npu_grouped_matmul(
        [left], [right], group_list=groups.counts, split_item=3, group_type=group_type, group_list_type=1
    )[0]


def grouped_refusal(device: torch.device, dtype: torch.dtype, sizes: Iterable[int]) -> str | None:
    """Why grouped products cannot be had, None where they can.

    Args:
        sizes: every number of columns of the factors and results.
    """
    name = str(dtype).removeprefix("torch.")
    if device.type == "npu":
        return None
    if device.type == "cpu" and torch_version() < (2, 9):
        return f"torch {torch.__version__} has no grouped product (2.9 on)"
    if device.type == "cuda":
        if dtype != torch.bfloat16:
            return f"torch's grouped product takes bfloat16, not {name}"
        oldest = (8, 0) if torch_version() >= (2, 9) else (9, 0)
        if torch_version() < (2, 8) or torch.cuda.get_device_capability(device) < oldest:
            card = torch.cuda.get_device_name(device)
            return f"torch {torch.__version__} has no grouped product for {card} (torch 2.8 from sm 90 on, 2.9 from sm 80 on)"
    multiple = _ALIGNMENT // dtype.itemsize
    odd = sorted({size for size in sizes if size % multiple})
    if odd:
        return f"torch's grouped product of {name} takes sizes that are multiples of {multiple}, which {', '.join(map(str, odd))} is not"
    return None


def default_products(device: torch.device, dtype: torch.dtype, sizes: Iterable[int]) -> Products:
    """The fastest on this device. CUDA's kernel is one of sm 90 and 100; elsewhere torch's function is a loop itself, no faster than ours
    (a step of 64 experts on one core: 252.0 against 251.6 ms in fp32).
    """
    if device.type == "npu":
        return NpuGrouped()
    if device.type == "cpu" and dtype.itemsize == 2 and not widens("cpu", dtype):
        return Windowed()
    fast = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (9, 10)
    return TorchGrouped() if fast and grouped_refusal(device, dtype, sizes) is None else Sequential()
