"""Preference losses written from their formulas on transformers' logits; no code of ours is used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

Pair = tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]  # (ids, labels) of chosen and rejected


def answer_log_probability(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Sum of log p over the labelled tokens of one row, and their number."""
    logits = model(input_ids=ids[None]).logits[0, :-1].float()
    targets = labels[1:]
    kept = targets != -100
    chosen = logits.log_softmax(-1)[kept].gather(1, targets[kept][:, None])
    return chosen.sum(), int(kept.sum())


def pair_loss(kind: str, beta: float, smoothing: float, gamma: float, policy: Sequence[Any], reference: Sequence[Any]) -> torch.Tensor:
    """The loss of one pair; ``policy`` and ``reference``: (sum, tokens) of chosen and rejected."""
    (pc, nc), (pr, nr) = policy
    (rc, _), (rr, _) = reference
    ratio = (pc - rc) - (pr - rr)
    if kind == "sigmoid":
        probability = torch.sigmoid(beta * ratio)
        return -(1 - smoothing) * probability.log() - smoothing * (1 - probability).log()
    if kind == "hinge":
        return torch.clamp(1 - beta * ratio, min=0)
    if kind == "ipo":
        return ((pc - rc) / nc - (pr - rr) / nr - 0.5 / beta) ** 2
    if kind == "simpo":
        return -torch.sigmoid(beta * (pc / nc - pr / nr) - gamma).log()
    assert kind == "orpo"
    likely, unlikely = (pc / nc).exp(), (pr / nr).exp()
    return -pc / nc - beta * torch.sigmoid((likely / (1 - likely) / (unlikely / (1 - unlikely))).log()).log()


def batch_loss(
    kind: str, pairs: Sequence[Pair], policy: Any, reference: Any, beta: float, **more: float
) -> tuple[torch.Tensor, list[float]]:
    """Mean over the pairs (with ``ftx`` times the chosen answers' mean -log p), and each pair's margin of rewards."""
    losses, margins = [], []
    for pair in pairs:
        own = [answer_log_probability(policy, *side) for side in pair]
        with torch.no_grad(), reference as model:
            known = [answer_log_probability(model, *side) for side in pair]
        loss = pair_loss(kind, beta, more.get("smoothing", 0.0), more.get("gamma", 0.5), own, known)
        losses.append(loss - more.get("ftx", 0.0) * own[0][0] / own[0][1])
        margins.append(beta * float(own[0][0] - known[0][0] - own[1][0] + known[1][0]))
    return torch.stack(losses).mean(), margins
