"""One rank's part of a pass through the parallel model: its stage, its keys and values, and its place in the pipeline.

```
driver = first stage, tp 0                  last stage
ids -> embedding, layers -> hidden [s, b, h] -> layers, head -> logits (device, to the driver) | scores (CPU, to the driver)
```
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mindspeed_lora.inference.channel import Channels
from mindspeed_lora.inference.protocol import Message, Operation, Output
from mindspeed_lora.lora.inject import select_adapter
from mindspeed_lora.model.decode import DecodeState, KVCache, SharedPrefix
from mindspeed_lora.model.stage import GPTStage
from mindspeed_lora.parallel.collectives import Pending, receive, send, send_later
from mindspeed_lora.parallel.context import ParallelContext


@dataclass(frozen=True)
class Scores:
    """``log_probs`` float64 ``[b, k, c]`` of the targets and ``best`` int64 ``[b, k]``, the most likely token, on the CPU."""

    log_probs: torch.Tensor
    best: torch.Tensor


def positions_and_mask(real: torch.Tensor | None, batch: int, past: int, length: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Positions ``[b or 1, s]`` of the new tokens, and which of all ``past + length`` positions each may attend to.

    ``real`` bool ``[b, past + length]`` is False on padding, None without any. A padding token attends to itself, so that
    no row of the softmax is empty. The mask ``[b or 1, 1, s, past + s]`` is None where plain causality says it all.
    """
    total = past + length
    if real is None:
        positions = torch.arange(past, total).unsqueeze(0)
        if past == 0 or length == 1:
            return positions, None
        return positions, torch.ones(length, total, dtype=torch.bool).tril(past)[None, None]
    positions = (real.long().cumsum(-1) - 1).clamp(min=0)[:, past:]
    causal = torch.ones(length, total, dtype=torch.bool).tril(past)
    own = torch.eye(total, dtype=torch.bool)[past:]
    return positions, (causal & real[:, None, :] | own).unsqueeze(1)


class Executor:
    """Carries out messages; the same code on the driver and on every worker.

    ``adapters``: the model's, in the order that messages count them in; a stage may hold none of some.
    """

    def __init__(self, stage: GPTStage, context: ParallelContext, channels: Channels, adapters: tuple[str, ...] = ()) -> None:
        self.stage, self.context, self.channels, self.adapters = stage, context, channels, adapters
        self.cache = KVCache()
        self._real: torch.Tensor | None = None  # bool [b, cached], CPU; None: nothing in the cache is padding
        self._pending: Pending | None = None

    @torch.inference_mode()
    def execute(self, message: Message) -> torch.Tensor | Scores | None:
        """Do what ``message`` says.

        Returns:
            Float32 logits ``[b, k, v]`` on the device or :class:`Scores`, where this rank is the driver *and* the last stage;
            else None (the driver of a pipeline fetches them by :meth:`collect`).
        """
        if message.operation == Operation.FORWARD:
            return self._forward(message)
        if message.operation == Operation.REORDER:
            assert message.rows is not None
            self.cache.reorder(message.rows)
            self._real = None if self._real is None else self._real[message.rows]
        elif message.operation == Operation.CROP:
            self.cache.crop(message.value)
            self._real = None if self._real is None else self._real[:, : message.value]
        elif message.operation in (Operation.RESET, Operation.ADAPTER):
            self.cache.reset()  # with the adapter also what is kept of its weights, however many positions there are
            self._real = None
            if message.operation == Operation.ADAPTER:
                select_adapter(self.stage, (None, *self.adapters)[message.value])
        return None

    def _decode_state(self, message: Message) -> DecodeState:
        assert message.ids is not None
        batch, length = message.ids.shape
        past = self.cache.length if message.use_cache or message.behind_prefix else 0
        real = message.real
        if message.use_cache and (real is not None or self._real is not None):
            new = torch.ones(batch, length, dtype=torch.bool) if real is None else real
            old = torch.ones(batch, past, dtype=torch.bool) if self._real is None else self._real
            self._real = real = torch.cat((old, new), dim=1)
        positions, mask = positions_and_mask(real, batch, past, length)
        wanted = message.wanted
        if message.output != Output.SCORES and 0 < message.keep_last < length:
            wanted = torch.arange(length - message.keep_last, length).expand(batch, -1)
        device = self.context.device
        return DecodeState(
            positions=positions.to(device),
            mask=None if mask is None else mask.to(device),
            cache=self.cache if message.use_cache else SharedPrefix(self.cache) if message.behind_prefix else None,
            wanted=None if wanted is None else wanted.to(device),
        )

    def _forward(self, message: Message) -> torch.Tensor | Scores | None:
        assert message.ids is not None
        context, device = self.context, self.context.device
        batch, length = message.ids.shape
        state = self._decode_state(message)
        if context.is_first_stage:
            x = message.ids.to(device)
        else:
            assert context.pp_group is not None
            x = torch.empty(self.stage.hidden_shape(batch, length), dtype=self.stage.dtype, device=device)
            receive(x, context.pp_rank - 1, context.pp_group)
        x = self.stage(x, decode=state)
        if not context.is_last_stage:
            assert context.pp_group is not None
            send(x, context.pp_rank + 1, context.pp_group)
            return None
        if message.output == Output.NONE:
            return None
        logits = self.stage.gather_logits(x).float().contiguous()
        result = logits if message.output == Output.LOGITS else score(logits, message.targets)
        if context.pp_rank == 0:
            return result if context.speaks else None
        if context.speaks:
            self._send_to_driver(result)
        return None

    def _send_to_driver(self, result: torch.Tensor | Scores) -> None:
        """Logits wait for the driver; scores do not, so that the driver can have several batches under way."""
        assert self.context.pp_group is not None and self.channels.replica is not None
        if isinstance(result, torch.Tensor):
            send(result, 0, self.context.pp_group)
            return
        if self._pending is not None:
            self._pending.wait()
        packed = torch.cat((result.log_probs, result.best.double().unsqueeze(-1)), dim=-1)
        self._pending = send_later(packed, 0, self.channels.replica)

    def collect(self, message: Message) -> torch.Tensor | Scores:
        """Driver of a pipeline: fetch the result of a forward pass that was ordered before."""
        assert message.ids is not None and self.context.pp_group is not None and self.channels.replica is not None
        last = self.context.pp_size - 1
        if message.output == Output.LOGITS:
            shape = (message.ids.shape[0], message.keep_last, self.stage.model_config.vocab_size)
            return receive(torch.empty(shape, device=self.context.device), last, self.context.pp_group)
        assert message.targets is not None
        batch, wanted, targets = message.targets.shape
        packed = torch.empty(batch, wanted, targets + 1, dtype=torch.float64)
        receive(packed, last * self.context.tp_size, self.channels.replica)
        return Scores(packed[..., :-1], packed[..., -1].long())


def score(logits: torch.Tensor, targets: torch.Tensor | None) -> Scores:
    """Log-probabilities of ``targets`` ``[b, k, c]`` under float32 ``logits`` ``[b, k, v]``: l - m - log sum exp(l - m), m the largest.

    Only the sum is rounded, at its own size. ``log_softmax`` adds up a long vocabulary less exactly (2e-5 off at 152,000) and more slowly.
    """
    assert targets is not None
    largest, best = logits.max(dim=-1, keepdim=True)
    log_sum = (logits - largest).exp_().sum(dim=-1, keepdim=True).log()
    chosen, largest, log_sum = (x.cpu().double() for x in (logits.gather(-1, targets.to(logits.device)), largest, log_sum))
    return Scores(chosen - largest - log_sum, best.squeeze(-1).cpu())
