"""Keeping experts evenly used: which losses a run has, their values, and how many tokens each expert gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mindspeed_lora.arguments.configs import TrainConfig
from mindspeed_lora.data.batches import StepBatch
from mindspeed_lora.errors import UsageError
from mindspeed_lora.model.balance import Balancer, BalanceTerms
from mindspeed_lora.model.stage import GPTStage
from mindspeed_lora.parallel.collectives import all_reduce
from mindspeed_lora.parallel.context import ParallelContext
from mindspeed_lora.weights.config import ModelConfig

_OF_A_ROW = "seq_aux_loss"
_WITH_SEQ_AUX = ("none", "group_limited_greedy")  # of a row with --seq-aux
_OF_A_MICRO_BATCH = (None, "aux_loss", "pai_megatron_aux_loss", "group_limited_greedy")


def balance_terms(config: TrainConfig, model: ModelConfig, lora: bool, notes: list[str]) -> BalanceTerms | None:
    """The losses and counts that the flags ask for, by the peer's meaning of them; None: nothing. ``lora``: an adapter is trained.

    Raises:
        UsageError: the model has no experts, or no biases to update.
    """
    flags, kind = config.balance, config.architecture.experts.balancing
    asked = [
        (flags.aux, f"--moe-aux-loss-coeff {flags.aux:g}"),
        (flags.by_row, "--seq-aux"),
        (flags.z, f"--moe-z-loss-coeff {flags.z:g}"),
        (flags.bias_rate, f"--moe-router-bias-update-rate {flags.bias_rate:g}"),
        (flags.log_layers, "--moe-per-layer-logging"),
    ]
    if model.experts is None:
        if passed := [text for value, text in asked if value]:
            raise UsageError(f"{' and '.join(passed)}: a {model.family} model has no experts; leave it out")
        return None
    if flags.bias_rate and (lora or not model.experts.router_bias):
        why = "an adapter's files do not hold it" if model.experts.router_bias else f"a {model.family} model's experts have no bias"
        raise UsageError(f"--moe-router-bias-update-rate {flags.bias_rate:g}: {why}; leave it out")
    by_row = kind == _OF_A_ROW or (flags.by_row and kind in _WITH_SEQ_AUX)
    aux = flags.aux if by_row or kind in _OF_A_MICRO_BATCH else 0.0
    if flags.aux and not aux:
        notes.append(
            f"--moe-aux-loss-coeff {flags.aux:g} has no effect with --moe-router-load-balancing-type {kind}"
            + ("" if kind != "none" else " without --seq-aux")
        )
    elif flags.by_row and not (aux and by_row):
        why = f"--moe-router-load-balancing-type {kind or 'aux_loss'}" if aux else "no load-balancing loss; --moe-aux-loss-coeff adds one"
        notes.append(f"--seq-aux has no effect with {why}")
    terms = BalanceTerms(aux, by_row, flags.z, flags.log_layers or flags.bias_rate > 0)
    return terms if terms.aux or terms.z or terms.counts else None


def token_shares(batch: StepBatch, dp_size: int, normalization: str) -> torch.Tensor:
    """float32 ``[rows of this rank, s]``: each token's share of the global batch, 0 for padding.

    "tokens": all tokens count alike; "micro-batch": all micro-batches do (see :func:`mindspeed_lora.training.objective.row_weights`).
    """
    real = torch.tensor(batch.row_real_tokens)
    mask = torch.arange(batch.input_ids.shape[1]) < real.unsqueeze(1)
    if normalization == "tokens":
        return mask / max(batch.num_real_tokens, 1)
    counts = real.view(-1, batch.micro_batch_size).sum(1)
    return mask / (counts.clamp(min=1) * len(counts) * dp_size).repeat_interleave(batch.micro_batch_size).unsqueeze(1)


@dataclass(frozen=True)
class LayerUse:
    """How a layer used its experts since the last line: ``busiest`` expert's tokens over the mean's; ``idle`` experts had none."""

    layer: int
    busiest: float
    idle: int
    losses: dict[str, float]

    def record(self) -> dict[str, float]:
        """For ``metrics.jsonl``."""
        return {"layer": self.layer, "busiest": self.busiest, "idle": self.idle, **self.losses}


class ExpertBalance:
    """The balancers of this rank's stages, and the sums over all ranks."""

    def __init__(self, terms: BalanceTerms, model: ModelConfig, stages: Sequence[GPTStage], context: ParallelContext) -> None:
        assert model.experts is not None
        self.terms, self.context = terms, context
        self.layers = [layer for layer in range(model.num_layers) if model.has_experts(layer)]
        self.balancers = []
        for stage in stages:
            stage.balancer = Balancer(
                terms, [layer for layer in stage.layer_range if model.has_experts(layer)], model.experts.count, context
            )
            self.balancers.append(stage.balancer)
        self._columns = [place for place, coefficient in enumerate((terms.aux, terms.z)) if coefficient]
        self.names = tuple(("load_balancing_loss", "z_loss")[place] for place in self._columns)
        self._stages = tuple(stages)
        self._losses = torch.zeros(len(self.layers), 2, dtype=torch.float32, device=context.device)
        self._counts = torch.zeros(len(self.layers), model.experts.count, dtype=torch.float32, device=context.device)
        self._step_counts = self._counts.clone()
        self._steps = 0

    def step_values(self, loss_scale: float) -> torch.Tensor:
        """float32 ``[names]``: this rank's share of the step's losses, means over the layers; the balancers start anew."""
        losses = self._gather("losses", 2) / loss_scale
        self._losses += losses
        self._steps += 1
        if self.terms.counts:
            self._step_counts = self._gather("counts", self._counts.shape[1])
            self._counts += self._step_counts
        return losses.sum(0)[self._columns] / len(self.layers)

    def _gather(self, field: str, width: int) -> torch.Tensor:
        """``[layers, width]``: what this rank's balancers hold, at their layers' places; they are set to zero."""
        whole = torch.zeros(len(self.layers), width, dtype=torch.float32, device=self.context.device)
        for balancer in self.balancers:
            values: torch.Tensor = getattr(balancer, field)
            whole[[self.layers.index(layer) for layer in balancer.index]] = values
            values.zero_()
        return whole

    @torch.no_grad()
    def update_biases(self, rate: float) -> None:
        """``b_i += rate * sign(mean tokens - tokens_i)`` over the step's global batch, in every layer. Collective over TP and DP."""
        counts = self._step_counts
        for group in (self.context.tp_group, self.context.dp_group):
            all_reduce(counts, group)
        change = rate * (counts.mean(1, keepdim=True) - counts).sign()
        for stage in self._stages:
            for number, router in stage.routers():
                if router.expert_bias is not None:
                    router.expert_bias.add_(change[self.layers.index(number)])

    def use_of_layers(self) -> tuple[LayerUse, ...]:
        """Since the last call, over all ranks; nothing where it was not asked for. Collective, once a line."""
        if not self.terms.counts:
            return ()
        num_experts = self._counts.shape[1]
        table = torch.cat((self._counts, self._losses / max(self._steps, 1)), dim=1)
        self._losses.zero_()
        self._counts.zero_()
        self._steps = 0
        for group in (self.context.model_group, self.context.dp_group):
            all_reduce(table, group)
        counts, losses = table.split((num_experts, 2), dim=1)
        busiest = counts.amax(1) / counts.mean(1).clamp_min(torch.finfo(torch.float32).tiny)
        idle = (counts == 0).sum(1)
        return tuple(
            LayerUse(layer, share, empty, dict(zip(self.names, row, strict=True)))
            for layer, share, empty, row in zip(
                self.layers, busiest.tolist(), idle.tolist(), losses[:, self._columns].tolist(), strict=True
            )
        )
