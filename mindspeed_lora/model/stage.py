"""A pipeline stage's part of the model: some layers, with the embedding in the first and the loss head in the last.

```
ids [b, s] -> embedding -> layers ... | hidden [s, b, h] | ... layers -> final norm -> -log p of the labels [b]
```

Parameters carry Megatron's names with *global* layer numbers (``decoder.layers.7.mlp.linear_fc1.weight``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mindspeed_lora import ops
from mindspeed_lora.arguments.configs import RecomputeFlags
from mindspeed_lora.errors import UsageError
from mindspeed_lora.model import one_row
from mindspeed_lora.model.balance import Balancer, MicroBatch
from mindspeed_lora.model.decode import Attend, DecodeState, PackedDocuments
from mindspeed_lora.model.experts import MixtureOfExperts
from mindspeed_lora.model.layers import TransformerLayer
from mindspeed_lora.model.norm import RMSNorm
from mindspeed_lora.model.rotary import RotaryTables, inverse_frequencies, rotary_scale, rotary_tables
from mindspeed_lora.model.router import Router
from mindspeed_lora.parallel.collectives import all_gather_dim0
from mindspeed_lora.parallel.context import ParallelContext
from mindspeed_lora.parallel.cross_entropy import linear_cross_entropy
from mindspeed_lora.parallel.layers import ColumnParallelLinear, VocabParallelEmbedding, enter_column
from mindspeed_lora.parallel.on_demand import BaseStorage
from mindspeed_lora.weights.config import ModelConfig, stage_layers

IGNORED_LABEL = -100


class Embedding(nn.Module):
    """Holds ``word_embeddings``, as Megatron nests it."""

    def __init__(self, config: ModelConfig, context: ParallelContext, dtype: torch.dtype) -> None:
        super().__init__()
        self.word_embeddings = VocabParallelEmbedding(config.padded_vocab_size, config.hidden_size, context, dtype)


class Decoder(nn.Module):
    """The layers, keyed by global number, and the final norm on the last stage."""

    def __init__(
        self,
        config: ModelConfig,
        layers: range,
        is_last: bool,
        context: ParallelContext,
        dtype: torch.dtype,
        recompute: RecomputeFlags,
        storage: BaseStorage | None,
    ) -> None:
        super().__init__()
        if storage is not None and storage.sharded and config.experts is not None:
            raise UsageError(
                "--fsdp-base does not cut experts over data parallelism; use --expert-model-parallel-size, or --qlora without --fsdp-base"
            )
        self.context, self.storage = context, storage
        core = recompute.granularity == "selective"
        self.layers = nn.ModuleDict()
        for number in layers:
            self.layers[str(number)] = layer = TransformerLayer(config, number, context, dtype, core)
            if storage is not None:  # before the next layer is made: whole, the base may not fit
                storage.take(layer, layer.linear_weights())
        if is_last:
            self.final_layernorm = RMSNorm(config.hidden_size, config, context, dtype)
        self._recompute_groups = _recompute_groups(len(layers), recompute)

    def forward(self, hidden: torch.Tensor, rotary: RotaryTables, attend: Attend, balance: MicroBatch | None = None) -> torch.Tensor:
        """``[s, b, h]`` (SP: ``[s/t, b, h]``) -> the same, before the final norm."""
        layers = list(self.layers.values())
        if self.storage is None and isinstance(attend, DecodeState) and one_row.applies(hidden, attend):
            return one_row.run(layers, hidden, rotary, attend, self.context)

        def run(start: int, end: int, hidden: torch.Tensor) -> torch.Tensor:
            for layer in layers[start:end]:
                hidden = layer(hidden, rotary, attend, balance)
            return hidden

        for start, end, recomputed in self._recompute_groups:
            if recomputed and torch.is_grad_enabled():
                hidden = checkpoint(run, start, end, hidden, use_reentrant=False)
            else:
                hidden = run(start, end, hidden)
        return hidden


def _recompute_groups(num_layers: int, recompute: RecomputeFlags) -> list[tuple[int, int, bool]]:
    """(start, end, recomputed) over a stage's layers: ``block`` takes the first n one by one, ``uniform`` groups of n."""
    if recompute.granularity != "full":
        return [(0, num_layers, False)]
    size = recompute.num_layers or (num_layers if recompute.method == "block" else 1)
    if recompute.method == "block":
        count = min(size, num_layers)
        return [(layer, layer + 1, True) for layer in range(count)] + [(count, num_layers, False)]
    return [(start, min(start + size, num_layers), True) for start in range(0, num_layers, size)]


class GPTStage(nn.Module):
    """The layers ``layers`` (global numbers) and what belongs to the first and the last stage."""

    def __init__(
        self,
        config: ModelConfig,
        layers: range,
        is_first: bool,
        is_last: bool,
        context: ParallelContext,
        dtype: torch.dtype,
        recompute: RecomputeFlags | None = None,
        storage: BaseStorage | None = None,
    ) -> None:
        super().__init__()
        self.model_config = config  # not "config": peft before 0.18 takes that for a dictionary of transformers'
        self.context, self.dtype, self.storage = context, dtype, storage
        self.layer_range, self.is_first, self.is_last = layers, is_first, is_last
        if is_first:
            self.embedding = Embedding(config, context, dtype)
        self.decoder = Decoder(config, layers, is_last, context, dtype, recompute or RecomputeFlags(), storage)
        if is_last and not (is_first and config.tied_embeddings):
            self.output_layer = ColumnParallelLinear(config.hidden_size, config.padded_vocab_size, context, dtype=dtype)
        self.balancer: Balancer | None = None  # set where the training asks for it
        self.inverse_frequencies, self.rotary_scale = inverse_frequencies(config).to(context.device), rotary_scale(config)

    @property
    def experts(self) -> range:
        """Global numbers of the routed experts whose weights lie here, in the order of their stacks; empty for a dense model."""
        return self.context.own_experts(self.model_config.experts.count if self.model_config.experts else 0)

    def routers(self) -> Iterator[tuple[int, Router]]:
        """Of the layers with experts, by global number."""
        for number, layer in self.decoder.layers.items():
            mixture = getattr(layer, "mlp", None)
            if isinstance(mixture, MixtureOfExperts):
                yield int(number), mixture.router

    @property
    def head_weight(self) -> torch.Tensor:
        """``[v/t, h]``: the embedding itself where it is tied and on this stage, else the last stage's own copy."""
        return self.embedding.word_embeddings.weight if self.is_first and self.model_config.tied_embeddings else self.output_layer.weight

    def hidden_shape(self, batch: int, length: int) -> tuple[int, int, int]:
        """Shape of what stages pass on: ``[s, b, h]``, or ``[s/t, b, h]`` with sequence parallelism."""
        return (length // (self.context.tp_size if self.context.sequence_parallel else 1), batch, self.model_config.hidden_size)

    def forward(
        self,
        x: torch.Tensor,
        labels: torch.Tensor | None = None,
        row_weights: torch.Tensor | None = None,
        decode: DecodeState | None = None,
        document_ends: torch.Tensor | None = None,
        token_shares: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run this stage.

        Args:
            x: ids int64 ``[b, s]`` on the first stage, else hidden ``[s, b, h]`` (SP: ``[s/t, b, h]``).
            labels: int64 ``[b, s]``, the target of each position, -100 = not trained; used on the last stage.
            row_weights: float32 ``[b]``, factor of each row's loss (default 1).
            decode: set when generating.
            document_ends: int32 CPU ``[b, documents]``, cumulative ends of each row's documents, the last one s (repeated where
                a row has fewer); None: each row is one document.
            token_shares: float32 ``[b, s]``, what the ``balancer`` needs; None: it has nothing to do.

        Returns:
            Hidden of the shape above; on the last stage float32 ``[b]``, each row's weighted sum of -log p, or without
            labels the logits of this rank's vocabulary slice ``[b, s, v/t]`` (``[b, k, v/t]`` where ``decode.wanted`` is set).
        """
        if decode is not None:
            positions = decode.positions
        else:
            whole = self.context.tp_size if self.context.sequence_parallel else 1
            length = x.shape[1] if self.is_first else x.shape[0] * whole
            positions = torch.arange(length, device=x.device).unsqueeze(0)
        hidden = self.embedding.word_embeddings(x) if self.is_first else x
        rotary = rotary_tables(self.inverse_frequencies, positions, hidden.dtype, self.rotary_scale)
        attend = decode if document_ends is None else PackedDocuments(document_ends.tolist())
        balance = None if token_shares is None or self.balancer is None else self.balancer.micro_batch(token_shares)
        hidden = self.decoder(hidden, rotary, attend, balance)
        if decode is not None and decode.cache is not None:
            decode.cache.advance(positions.shape[1])
        if not self.is_last:
            return hidden
        if decode is not None and decode.wanted is not None:
            index = decode.wanted.transpose(0, 1).unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
            hidden = hidden.gather(0, index)
        hidden = self.decoder.final_layernorm(hidden)
        if labels is None:
            return self._logits(hidden)
        return self._row_losses(hidden, labels, row_weights)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return ops.linear(enter_column(hidden, self.context), self.head_weight).transpose(0, 1)

    def _row_losses(self, hidden: torch.Tensor, labels: torch.Tensor, row_weights: torch.Tensor | None) -> torch.Tensor:
        hidden = enter_column(hidden, self.context)
        trained = labels.transpose(0, 1) != IGNORED_LABEL
        rows = torch.arange(labels.shape[0], device=labels.device).expand_as(trained)[trained]
        losses = linear_cross_entropy(
            hidden[trained], self.head_weight, labels.transpose(0, 1)[trained], self.model_config.vocab_size, self.context
        )
        if row_weights is not None:
            losses = losses * row_weights[rows]
        return torch.zeros(labels.shape[0], dtype=torch.float32, device=labels.device).index_add(0, rows, losses)

    def gather_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """``[b, s, v/t]`` -> ``[b, s, vocab_size]`` on every tp rank, padding columns left out."""
        if self.context.tp_group is not None:
            logits = all_gather_dim0(logits.movedim(-1, 0), self.context.tp_group).movedim(0, -1)
        return logits[..., : self.model_config.vocab_size]


def build_stage_modules(
    config: ModelConfig,
    context: ParallelContext,
    dtype: torch.dtype,
    layers_per_virtual_stage: int | None = None,
    recompute: RecomputeFlags | None = None,
    make_storage: Callable[[], BaseStorage] | None = None,
) -> list[GPTStage]:
    """This rank's chunks of the model, in order (one without virtual stages); values are uninitialised until loaded.

    ``make_storage``: makes what holds a stage's frozen linear weights on demand; None: they are plain parameters.
    """
    chunks = stage_layers(config.num_layers, context.pp_size, layers_per_virtual_stage)[context.pp_rank]
    stages = []
    for index, layers in enumerate(chunks):
        is_first = context.is_first_stage and index == 0
        is_last = context.is_last_stage and index == len(chunks) - 1
        storage = make_storage() if make_storage is not None else None
        stages.append(GPTStage(config, layers, is_first, is_last, context, dtype, recompute, storage))
    return stages
