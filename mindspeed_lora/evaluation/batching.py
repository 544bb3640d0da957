"""How many rows go together: as many as ``--evaluation-batch-size`` says, else as many as are estimated to fit.

```
scoring b rows of s tokens behind a prefix of p, k positions scored:
    activations of one layer   b s (6h + (2 (n + 2g) d + 4f) / t)  x bytes
    one layer's keys, values   b (p + s) 2 g d / t                 x bytes (latents: b (p + s) (c + rope), on every rank)
    logits in fp32             b k v                               x 4 bytes, three times (logits, their exponentials, work space)
generating b rows up to s tokens:
    every layer's keys, values b s 2 g d / t x layers              x bytes, twice (storage grows by doubling)
```

Nothing is tried out: an out-of-memory of one rank would leave the others waiting.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mindspeed_lora.device import free_memory_bytes
from mindspeed_lora.parallel.context import ParallelContext
from mindspeed_lora.weights.config import ModelConfig

SHARE = 0.5  # of the free memory; the rest is for allocators and for what else runs there
MOST_TOKENS = {"cpu": 4096}  # of a batch: more is not faster
MOST_TOKENS_ELSEWHERE = 16384
MOST_ROWS = 64


@dataclass(frozen=True)
class Room:
    """Bytes that batches may take on a rank, and what they cost: per token (one layer), per cached token (one layer, all layers
    of the stage), per position with logits.
    """

    free: float
    token: float
    layer_cache: float
    stage_cache: float
    logits: float
    most_tokens: int

    def common(self, other: Room) -> Room:
        """What both ranks can do."""
        costs = {name: max(getattr(self, name), getattr(other, name)) for name in ("token", "layer_cache", "stage_cache", "logits")}
        return Room(free=min(self.free, other.free), most_tokens=min(self.most_tokens, other.most_tokens), **costs)


def measure_room(config: ModelConfig, num_layers: int, context: ParallelContext, dtype: torch.dtype, ranks_here: int) -> Room:
    """This rank's, with the weights loaded; ``ranks_here`` share the memory of a machine without accelerators."""
    t, size = context.tp_size, torch.tensor([], dtype=dtype).element_size()
    keys = config.num_query_groups * config.kv_channels  # with latent attention, those that the latents are expanded to
    heads = config.num_attention_heads * config.kv_channels
    token = 6 * config.hidden_size + (2 * (heads + 2 * keys) + 4 * config.ffn_per_token) / t
    cached = config.cached_per_token / (1 if config.latent else t) * size
    return Room(
        free=SHARE * free_memory_bytes(context.device) / (ranks_here if context.device.type == "cpu" else 1),
        token=token * size,
        layer_cache=cached,
        stage_cache=2 * cached * num_layers,
        logits=12.0 * config.padded_vocab_size,
        most_tokens=MOST_TOKENS.get(context.device.type, MOST_TOKENS_ELSEWHERE),
    )


@dataclass(frozen=True)
class BatchRule:
    """``rows`` as passed, or None: as many as ``room`` has place for, at least one."""

    rows: int | None
    room: Room

    def scoring(self, rows: int, prefix: int, behind: int, scored: int) -> bool:
        """Whether ``rows`` of ``behind`` tokens, ``scored`` of them asked for, may go together behind ``prefix`` tokens."""
        if self.rows is not None:
            return rows <= self.rows
        room = self.room
        cost = rows * (behind * room.token + (prefix + behind) * room.layer_cache + scored * room.logits) + prefix * room.stage_cache
        return rows == 1 or (rows <= MOST_ROWS and rows * behind <= room.most_tokens and cost <= room.free)

    def generating(self, rows: int, prompt: int, new: int) -> bool:
        """Whether ``rows`` prompts of that many tokens may be continued together."""
        if self.rows is not None:
            return rows <= self.rows
        room = self.room
        cost = rows * (prompt * room.token + (prompt + new) * room.stage_cache + room.logits)
        return rows == 1 or (rows <= MOST_ROWS and rows * prompt <= room.most_tokens and cost <= room.free)
