"""Flat gradients and AdamW against torch on one process: accumulation, reductions, norm, clipping, ZeRO-1, state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pool import ProcessPool, RankError
from torch import nn

from mindspeed_lora.arguments.configs import OptimizerFlags
from mindspeed_lora.parallel.context import ParallelContext, build_context, single_process_context
from mindspeed_lora.training import gradients as gradients_module
from mindspeed_lora.training.flat import FlatLayout, TrainedParameter
from mindspeed_lora.training.gradients import FlatGradients, norm_in_pieces
from mindspeed_lora.training.optimizer import STATE_NAMES, FlatAdamW

STEPS, ROWS, WIDTH = 4, 8, 6


def small_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(WIDTH, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3, bias=False)).to(dtype)


def rows(step: int) -> torch.Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(step))


def loss_of(model: nn.Module, part: torch.Tensor) -> torch.Tensor:
    dtype = next(model.parameters()).dtype
    return model(part.to(dtype)).float().square().sum() / ROWS


class Rig:
    """Model, layout, gradients and optimizer of one rank."""

    def __init__(self, context: ParallelContext, flags: OptimizerFlags, dtype: torch.dtype = torch.float32) -> None:
        self.model, self.context, self.flags = small_model(dtype), context, flags
        items = [TrainedParameter(name, parameter) for name, parameter in self.model.named_parameters()]
        sharded = flags.use_distributed_optimizer
        self.layout = FlatLayout(items, context, sharded)
        self.flat = self.layout.flatten_parameters()
        self.gradients = FlatGradients(self.layout, context, sharded)
        self.adam = FlatAdamW(self.layout, self.flat, self.gradients, flags, context)

    def step(self, step: int) -> float:
        mine = rows(step).chunk(self.context.dp_size)[self.context.dp_rank]
        self.gradients.zero()
        for micro_batch in mine.chunk(2):
            loss_of(self.model, micro_batch).backward()
        self.gradients.reduce()
        norm = self.gradients.norm()
        self.gradients.clip(norm, self.flags.clip_grad)
        self.adam.step(self.flags.lr)
        return norm


def reference(flags: OptimizerFlags, steps: int = STEPS) -> tuple[list[float], dict[str, torch.Tensor]]:
    model = small_model()
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() == 1]
    adam = torch.optim.AdamW(
        [{"params": decay, "weight_decay": flags.weight_decay}, {"params": rest, "weight_decay": 0.0}],
        lr=flags.lr,
        betas=(flags.adam_beta1, flags.adam_beta2),
        eps=flags.adam_eps,
    )
    norms = []
    for step in range(steps):
        adam.zero_grad()
        loss_of(model, rows(step)).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), flags.clip_grad or float("inf"))))
        adam.step()
    return norms, {name: p.detach().clone() for name, p in model.named_parameters()}


def run_rig(flags: OptimizerFlags, steps: int = STEPS) -> tuple[list[float], dict[str, torch.Tensor]]:
    rig = Rig(build_context(torch.device("cpu")), flags)
    norms = [rig.step(step) for step in range(steps)]
    return norms, {name: p.detach().clone() for name, p in rig.model.named_parameters()}


def assert_same(one: tuple[list[float], dict[str, torch.Tensor]], other: tuple[list[float], dict[str, torch.Tensor]]) -> None:
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    for name, value in one[1].items():
        torch.testing.assert_close(value, other[1][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("sharded", [False, True])
def test_equals_torch_on_one_process(pool: ProcessPool, world_size: int, sharded: bool, clip: float) -> None:
    flags = OptimizerFlags(lr=1e-2, weight_decay=0.3, clip_grad=clip, use_distributed_optimizer=sharded)
    expected = reference(flags)
    for result in pool.run(run_rig, world_size, flags):
        assert_same(result, expected)


def tensor_parallel_norm(partial: bool) -> tuple[float, list[float]]:
    context = build_context(torch.device("cpu"), tensor_parallel_size=2)
    cut, whole = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(3))
    items = [TrainedParameter("cut", cut, cut=True), TrainedParameter("whole", whole, partial=partial)]
    layout = FlatLayout(items, context, False)
    layout.flatten_parameters()
    gradients = FlatGradients(layout, context, False)
    ((cut * (1.0 + context.tp_rank)).sum() + (whole * 2.0).sum()).backward()
    gradients.reduce()
    return gradients.norm(), gradients.view("whole").tolist()


def test_norm_counts_cut_parts_everywhere_and_replicated_once(pool: ProcessPool) -> None:
    for norm, whole in pool.run(tensor_parallel_norm, 2, False):
        assert norm == pytest.approx((4 * 1 + 4 * 4 + 3 * 4) ** 0.5)
        assert whole == [2.0] * 3


def test_partial_gradients_are_summed_over_tp_before_the_norm(pool: ProcessPool) -> None:
    for norm, whole in pool.run(tensor_parallel_norm, 2, True):
        assert norm == pytest.approx((4 * 1 + 4 * 4 + 3 * 16) ** 0.5)
        assert whole == [4.0] * 3


def tied_copies(sharded: bool) -> tuple[float, list[float]]:
    context = build_context(torch.device("cpu"), pipeline_parallel_size=2)
    weight = nn.Parameter(torch.ones(4, 2))
    item = TrainedParameter(f"copy{context.pp_rank}", weight, counted=context.is_first_stage, tied=True)
    layout = FlatLayout([item], context, sharded)
    flat = layout.flatten_parameters()
    gradients = FlatGradients(layout, context, sharded)
    (weight * (1.0 + context.pp_rank + 10.0 * context.dp_rank)).sum().backward()
    gradients.reduce()
    norm = gradients.norm()
    FlatAdamW(layout, flat, gradients, OptimizerFlags(use_distributed_optimizer=sharded), context).step(0.1)
    return norm, weight.flatten().tolist()


@pytest.mark.parametrize("sharded", [False, True])
def test_tied_copies_share_one_gradient_and_count_once(pool: ProcessPool, sharded: bool) -> None:
    results = pool.run(tied_copies, 4, sharded)
    assert [norm for norm, _ in results] == pytest.approx([(8 * 26.0**2) ** 0.5] * 4)
    assert all(values == results[0][1] for _, values in results)


def test_bf16_gradients_accumulate_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients_module, "_ADDED", 3)
    weight = nn.Parameter(torch.ones(2, 4, dtype=torch.bfloat16))
    context = single_process_context()
    layout = FlatLayout([TrainedParameter("w", weight)], context, False)
    layout.flatten_parameters()
    gradients = FlatGradients(layout, context, False)
    for value in [256.0] + [1.0] * 8:  # bf16 has 8 bits: 256 + 1 = 256 there
        (weight.t() * torch.arange(8).view(4, 2) * value).sum().backward()
    assert torch.equal(gradients.view("w"), 264.0 * torch.arange(8.0).view(4, 2).t())
    assert weight.grad is None


def test_bf16_weights_follow_fp32_masters() -> None:
    flags = OptimizerFlags(lr=1e-4, weight_decay=0.0)
    rig = Rig(single_process_context(), flags, torch.bfloat16)
    start = rig.adam.state["master"].clone()
    for step in range(3):
        rig.step(step)
    assert not torch.equal(rig.adam.state["master"], start)
    assert torch.equal(rig.flat, rig.adam.state["master"].bfloat16())


def export_state(flags: OptimizerFlags) -> dict[str, Any]:
    rig = Rig(build_context(torch.device("cpu")), flags)
    for step in range(2):
        rig.step(step)
    room = rig.adam.make_room()
    rig.adam.gather(room)
    return {kind: {item.name: value.clone() for item, value in rig.adam.export(kind, room)} for kind in STATE_NAMES}


def restore_state(flags: OptimizerFlags, state: dict[str, Any]) -> tuple[list[float], dict[str, torch.Tensor]]:
    rig = Rig(build_context(torch.device("cpu")), flags)
    for kind in STATE_NAMES:
        rig.adam.restore(kind, lambda item, kind=kind: state[kind][item.name])
    rig.adam.set_steps(2)
    rig.adam.publish()
    norms = [rig.step(step) for step in range(2, STEPS)]
    return norms, {name: p.detach().clone() for name, p in rig.model.named_parameters()}


def test_state_by_name_moves_between_plain_and_sharded(pool: ProcessPool) -> None:
    plain, sharded = OptimizerFlags(lr=1e-2), OptimizerFlags(lr=1e-2, use_distributed_optimizer=True)
    norms, weights = reference(plain)
    state = pool.run(export_state, 2, sharded)
    assert all(not values for values in state[1].values())
    for flags, world_size in ((plain, 1), (sharded, 4)):
        for result in pool.run(restore_state, world_size, flags, state[0]):
            assert_same(result, (norms[2:], weights))


def raise_on_one_rank(path: Path) -> None:
    import torch.distributed as dist

    if dist.get_rank() == 1:
        raise ValueError(f"no {path.name}")
    dist.barrier()


def test_pool_reports_a_failing_rank_and_goes_on(pool: ProcessPool) -> None:
    with pytest.raises(RankError, match="no luck"):
        pool.run(raise_on_one_rank, 2, Path("luck"))
    assert len(pool.run(run_rig, 2, OptimizerFlags(), 1)) == 2


def test_the_norm_of_a_long_vector_is_exact() -> None:
    """torch's own sum over 4 million squares is off by 1e-5 or more on a CPU, and with it every clipped gradient."""
    values = 1e-3 * torch.randn((1 << 22) + 77, generator=torch.Generator().manual_seed(0))
    values[: 1 << 21] *= 0.01
    expected = values.double().norm().item()
    assert norm_in_pieces(values).item() == pytest.approx(expected, rel=1e-6)
    for length in (0, 1, 1 << 16):
        assert norm_in_pieces(values[:length]).item() == pytest.approx(values[:length].double().norm().item(), rel=1e-6)
