"""What a forward pass needs beyond ids when a model generates, or when rows hold several documents."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass
class KVCache:
    """Keys and values of this rank's layers, by global layer number, each ``[b, g/t, total, d]``.

    Storage grows by doubling, so that appending a token copies only the token.
    """

    length: int = 0
    _keys: dict[int, torch.Tensor] = field(default_factory=dict)
    _values: dict[int, torch.Tensor] = field(default_factory=dict)

    @staticmethod
    def _room(store: torch.Tensor | None, new: torch.Tensor, used: int) -> torch.Tensor:
        needed = used + new.shape[2]
        if store is not None and store.shape[2] >= needed:
            return store
        grown = new.new_empty((new.shape[0], new.shape[1], max(needed, 2 * used), new.shape[3]))
        if store is not None:
            grown[:, :, :used] = store[:, :, :used]
        return grown

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add ``[b, g/t, s, d]`` behind what ``layer`` holds and return all of it; :meth:`advance` ends the step."""
        end = self.length + key.shape[2]
        for store, new in ((self._keys, key), (self._values, value)):
            store[layer] = self._room(store.get(layer), new, self.length)
            store[layer][:, :, self.length : end] = new
        return self._keys[layer][:, :, :end], self._values[layer][:, :, :end]

    def held(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values that ``layer`` holds, each ``[b, g/t, length, d]``."""
        return self._keys[layer][:, :, : self.length], self._values[layer][:, :, : self.length]

    def advance(self, num_tokens: int) -> None:
        """Count the step's tokens, once every layer has appended them."""
        self.length += num_tokens

    def reorder(self, rows: torch.Tensor) -> None:
        """Take batch rows ``rows`` (beam search)."""
        for store in (self._keys, self._values):
            for layer, tensor in store.items():
                store[layer] = tensor.index_select(0, rows.to(tensor.device))

    def crop(self, length: int) -> None:
        """Forget everything from position ``length`` on."""
        self.length = min(self.length, length)

    def reset(self) -> None:
        """Forget everything."""
        self.length = 0
        self._keys.clear()
        self._values.clear()


class SharedPrefix:
    """Keys and values of one prefix ``[1, g/t, prefix, d]`` that every row of a batch stands behind; nothing is added to them."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self.length = cache.length

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The prefix's keys and values with ``[b, g/t, s, d]`` behind them in each row."""
        before = (held.expand(len(key), -1, -1, -1) for held in self._cache.held(layer))
        keys, values = (torch.cat(pair, dim=2) for pair in zip(before, (key, value), strict=True))
        return keys, values

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
