"""What a step minimises: the loss of single records, or of preference pairs against a reference model.

Both are a function of each row's sum of -log p, which the last pipeline stage returns, and of what is known of the row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from mindspeed_lora.data.batches import StepBatch
from mindspeed_lora.parallel.context import ParallelContext
from mindspeed_lora.training.preference import METRICS, PreferenceLoss
from mindspeed_lora.training.reference import Reference


@dataclass(frozen=True)
class RowInputs:
    """This rank's rows on the device.

    ids and labels int64 ``[rows, s]``, weights float32 ``[rows]``, targets ``[rows, ...]``; in micro-batches of ``micro_batch_size`` rows.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    targets: torch.Tensor
    micro_batch_size: int


class Objective(Protocol):
    """A loss that is a mean over the global batch, and values that are logged beside it."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the further values."""
        ...

    def count(self, batch: StepBatch) -> int:
        """What the mean is over; 0: nothing to train."""
        ...

    def inputs(self, batch: StepBatch, evaluating: bool = False) -> RowInputs:
        """The rows on the device, weighted such that their losses sum up to the mean. Collective over the replica."""
        ...

    def values(self, losses: torch.Tensor, inputs: RowInputs) -> torch.Tensor:
        """float32 ``[1 + len(metrics)]``: this replica's shares of the mean loss and the means of ``metrics``."""
        ...


def row_weights(batch: StepBatch, dp_size: int, normalization: str) -> torch.Tensor:
    """float32 ``[rows of this rank]``: the factor of each row's summed loss.

    "tokens": 1 / trained tokens of the global batch; "micro-batch": every micro-batch's mean counts alike, as the peer
    does (a micro-batch without a trained token counts 0).
    """
    rows = batch.input_ids.shape[0]
    if normalization == "tokens":
        return torch.full((rows,), 1.0 / max(batch.num_trained_tokens, 1), dtype=torch.float32)
    counts = torch.tensor(batch.micro_batch_trained_tokens, dtype=torch.float32)
    weights = torch.where(counts > 0, 1.0 / (counts.clamp(min=1) * len(counts) * dp_size), torch.zeros(()))
    return weights.repeat_interleave(batch.micro_batch_size)


@dataclass(frozen=True)
class RecordLoss:
    """Supervised fine-tuning: -log p of the trained tokens. ``normalization``: see :func:`row_weights`; evaluation takes "tokens"."""

    context: ParallelContext
    normalization: str = "tokens"
    metrics: tuple[str, ...] = ()

    def count(self, batch: StepBatch) -> int:
        """Trained tokens."""
        return batch.num_trained_tokens

    def inputs(self, batch: StepBatch, evaluating: bool = False) -> RowInputs:
        """See :class:`Objective`."""
        device = self.context.device
        weights = row_weights(batch, self.context.dp_size, "tokens" if evaluating else self.normalization).to(device)
        return RowInputs(batch.input_ids.to(device), batch.labels.to(device), weights, weights, batch.micro_batch_size)

    def values(self, losses: torch.Tensor, inputs: RowInputs) -> torch.Tensor:
        """See :class:`Objective`."""
        return losses.sum().unsqueeze(0)


@dataclass(frozen=True)
class PairLoss:
    """Preference pairs; ``reference`` None: the loss needs none."""

    context: ParallelContext
    loss: PreferenceLoss
    reference: Reference | None
    metrics: tuple[str, ...] = METRICS

    def count(self, batch: StepBatch) -> int:
        """Pairs that can be trained."""
        return batch.num_pairs

    def inputs(self, batch: StepBatch, evaluating: bool = False) -> RowInputs:
        """The reference's pass over all rows comes first; every row has weight 1, and the pairs' weights are in the targets."""
        device = self.context.device
        ids, labels = batch.input_ids.to(device), batch.labels.to(device)
        ones = torch.ones(ids.shape[0], dtype=torch.float32, device=device)
        known = torch.zeros_like(ones)
        if self.reference is not None:
            known = self.reference.row_losses(ids, labels, ones, batch.micro_batch_size, batch.columns)
        tokens = torch.tensor(batch.row_trained_tokens, dtype=torch.float32, device=device)
        targets = torch.stack([known, tokens, ones / max(batch.num_pairs, 1)], dim=1)
        return RowInputs(ids, labels, ones, targets, batch.micro_batch_size)

    def values(self, losses: torch.Tensor, inputs: RowInputs) -> torch.Tensor:
        """See :class:`Objective`."""
        size = inputs.micro_batch_size
        shares = [self.loss.values(*pair) for pair in zip(losses.split(size), inputs.targets.split(size), strict=True)]
        return torch.stack(shares).sum(0)
