"""The parallel model as one object on the driver, and the loop that makes the other ranks follow it.

The driver (tp rank 0, pp rank 0 of a replica) is the only rank with random state, a tokenizer's output, or a user. Each
call sends a message to the workers, does the driver's own part, and returns the result. A worker needs nothing but
:func:`serve`. When the driver's work ends, :meth:`Engine.stop` releases the workers; where it broke off inside an order (out
of memory, say) they are inside that order too and read no message, so nothing is sent: the driver dies, and they with it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from mindspeed_lora.inference.channel import Channels, other_ranks
from mindspeed_lora.inference.executor import Executor, Scores
from mindspeed_lora.inference.protocol import Message, Operation, Output, receive_message, send_message
from mindspeed_lora.log import get_logger
from mindspeed_lora.model.stage import GPTStage
from mindspeed_lora.parallel.context import ParallelContext


@dataclass(frozen=True)
class ScoreBatch:
    """Rows that are scored together, all behind ``prefix``.

    ``ids`` int64 ``[b, s]``, padded on the *right*; ``wanted`` int64 ``[b, k]``, positions in ``ids`` to score; ``targets`` int64
    ``[b, k, c]``, the tokens whose log-probability is asked for at each of them.
    """

    ids: torch.Tensor
    wanted: torch.Tensor
    targets: torch.Tensor
    prefix: tuple[int, ...] = ()


class Engine:
    """Driver side."""

    def __init__(self, stage: GPTStage, context: ParallelContext, channels: Channels, adapters: tuple[str, ...] = ()) -> None:
        self._executor = Executor(stage, context, channels, adapters)
        self._context, self._replica = context, channels.replica
        self._stopped = False
        self._broken = False  # an order was begun and not carried out
        self._awaited = False  # logits are on their way from the last stage
        self.interruption: KeyboardInterrupt | None = None  # came while busy: the order is carried out first, to release the workers
        self._undisturbed = False
        self._cached_rows = 0
        self.vocab_size: int = stage.model_config.vocab_size
        self.device: torch.device = context.device

    @property
    def cache_length(self) -> int:
        """Number of positions whose keys and values every stage holds."""
        return self._executor.cache.length

    def _order(self, message: Message) -> torch.Tensor | Scores | None:
        self._broken = True
        with other_ranks("a worker"):
            send_message(message, self._replica)
            result = self._executor.execute(message)
        self._awaited = result is None and message.output == Output.LOGITS  # the last stage stands there until they are fetched
        self._end_order()
        return result

    def _collect(self, message: Message) -> torch.Tensor | Scores:
        self._broken = True
        with other_ranks("a worker"):
            result = self._executor.collect(message)
        self._awaited = False
        self._end_order()
        return result

    @property
    def amid_order(self) -> bool:
        """Whether an order is being carried out."""
        return self._broken or self._awaited

    @property
    def busy(self) -> bool:
        """Whether an interruption has to wait for the end of an order."""
        return self.amid_order or self._undisturbed

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Inside, others wait for what this driver sends: an interruption comes at the end of an order, and nowhere else."""
        self._undisturbed = True
        try:
            yield
        finally:
            self._undisturbed = False

    def _end_order(self) -> None:
        self._broken = False
        if self.interruption is not None and not self._awaited:
            raise self.interruption

    def forward(self, ids: torch.Tensor, real: torch.Tensor | None = None, use_cache: bool = False, keep_last: int = 1) -> torch.Tensor:
        """Logits of the last ``keep_last`` positions.

        Args:
            ids: int64 ``[b, s]``, behind what the cache holds when ``use_cache``; padded on the left.
            real: bool ``[b, s]``, False on padding; None when nothing is padded.
            use_cache: append to the cache (else it is left alone and unread).
            keep_last: at most s.

        Returns:
            Float32 ``[b, keep_last, v]`` on the device.
        """
        real = None if real is None or bool(real.all()) else real.cpu().bool()
        self._cached_rows = ids.shape[0] if use_cache else self._cached_rows
        ids = ids if self._replica is None else ids.cpu()  # without workers nothing needs to leave the device
        message = Message(Operation.FORWARD, ids, real, use_cache, Output.LOGITS, keep_last)
        result = self._order(message)
        result = self._collect(message) if result is None else result
        assert isinstance(result, torch.Tensor)
        return result

    def score(self, batches: Iterable[ScoreBatch]) -> Iterator[Scores]:
        """Log-probabilities of given tokens at given positions, one :class:`Scores` per batch, in order.

        As many batches as there are pipeline stages are under way at a time, so that no stage idles. A prefix is computed once for
        the batches behind one another that share it; every stage keeps its own keys and values of it.
        """
        under_way: deque[Message] = deque()
        held: tuple[int, ...] = ()
        self.reset()
        for batch in batches:
            if batch.prefix != held:
                held = batch.prefix
                self._hold(held)
            message = Message(
                Operation.FORWARD,
                batch.ids,
                behind_prefix=bool(held),
                output=Output.SCORES,
                wanted=batch.wanted,
                targets=batch.targets,
            )
            result = self._order(message)
            if isinstance(result, Scores):
                yield result
                continue
            under_way.append(message)
            if len(under_way) >= self._context.pp_size:
                yield self._fetch(under_way.popleft())
        while under_way:
            yield self._fetch(under_way.popleft())
        self.reset()

    def _hold(self, prefix: tuple[int, ...]) -> None:
        """Let the cache be the keys and values of ``prefix`` and nothing else."""
        self.reset()
        if prefix:
            self._order(Message(Operation.FORWARD, torch.tensor([prefix], dtype=torch.int64), use_cache=True, keep_last=1))

    def _fetch(self, message: Message) -> Scores:
        scores = self._collect(message)
        assert isinstance(scores, Scores)
        return scores

    def reorder(self, rows: torch.Tensor) -> None:
        """Let the cache's batch be its rows ``rows`` (beams); the identity costs nothing."""
        rows = rows.cpu().long()
        if not torch.equal(rows, torch.arange(self._cached_rows)):
            self._cached_rows = len(rows)
            self._order(Message(Operation.REORDER, rows=rows))

    def crop(self, length: int) -> None:
        """Forget cached positions from ``length`` on."""
        if length < self.cache_length:
            self._order(Message(Operation.CROP, value=length))

    def reset(self) -> None:
        """Forget the cache."""
        if self.cache_length:
            self._order(Message(Operation.RESET))

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that are loaded."""
        return self._executor.adapters

    def use_adapter(self, name: str | None) -> None:
        """Answer with this adapter from now on, or with the base alone; forgets the cache."""
        self._order(Message(Operation.ADAPTER, value=0 if name is None else 1 + self.adapters.index(name)))

    def stop(self, exit_code: int = 0) -> None:
        """Release the workers; they return ``exit_code``. Nothing after an order that broke off: see the module."""
        if not self._stopped and not self._broken:
            self._stopped = True
            try:
                send_message(Message(Operation.STOP, value=exit_code), self._replica)
            except RuntimeError as error:  # gloo: the other end of a connection is gone
                get_logger().warning(f"a worker has left already ({str(error).splitlines()[0]})")


def serve(stage: GPTStage, context: ParallelContext, channels: Channels, adapters: tuple[str, ...] = ()) -> int:
    """Worker side: follow the driver until it stops; returns the exit code it sent."""
    executor = Executor(stage, context, channels, adapters)
    while True:
        with other_ranks("the driver, or another worker,"):
            message = receive_message(channels.replica)
            if message.operation == Operation.STOP:
                return message.value
            executor.execute(message)
