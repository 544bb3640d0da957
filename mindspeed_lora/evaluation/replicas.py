"""Work over the data-parallel replicas: the first driver deals it out, every driver does its share, each item once.

Only the first driver runs lm_eval and knows about tasks. The others wait in :meth:`Replicas.follow`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mindspeed_lora.inference.channel import other_ranks
from mindspeed_lora.parallel.collectives import Group, broadcast_object, gather_objects

Handler = Callable[[Sequence[Any]], Iterator[Any]]  # items -> one result per item, in order
ROUND = 32  # items of a replica before the results are collected: what is lost at most when a run is interrupted


class Replicas:
    """``handlers`` name the kinds of work and must be the same on every driver; ``drivers`` None: one replica."""

    def __init__(self, handlers: dict[str, Handler], drivers: Group, rank: int, size: int) -> None:
        self._handlers, self._drivers, self._rank, self.size = handlers, drivers, rank, size
        self._broken = False  # work was dealt out and not collected

    def map(self, kind: str, items: Sequence[Any], take: Callable[[int, Any], None]) -> None:
        """First driver: hand each item's number and result to ``take``, its own at once, the others' after each round.

        Item i is done by replica i modulo their number, so items sorted by length are spread evenly.
        """
        step = ROUND * self.size if self.size > 1 else max(len(items), 1)
        for start in range(0, len(items), step):
            self._round(kind, items[start : start + step], start, take)

    def _round(self, kind: str, items: Sequence[Any], start: int, take: Callable[[int, Any], None]) -> None:
        self._broken = True
        with other_ranks("another replica's driver"):
            broadcast_object((kind, items), 0, self._drivers)
        for index, result in enumerate(self._handlers[kind](items[:: self.size])):
            take(start + index * self.size, result)
        with other_ranks("another replica's driver"):
            shares: list[Any] = gather_objects(None, self._drivers)
        self._broken = False
        for rank, share in enumerate(shares):
            for index, result in enumerate(share or ()):
                take(start + index * self.size + rank, result)

    def follow(self) -> None:
        """Other drivers: do shares until the first driver releases them."""
        with other_ranks("the first driver, or another replica's,"):
            while isinstance(order := broadcast_object(None, 0, self._drivers), tuple):
                kind, items = order
                gather_objects(list(self._handlers[kind](items[self._rank :: self.size])), self._drivers)

    def release(self) -> None:
        """First driver: no more work. After an error amid :meth:`map` nothing is sent: the others would not read it, they wait for
        this driver's share until its process ends.
        """
        if not self._broken:
            broadcast_object(None, 0, self._drivers)
