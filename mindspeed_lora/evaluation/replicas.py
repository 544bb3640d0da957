"""Work over the data-parallel replicas: the first driver deals it out, every driver does its share, each item once.

Only the first driver runs lm_eval and knows about tasks. The others wait in :meth:`Replicas.follow`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

from mindspeed_lora.inference.channel import other_ranks
from mindspeed_lora.parallel.collectives import Group, broadcast_object, gather_objects

Handler = Callable[[Sequence[Any]], Iterator[Any]]  # items -> one result per item, in order
ROUND = 32  # items of a replica before the results are collected: what is lost at most when a run is interrupted


class Replicas:
    """``handlers`` name the kinds of work and must be the same on every driver; ``drivers`` None: one replica.

    Interrupted, a driver does no more of its share; what it has done it hands over like the rest, and the first driver raises. So all of
    them are at the same place when it ends. ``undisturbed``: inside it a driver is interrupted in its handlers only.
    """

    def __init__(
        self,
        handlers: dict[str, Handler],
        drivers: Group,
        rank: int,
        size: int,
        undisturbed: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._handlers, self._drivers, self._rank, self.size = handlers, drivers, rank, size
        self._undisturbed = undisturbed
        self._broken = False  # work was dealt out and not collected

    def map(self, kind: str, items: Sequence[Any], take: Callable[[int, Any], None]) -> None:
        """First driver: hand each item's number and result to ``take``, its own at once, the others' after each round.

        Item i is done by replica i modulo their number, so items sorted by length are spread evenly.

        Raises:
            KeyboardInterrupt: this driver or another was interrupted; what was done is taken.
        """
        step = ROUND * self.size if self.size > 1 else max(len(items), 1)
        for start in range(0, len(items), step):
            with self._undisturbed():
                stopped = self._round(kind, items[start : start + step], start, take)
            if stopped is not None:
                raise stopped

    def _round(self, kind: str, items: Sequence[Any], start: int, take: Callable[[int, Any], None]) -> KeyboardInterrupt | None:
        self._broken, stopped = True, None
        with other_ranks("another replica's driver"):
            broadcast_object((kind, items), 0, self._drivers)
        try:
            for index, result in enumerate(self._handlers[kind](items[:: self.size])):
                take(start + index * self.size, result)
        except KeyboardInterrupt as error:
            stopped = error
        with other_ranks("another replica's driver"):
            shares: list[Any] = gather_objects([], self._drivers)
        self._broken = False
        for rank, share in enumerate(shares):
            for index, result in enumerate(share):
                take(start + index * self.size + rank, result)
            if rank and len(share) < len(items[rank :: self.size]):
                stopped = stopped or KeyboardInterrupt()
        return stopped

    def follow(self) -> None:
        """Other drivers: do shares until the first driver releases them."""
        with self._undisturbed(), other_ranks("the first driver, or another replica's,"):
            while isinstance(order := broadcast_object(None, 0, self._drivers), tuple):
                kind, items = order
                gather_objects(self._share(kind, items[self._rank :: self.size]), self._drivers)

    def _share(self, kind: str, items: Sequence[Any]) -> list[Any]:
        done: list[Any] = []
        with suppress(KeyboardInterrupt):
            for result in self._handlers[kind](items):
                done.append(result)
        return done

    def release(self) -> None:
        """First driver: no more work. After an error amid :meth:`map` nothing is sent: the others would not read it, they wait for
        this driver's share until its process ends.
        """
        if not self._broken:
            broadcast_object(None, 0, self._drivers)
