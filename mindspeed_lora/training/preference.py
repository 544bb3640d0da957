"""Losses over preference pairs, from each answer's log-probability under the policy and a frozen reference.

With c, r the sums of log p over the tokens of the chosen and the rejected answer, less the reference's; c', r' the same per
token; m the policy's own mean log p per token; b beta, e label smoothing, g gamma, s the sigmoid:

| --dpo-loss-type | loss of a pair                                           | source                           |
|-----------------|----------------------------------------------------------|----------------------------------|
| sigmoid         | -(1 - e) log s(b (c - r)) - e log s(-b (c - r))          | Rafailov 2023; e: Mitchell 2023  |
| hinge           | max(0, 1 - b (c - r))                                    | Zhao 2023 (SLiC), Liu 2023 (RSO) |
| ipo             | (c' - r' - 1 / (2 b))^2                                  | Azar 2023, by tokens as TRL does |
| simpo           | as sigmoid, of b (m_c - m_r) - g                         | Meng 2024                        |
| orpo            | -m_c - b log s(o_c - o_r), o = m - log(1 - exp m)        | Hong 2024                        |

and ``--pref-ftx`` times -m_c. Rewards are b times what the loss compares: c, r (sigmoid, hinge), c', r' (ipo), m (simpo, orpo).
The loss of a step is the mean over the pairs of the global batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid

from mindspeed_lora.arguments.configs import PreferenceFlags

METRICS = ("rewards/accuracies", "rewards/chosen", "rewards/rejected", "rewards/margins")
"""Means over the pairs that are logged beside the loss."""

_PER_TOKEN = ("ipo", "simpo", "orpo")  # losses over means, not sums


@dataclass(frozen=True)
class PreferenceLoss:
    """The loss of a micro-batch of n pairs, for :class:`mindspeed_lora.parallel.pipeline.PipelineRunner`.

    Rows: the n chosen answers, then the n rejected ones. ``losses`` float32 ``[2n]``: their sums of -log p under the policy.
    ``targets`` float32 ``[2n, 3]``: the reference's sums of -log p (0 without one), the numbers of trained tokens (0: the pair
    does not count), and the pair's weight (1 / pairs of the global batch).
    """

    flags: PreferenceFlags

    def __call__(self, losses: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Weighted sum of the pairs' losses."""
        scores, means, weights = self._scores(losses, targets)
        return (self._pair_losses(scores, means) * weights).sum() + 0.0 * losses.sum()  # a gradient even where no pair counts

    def values(self, losses: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """float32 ``[1 + len(METRICS)]``: weighted sums of the loss and of METRICS over the pairs."""
        scores, means, weights = self._scores(losses, targets)
        rewards = self.flags.beta * scores
        accurate = (rewards[0] > rewards[1]).float()
        rows = torch.stack([self._pair_losses(scores, means), accurate, rewards[0], rewards[1], rewards[0] - rewards[1]])
        return (rows * weights).sum(1)

    def _scores(self, losses: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the loss compares and the policy's mean log p, both float32 ``[2, pairs]`` (chosen, rejected); weights ``[pairs]``."""
        policy = -losses.view(2, -1)
        reference, tokens, weights = targets.view(2, -1, 3).unbind(2)
        counts = tokens.amin(0) > 0
        policy, reference, tokens, weights = policy[:, counts], -reference[:, counts], tokens[:, counts], weights[0, counts]
        means = policy / tokens
        scores = policy - reference
        return scores / tokens if self.flags.loss_type in _PER_TOKEN else scores, means, weights

    def _pair_losses(self, scores: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
        flags, margin = self.flags, scores[0] - scores[1]
        if flags.loss_type == "hinge":
            losses = torch.relu(1 - flags.beta * margin)
        elif flags.loss_type == "ipo":
            losses = (margin - 1 / (2 * flags.beta)) ** 2
        elif flags.loss_type == "orpo":
            odds = means - torch.log1p(-torch.exp(means))
            losses = -means[0] - flags.beta * logsigmoid(odds[0] - odds[1])
        else:
            logits = flags.beta * margin - (flags.simpo_gamma if flags.loss_type == "simpo" else 0.0)
            losses = -(1 - flags.label_smoothing) * logsigmoid(logits) - flags.label_smoothing * logsigmoid(-logits)
        return losses - flags.pref_ftx * means[0] if flags.pref_ftx else losses
