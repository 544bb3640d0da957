"""What a forward pass needs beyond ids when a model generates, or when rows hold several documents."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar, cast

import torch

_Constant = TypeVar("_Constant")


@dataclass
class KVCache:
    """What attention remembers of this rank's layers, by global layer number: keys and values, each ``[b, g/t, total, d]``, or
    with latent attention the latents ``[b, 1, total, c + p]``.

    Storage grows by doubling, so that appending a token copies only the token.
    """

    length: int = 0
    _stores: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    _constants: dict[Hashable, object] = field(default_factory=dict)

    def _grow(self, layer: int, new: Sequence[torch.Tensor], end: int) -> list[torch.Tensor]:
        """Room for ``end`` positions of ``layer``, what it holds copied."""
        grown = [tensor.new_empty((*tensor.shape[:2], max(end, 2 * self.length), tensor.shape[3])) for tensor in new]
        for store, before in zip(grown, self._stores.get(layer, ()), strict=False):  # nothing before: the first step
            store[:, :, : self.length] = before[:, :, : self.length]
        self._stores[layer] = grown
        return grown

    def append(self, layer: int, *new: torch.Tensor) -> list[torch.Tensor]:
        """Add ``[b, g/t, s, d]`` behind each of what ``layer`` holds and return all of it; :meth:`advance` ends the step."""
        length, start, stores = new[0].shape[2], self.length, self._stores.get(layer)
        if stores is None or stores[0].shape[2] < start + length:
            stores = self._grow(layer, new, start + length)
        for store, tensor in zip(stores, new, strict=True):
            store.narrow(2, start, length).copy_(tensor)
        return [store.narrow(2, 0, start + length) for store in stores]

    def held(self, layer: int) -> tuple[torch.Tensor, ...]:
        """What ``layer`` holds, each ``[b, g/t, length, d]``."""
        return tuple(store[:, :, : self.length] for store in self._stores[layer])

    def constant(self, key: Hashable, make: Callable[[], _Constant]) -> _Constant:
        """What each step needs and is the same in all of them, made in the first."""
        if key not in self._constants:
            self._constants[key] = make()
        return cast(_Constant, self._constants[key])

    def advance(self, num_tokens: int) -> None:
        """Count the step's tokens, once every layer has appended them."""
        self.length += num_tokens

    def reorder(self, rows: torch.Tensor) -> None:
        """Take batch rows ``rows`` (beam search)."""
        for layer, stores in self._stores.items():
            self._stores[layer] = [store.index_select(0, rows.to(store.device)) for store in stores]

    def crop(self, length: int) -> None:
        """Forget everything from position ``length`` on."""
        self.length = min(self.length, length)

    def reset(self) -> None:
        """Forget everything."""
        self.length = 0
        self._stores.clear()
        self._constants.clear()


class SharedPrefix:
    """What is held of one prefix ``[1, g/t, prefix, d]`` that every row of a batch stands behind; nothing is added to it."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self.length = cache.length

    def append(self, layer: int, *new: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What is held of the prefix with ``[b, g/t, s, d]`` behind it in each row."""
        before = (held.expand(len(new[0]), -1, -1, -1) for held in self._cache.held(layer))
        return tuple(torch.cat(pair, dim=2) for pair in zip(before, new, strict=True))

    def constant(self, key: Hashable, make: Callable[[], _Constant]) -> _Constant:
        """See :meth:`KVCache.constant`."""
        return self._cache.constant(key, make)

    def advance(self, num_tokens: int) -> None:
        """The batch's own tokens are not kept."""


@dataclass(frozen=True)
class DecodeState:
    """One generation step.

    ``positions``: int64 ``[b, s]`` of the new tokens. ``mask``: bool ``[b, 1, s, total]``, True = may attend, or None for
    causal over a batch without padding. ``cache``: None for a pass without memory. ``wanted``: int64 ``[b, k]``, the positions
    (of the s new ones) whose logits the last stage computes; None: all.
    """

    positions: torch.Tensor
    mask: torch.Tensor | None = None
    cache: KVCache | SharedPrefix | None = None
    wanted: torch.Tensor | None = None


@dataclass(frozen=True)
class PackedDocuments:
    """Rows that hold several documents behind one another, which never attend to each other.

    ``ends``: for each row the cumulative ends of its documents, the last one the row's length (host integers: the NPU's
    kernel wants them there).
    """

    ends: list[list[int]]


Attend = DecodeState | PackedDocuments | None
"""How attention differs from causal over the whole row: while generating, inside documents, or not at all."""
