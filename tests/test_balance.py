"""Losses that balance experts: values and gradients against formulas in fp64 and transformers, and the same at every layout."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from layout_cells import LAYOUTS, Cell, Layout, Outcome, assemble, run_cell
from pool import ProcessPool
from test_training_layouts import relative
from training_helpers import change, make_config, make_workspace, metrics, run_training, saved_parameters

from mindspeed_lora.arguments.configs import ArchitectureFlags, BalanceFlags, ExpertFlags
from mindspeed_lora.errors import UsageError
from mindspeed_lora.model.balance import Balancer, BalanceTerms
from mindspeed_lora.parallel.context import single_process_context
from mindspeed_lora.training.balance import ExpertBalance, balance_terms, token_shares
from mindspeed_lora.training.preflight import plan_model
from mindspeed_lora.weights.families import model_config_from_hf
from mindspeed_lora.weights.sources import open_base
from mindspeed_lora.weights.table import WeightTable

WITH_EXPERTS = [0, 2, 3]  # of the tiny model's four layers
ROWS, LENGTH, EXPERTS, TOP = 3, 5, 6, 2
BY_NAME = {layout.name: layout for layout in LAYOUTS} | {
    "ep2": Layout("ep2", dp=2, ep=2),
    "tp2etp1": Layout("tp2etp1", tp=2, etp=1, sp=True),
    "tp2etp1plain": Layout("tp2etp1plain", tp=2, etp=1),
    "tp2ep2etp1": Layout("tp2ep2etp1", tp=2, dp=2, ep=2, etp=1),
}


def micro_batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """logits ``[s b, E]``, chosen experts, shares ``[b, s]`` with padding behind the rows."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(LENGTH * ROWS, EXPERTS, generator=generator).requires_grad_()
    shares = (torch.arange(LENGTH) < torch.tensor([5, 2, 4]).unsqueeze(1)).float() / 40
    return logits, logits.detach().topk(TOP).indices, shares


def attached_gradient(terms: BalanceTerms, score: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of the logits that the losses alone give, and the recorded losses."""
    logits, experts, shares = micro_batch()
    balancer = Balancer(terms, [4], EXPERTS, single_process_context())
    scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
    weights = balancer.micro_batch(shares).of(4).attach(scores.gather(1, experts), logits, scores, experts)
    (0.0 * weights).sum().backward()
    assert logits.grad is not None
    return logits.grad, balancer.losses[0]


def formula(score: str, by_row: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Load balancing, z and their gradients, token by token in fp64."""
    logits, experts, shares = micro_batch()
    logits = logits.detach().double().requires_grad_()
    scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)
    total = torch.zeros((), dtype=torch.float64)
    for group in [[row] for row in range(ROWS)] if by_row else [list(range(ROWS))]:
        tokens = [(place * ROWS + row, shares[row, place].double()) for row in group for place in range(LENGTH) if shares[row, place] > 0]
        for expert in range(EXPERTS):
            chosen = sum(int(expert in experts[token].tolist()) for token, _ in tokens) / (TOP * len(tokens))
            total = total + EXPERTS * chosen * sum(share * scores[token, expert] for token, share in tokens)
    z = sum(shares.t().flatten()[token].double() * logits[token].exp().sum().log() ** 2 for token in range(ROWS * LENGTH))
    gradients = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (total, z)]
    return total.detach(), z.detach(), *gradients


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("by_row", [False, True], ids=["micro_batch", "row"])
def test_losses_and_gradients_are_the_formulas(score: str, by_row: bool) -> None:
    aux, z, aux_gradient, z_gradient = formula(score, by_row)
    gradient, losses = attached_gradient(BalanceTerms(0.3, by_row, 0.7), score)
    assert losses.tolist() == pytest.approx([aux.item(), z.item()], rel=1e-6)
    torch.testing.assert_close(gradient.double(), 0.3 * aux_gradient + 0.7 * z_gradient, rtol=1e-5, atol=1e-9)


def test_one_layer_without_padding_is_transformers_loss_over_top_k() -> None:
    """transformers sums the shares of the k-th choices, each a share of the tokens: k times Megatron's."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits, experts, _ = micro_batch()
    expected = load_balancing_loss_func((logits,), EXPERTS, TOP)
    expected.backward()
    balancer = Balancer(BalanceTerms(aux=1.0), [0], EXPERTS, single_process_context())
    ours = logits.detach().clone().requires_grad_()
    shares = torch.full((ROWS, LENGTH), 1 / (ROWS * LENGTH))
    scores = ours.softmax(-1)
    balancer.micro_batch(shares).of(0).attach(scores.gather(1, experts), ours, scores, experts).sum().mul(0.0).backward()
    assert TOP * balancer.losses[0, 0].item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(TOP * ours.grad, logits.grad)


def test_padding_with_its_mask_is_transformers_too() -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits, _, shares = micro_batch()
    by_row = logits.detach().view(LENGTH, ROWS, EXPERTS).transpose(0, 1).reshape(-1, EXPERTS)
    expected = load_balancing_loss_func((by_row,), EXPERTS, TOP, (shares > 0).long())
    _, losses = attached_gradient(BalanceTerms(aux=1.0), "softmax")
    assert TOP * losses[0].item() / shares.sum().item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_layer_that_is_computed_again_counts_once() -> None:
    logits, experts, shares = micro_batch()
    balancer = Balancer(BalanceTerms(aux=1.0, counts=True), [4], EXPERTS, single_process_context())
    batch, scores = balancer.micro_batch(shares), logits.softmax(-1)
    for _ in range(2):
        batch.of(4).attach(scores.gather(1, experts), logits, scores, experts)
    assert balancer.counts.sum().item() == TOP * 11  # real tokens
    assert balancer.losses[0, 0].item() == pytest.approx(formula("softmax", False)[0].item(), rel=1e-6)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("balance"), "qwen3_moe")


def balanced(config: Any, kind: str = "aux_loss", **flags: Any) -> Any:
    """The configuration with large coefficients, so that a wrong one is seen."""
    architecture = ArchitectureFlags(experts=ExpertFlags(balancing=kind))
    return dataclasses.replace(config, architecture=architecture, balance=BalanceFlags(**{"aux": 0.5, "z": 0.1, **flags}))


def outcome(pool: ProcessPool, workspace: Path, cell: Cell, kind: str, **changes: Any) -> list[Outcome]:
    return pool.run(run_cell, cell.layout.world_size, balanced(change(cell.config(workspace), **changes), kind), 3)


def reference_gradients(workspace: Path, config: Any, by_row: bool, kind: str = "tokens") -> dict[str, torch.Tensor]:
    """transformers' gradients of loss and both balancing losses of the first global batch, written from its router logits.

    They are taken where its routers leave them: transformers 4.51 does not return those of models that have dense layers too.
    """
    from transformers import AutoModelForCausalLM

    from mindspeed_lora.training.objective import row_weights
    from mindspeed_lora.training.preflight import plan_training
    from mindspeed_lora.training.run import training_batches

    batch = next(iter(training_batches(plan_training(config, 1), single_process_context())))
    model = AutoModelForCausalLM.from_pretrained(workspace / "model", attn_implementation="eager").float().eval()
    router_logits: list[torch.Tensor] = []  # [b s, E] each
    for layer in model.model.layers:
        if hasattr(layer.mlp, "gate"):
            layer.mlp.gate.register_forward_hook(lambda _, __, out: router_logits.append(out[0] if isinstance(out, tuple) else out))
    shares, weights = token_shares(batch, 1, kind), row_weights(batch, 1, kind)
    size = batch.micro_batch_size
    for start in range(0, len(batch.input_ids), size):
        rows = slice(start, start + size)
        router_logits.clear()
        out = model(input_ids=batch.input_ids[rows])
        losses = torch.nn.functional.cross_entropy(
            out.logits.flatten(0, 1), batch.labels[rows].flatten(), ignore_index=-100, reduction="none"
        )
        loss = (losses.view(size, -1).sum(1) * weights[rows]).sum()
        for logits in router_logits:
            logits = logits.view(size, -1, logits.shape[-1])
            scores, share = logits.softmax(-1), shares[rows].unsqueeze(-1)
            chosen = torch.zeros_like(scores).scatter(-1, scores.topk(model.config.num_experts_per_tok).indices, 1.0) * share
            dims = (1,) if by_row else (0, 1)
            used = chosen.sum(dims, keepdim=True) / chosen.sum((*dims, 2), keepdim=True)
            loss = loss + 0.5 * logits.shape[-1] * (used.detach() * scores * share).sum()
            loss = loss + 0.1 * (share[..., 0] * logits.logsumexp(-1).square()).sum()
        loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if name.endswith("mlp.gate.weight")}


@pytest.mark.parametrize("kind", ["aux_loss", "seq_aux_loss"])
@pytest.mark.parametrize("normalization", ["tokens", "micro-batch"])
def test_router_gradients_of_a_step_are_transformers(pool: ProcessPool, workspace: Path, kind: str, normalization: str) -> None:
    config = balanced(Cell(BY_NAME["tp1"], "full_untied", 4, "keep", False).config(workspace, optimizer__clip_grad=0.0), kind)
    config = dataclasses.replace(config, loss_normalization=normalization)
    found = pool.run(run_cell, 1, config, 1)[0].gradients
    expected = reference_gradients(workspace, config, kind == "seq_aux_loss", normalization)
    assert len(expected) == 3  # of four layers one is dense
    for name, gradient in expected.items():
        ours = found[f"decoder.layers.{name.split('.')[2]}.mlp.router.weight"]
        torch.testing.assert_close(ours, gradient, rtol=1e-4, atol=2e-6)


@pytest.fixture(scope="module")
def one_process(pool: ProcessPool, workspace: Path) -> Callable[[str, str], Outcome]:
    """One process's three steps with micro-batches of 2, by what is trained and the kind of loss ("": none)."""

    @functools.cache
    def outcome_of(mode: str, kind: str) -> Outcome:
        cell = Cell(BY_NAME["tp1"], mode, 2, "keep", False)
        return outcome(pool, workspace, cell, kind)[0] if kind else pool.run(run_cell, 1, cell.config(workspace), 1)[0]

    return outcome_of


@pytest.mark.parametrize(
    ("layout", "mode", "recompute", "zero", "kind"),
    [
        ("tp2sp", "full_untied", "recompute", False, "aux_loss"),
        ("tp2", "full_untied", "keep", True, "seq_aux_loss"),
        ("pp2", "lora_fused", "keep", False, "aux_loss"),
        ("ep2", "full_untied", "recompute", True, "aux_loss"),
        ("tp2etp1", "full_untied", "recompute", False, "aux_loss"),
        ("tp2etp1plain", "full_untied", "keep", False, "seq_aux_loss"),
        pytest.param("tp2pp2", "full_untied", "recompute", False, "aux_loss", marks=pytest.mark.slow),
        pytest.param("tp2ep2etp1", "full_untied", "recompute", True, "aux_loss", marks=pytest.mark.slow),
    ],
)
def test_the_result_does_not_depend_on_the_layout(
    pool: ProcessPool,
    workspace: Path,
    one_process: Callable[[str, str], Outcome],
    layout: str,
    mode: str,
    recompute: str,
    zero: bool,
    kind: str,
) -> None:
    expected, plain = one_process(mode, kind), one_process(mode, "")
    outcomes = outcome(pool, workspace, Cell(BY_NAME[layout], mode, 2, recompute, zero), kind)
    table = WeightTable(model_config_from_hf(workspace / "model"))
    whole = assemble([expected], table, "gradients")
    assert relative(assemble([plain], table, "gradients"), whole) > 0.01  # the losses do something
    assert relative(assemble(outcomes, table, "gradients"), whole) <= 1e-5  # a wrong share is off by per cents
    for found in outcomes:
        assert found.losses == pytest.approx(expected.losses, rel=1e-5)
        assert found.norms == pytest.approx(expected.norms, rel=1e-4)


def test_losses_of_rows_do_not_depend_on_the_micro_batch(pool: ProcessPool, workspace: Path) -> None:
    small, large = (
        outcome(pool, workspace, Cell(BY_NAME["tp1"], "full_untied", size, "keep", False), "seq_aux_loss")[0] for size in (1, 4)
    )
    assert small.norms == pytest.approx(large.norms, rel=1e-4)
    small, large = (outcome(pool, workspace, Cell(BY_NAME["tp1"], "full_untied", size, "keep", False), "aux_loss")[0] for size in (1, 4))
    assert small.norms != pytest.approx(large.norms, rel=1e-3)  # f is a micro-batch's


FOUR = {"parallel__tensor_parallel_size": 2, "parallel__pipeline_parallel_size": 2, "parallel__expert_tensor_parallel_size": 1}


def test_what_is_logged_is_the_same_at_another_layout(pool: ProcessPool, workspace: Path, tmp_path: Path) -> None:
    found = {}
    for name, cut in (("one", {}), ("four", FOUR)):
        config = balanced(
            dataclasses.replace(make_config(workspace, train_iters=2, save__save=tmp_path / name, **cut), lora=None), log_layers=True
        )
        lines = pool.run(run_training, 4 if cut else 1, config)[0]
        assert "load_balancing_loss: " in lines and "z_loss: " in lines and "busiest expert: " in lines
        found[name] = metrics(tmp_path / name)
    for one, four in zip(found["one"], found["four"], strict=True):
        for key in ("lm_loss", "load_balancing_loss", "z_loss"):
            assert four[key] == pytest.approx(one[key], rel=1e-5)
        assert [use["layer"] for use in one["experts"]] == WITH_EXPERTS
        assert [use | {"layer": 0} for use in four["experts"]] == [pytest.approx(use | {"layer": 0}, rel=1e-5) for use in one["experts"]]
        assert one["load_balancing_loss"] == pytest.approx(sum(use["load_balancing_loss"] for use in one["experts"]) / 3, rel=1e-5)
    assert all(use["busiest"] >= 1 for record in found["one"] for use in record["experts"])


def plan(workspace: Path, kind: str | None, **flags: Any) -> Any:
    config = dataclasses.replace(make_config(workspace), lora=None)
    return plan_model(balanced(config, kind, **flags) if kind else dataclasses.replace(config, balance=BalanceFlags(**flags)), 1)


@pytest.mark.parametrize(
    ("kind", "flags", "expected"),
    [
        (None, {}, None),
        (None, {"aux": 0.01}, BalanceTerms(aux=0.01)),  # as in the peer, whose default is aux_loss
        ("aux_loss", {"aux": 0.01, "z": 0.0, "by_row": True}, BalanceTerms(aux=0.01)),
        ("pai_megatron_aux_loss", {"aux": 0.01, "z": 0.0}, BalanceTerms(aux=0.01)),
        ("group_limited_greedy", {"aux": 0.01, "z": 0.0}, BalanceTerms(aux=0.01)),
        ("group_limited_greedy", {"aux": 0.01, "z": 0.0, "by_row": True}, BalanceTerms(aux=0.01, by_row=True)),
        ("none", {"aux": 0.01, "z": 0.0, "by_row": True}, BalanceTerms(aux=0.01, by_row=True)),
        ("none", {"aux": 0.01, "z": 0.0}, None),
        ("softmax_topk", {"aux": 0.01, "z": 0.0, "by_row": True}, None),
        ("softmax_topk", {"aux": 0.01, "z": 0.001}, BalanceTerms(aux=0.0, by_row=False, z=0.001)),
        ("seq_aux_loss", {"aux": 0.0, "z": 0.0, "log_layers": True}, BalanceTerms(by_row=True, counts=True)),
    ],
)
def test_flags_mean_what_they_mean_to_the_peer(
    workspace: Path, kind: str | None, flags: dict[str, Any], expected: BalanceTerms | None
) -> None:
    made = plan(workspace, kind, **flags)
    assert made.balance == expected
    idle = (flags.get("aux") and (expected is None or not expected.aux)) or (flags.get("by_row") and not (expected and expected.by_row))
    assert any("has no effect" in note for note in made.notes) == bool(idle)


def test_a_dense_model_has_nothing_to_balance(tmp_path: Path) -> None:
    folder = make_workspace(tmp_path, "qwen3")
    with pytest.raises(
        UsageError, match=r"--moe-aux-loss-coeff 0\.01 and --seq-aux and --moe-per-layer-logging: a qwen3 model has no experts"
    ):
        plan(folder, None, aux=0.01, by_row=True, log_layers=True)


def test_biases_follow_the_tokens_of_a_step(pool: ProcessPool, tmp_path: Path) -> None:
    """DeepSeek V3's balancing without a loss: each step moves every bias by the rate, towards the mean load; saved with the weights."""
    workspace = make_workspace(tmp_path / "space", "deepseek_v3")
    biases = {}
    cuts = {"one": {}, "tp2": {"parallel__tensor_parallel_size": 2, "parallel__sequence_parallel": True}, "dp2": {}}
    for name, cut in cuts.items():
        config = dataclasses.replace(make_config(workspace, train_iters=1, save__save=tmp_path / name, **cut), lora=None)
        config = dataclasses.replace(
            config, balance=BalanceFlags(bias_rate=0.01), optimizer=dataclasses.replace(config.optimizer, lr=1e-9, min_lr=0.0)
        )
        pool.run(run_training, 1 if name == "one" else 2, config)
        saved = saved_parameters(tmp_path / name, lora=False)
        biases[name] = {key: value for key, value in saved.items() if key.endswith("e_score_correction_bias")}
    start = open_base(workspace / "model")
    table = WeightTable(start.model_config)
    before = {row.hf_names(layer)[0]: start.parts(row, layer)[0].float() for row, layer in table.entries() if "expert_bias" in row.megatron}
    assert before.keys() == biases["one"].keys() and before
    for name, bias in biases["one"].items():
        change = (bias - before[name]) / 0.01
        torch.testing.assert_close(change, change.round(), rtol=0, atol=1e-3)
        assert change.abs().max() > 0.5 and change.min() < 0 < change.max()  # not all one way
        for other in ("tp2", "dp2"):
            torch.testing.assert_close(bias, biases[other][name])


def test_a_busy_expert_gets_less_bias_and_logged_losses_are_unscaled() -> None:
    router = SimpleNamespace(expert_bias=torch.zeros(4))
    stage: Any = SimpleNamespace(layer_range=range(1), routers=lambda: [(0, router)])
    model: Any = SimpleNamespace(experts=SimpleNamespace(count=4), num_layers=1, has_experts=lambda layer: True)
    balance = ExpertBalance(BalanceTerms(aux=1.0, z=1.0, counts=True), model, [stage], single_process_context())
    stage.balancer.counts[0] = torch.tensor([6.0, 2.0, 4.0, 4.0])
    stage.balancer.losses[0] = torch.tensor([8.0, 4.0])
    assert balance.step_values(4.0).tolist() == [2.0, 1.0]
    balance.update_biases(0.5)
    assert router.expert_bias.tolist() == [-0.5, 0.5, 0.0, 0.0]


@pytest.mark.parametrize("normalization", ["tokens", "micro-batch"])
def test_the_replicas_shares_of_a_global_batch_sum_to_one(normalization: str) -> None:
    lengths = ((5, 3, 2, 4), (6, 6, 1, 1))
    batches: Any = [
        SimpleNamespace(row_real_tokens=real, input_ids=torch.zeros(4, 6), micro_batch_size=2, num_real_tokens=28) for real in lengths
    ]
    shares = [token_shares(batch, 2, normalization) for batch in batches]
    assert sum(each.sum().item() for each in shares) == pytest.approx(1.0)
    if normalization == "micro-batch":
        assert [each.view(2, -1).sum(1).tolist() for each in shares] == [pytest.approx([0.25, 0.25])] * 2


@pytest.mark.parametrize(
    ("family", "lora", "expected"), [("qwen3_moe", False, "experts have no bias"), ("deepseek_v3", True, "adapter's files")]
)
def test_biases_that_cannot_follow_are_refused(tmp_path: Path, family: str, lora: bool, expected: str) -> None:
    config = make_config(make_workspace(tmp_path, family))
    with pytest.raises(UsageError, match=f"--moe-router-bias-update-rate 0.01: .*{expected}"):
        plan_model(dataclasses.replace(config, balance=BalanceFlags(bias_rate=0.01), **({} if lora else {"lora": None})), 1)


def test_biases_do_not_follow_where_load_brings_the_adapter(tmp_path: Path) -> None:
    config = dataclasses.replace(make_config(make_workspace(tmp_path, "deepseek_v3")), lora=None, balance=BalanceFlags(bias_rate=0.01))
    model = plan_model(config, 1).model
    with pytest.raises(UsageError, match="adapter's files"):
        balance_terms(config, model, True, [])
