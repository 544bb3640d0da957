"""What the driver tells the workers: one fixed header, and a body where it does not fit in the header.

```
header int64 [HEADER_SIZE] = operation, batch, length, flags, num_wanted, num_targets, value, body size | body if it fits
body   int64               = ids [b, s] | real [b, s] if padded | wanted [b, k] if scores | targets [b, k, c] if scores
```

A generated token costs one broadcast. Positions and masks are not sent: every rank derives them from ``real``.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch

from mindspeed_lora.parallel.collectives import Group, broadcast

HEADER_SIZE = 128
_FIELDS = 8


class Operation(IntEnum):
    """The first number of a header."""

    FORWARD = 1
    REORDER = 2
    CROP = 3
    RESET = 4
    STOP = 5
    ADAPTER = 6


class Output(IntEnum):
    """What a forward pass sends to the driver."""

    NONE = 0
    LOGITS = 1
    SCORES = 2


@dataclass(frozen=True)
class Message:
    """One order. CPU tensors.

    ``ids`` int64 ``[b, s]``; ``real`` bool ``[b, s]``, False on padding, None where nothing is padded; ``use_cache``: behind what
    the cache holds, and kept in it; ``keep_last``: logits of that many last positions (0: of all); ``wanted`` int64 ``[b, k]``:
    positions to score; ``targets`` int64 ``[b, k, c]``: tokens whose log-probability is asked for at each of them; ``rows`` int64
    ``[b]`` (REORDER); ``value``: length (CROP), exit code (STOP), number of the adapter from 1, or 0 for none (ADAPTER);
    ``behind_prefix``: each row behind the one row that the cache holds, and not kept.
    """

    operation: Operation
    ids: torch.Tensor | None = None
    real: torch.Tensor | None = None
    use_cache: bool = False
    output: Output = Output.NONE
    keep_last: int = 0
    wanted: torch.Tensor | None = None
    targets: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    value: int = 0
    behind_prefix: bool = False


def encode(message: Message) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Header, and the body where it is longer than the header's room."""
    tensors = (message.ids, message.real, message.wanted, message.targets, message.rows)
    parts = [tensor.reshape(-1).to(torch.int64) for tensor in tensors if tensor is not None]
    body = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
    batch, length = message.ids.shape if message.ids is not None else (0 if message.rows is None else len(message.rows), 0)
    flags = message.use_cache | (message.real is not None) << 1 | message.behind_prefix << 2 | message.output << 3
    num_wanted = message.keep_last if message.wanted is None else message.wanted.shape[1]
    num_targets = 0 if message.targets is None else message.targets.shape[2]
    header = torch.zeros(HEADER_SIZE, dtype=torch.int64)
    fields = (message.operation, batch, length, flags, num_wanted, num_targets, message.value, body.numel())
    header[:_FIELDS] = torch.tensor(fields, dtype=torch.int64)
    if body.numel() <= HEADER_SIZE - _FIELDS:
        header[_FIELDS : _FIELDS + body.numel()] = body
        return header, None
    return header, body


def decode(header: torch.Tensor, body: torch.Tensor | None) -> Message:
    """The inverse of :func:`encode`."""
    operation, batch, length, flags, num_wanted, num_targets, value, size = header[:_FIELDS].tolist()
    rest = header[_FIELDS : _FIELDS + size] if body is None else body
    if operation == Operation.REORDER:
        return Message(Operation.REORDER, rows=rest)
    if operation != Operation.FORWARD:
        return Message(Operation(operation), value=value)
    output, padded = Output(flags >> 3), bool(flags & 2)
    shapes: list[tuple[int, ...]] = [(batch, length)] * (2 if padded else 1)
    if output == Output.SCORES:
        shapes += [(batch, num_wanted), (batch, num_wanted, num_targets)]
    parts = [part.view(shape) for part, shape in zip(rest.split([torch.Size(shape).numel() for shape in shapes]), shapes, strict=True)]
    wanted, targets = (parts[-2], parts[-1]) if output == Output.SCORES else (None, None)
    return Message(
        Operation.FORWARD,
        ids=parts[0],
        real=parts[1].bool() if padded else None,
        use_cache=bool(flags & 1),
        behind_prefix=bool(flags & 4),
        output=output,
        keep_last=0 if output == Output.SCORES else num_wanted,
        wanted=wanted,
        targets=targets,
    )


def send_message(message: Message, replica: Group) -> None:
    """Driver: give ``message`` to the workers of the replica."""
    if replica is None:
        return
    header, body = encode(message)
    broadcast(header, 0, replica)
    if body is not None:
        broadcast(body, 0, replica)


def receive_message(replica: Group) -> Message:
    """Worker: wait for the driver's next message."""
    header = broadcast(torch.zeros(HEADER_SIZE, dtype=torch.int64), 0, replica)
    size = int(header[_FIELDS - 1])
    body = None
    if size > HEADER_SIZE - _FIELDS:
        body = broadcast(torch.empty(size, dtype=torch.int64), 0, replica)
    return decode(header, body)
