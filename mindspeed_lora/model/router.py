"""Which experts a token goes to, and with what weight: scores in fp32 from the router's logits, then the family's choice."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from mindspeed_lora.model.balance import LayerBalance
from mindspeed_lora.parallel.context import ParallelContext
from mindspeed_lora.weights.config import ExpertShape, ModelConfig, Routing


def choose_experts(scores: torch.Tensor, bias: torch.Tensor | None, routing: Routing) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights float32 ``[n, k]`` and numbers int64 ``[n, k]`` of each token's experts.

    Args:
        scores: float32 ``[n, E]``, softmax or sigmoid of the router's logits.
        bias: ``[E]``, added for the choice only (DeepSeek V3's load balancing), or None.
    """
    choice = scores.detach() if bias is None else scores.detach() + bias
    if routing.groups > 1:
        by_group = choice.view(len(choice), routing.groups, -1)
        group_scores = by_group.amax(-1) if routing.group_score == "max" else by_group.topk(2, dim=-1).values.sum(-1)
        best = group_scores.topk(routing.top_groups, dim=-1).indices
        inside = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(1, best, True)
        choice = by_group.masked_fill(~inside.unsqueeze(-1), float("-inf")).view_as(choice)
    experts = choice.topk(routing.top_k, dim=-1).indices
    weights = scores.gather(1, experts)
    if routing.normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * routing.scale, experts


class Router(nn.Module):
    """Scores in fp32, whatever the weights' dtype; ``weight`` ``[E, h]``."""

    def __init__(self, config: ModelConfig, shape: ExpertShape, context: ParallelContext, dtype: torch.dtype) -> None:
        super().__init__()
        self.routing = shape.routing
        self.weight = nn.Parameter(torch.empty(shape.count, config.hidden_size, dtype=dtype, device=context.device))
        bias = torch.empty(shape.count, dtype=torch.float32, device=context.device) if shape.router_bias else None
        self.expert_bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, tokens: torch.Tensor, balance: LayerBalance | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """tokens ``[n, h]`` -> weights float32 ``[n, k]``, experts int64 ``[n, k]``; ``balance`` adds losses to the backward pass."""
        logits = F.linear(tokens.float(), self.weight.float())
        scores = logits.softmax(-1) if self.routing.score == "softmax" else logits.sigmoid()
        weights, experts = choose_experts(scores, self.expert_bias, self.routing)
        return (weights if balance is None else balance.attach(weights, logits, scores, experts)), experts
