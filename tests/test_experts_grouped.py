"""Grouped products of experts: every way of making them against float64, LoRA's gradients, and where grouped ones are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conversion_helpers import run_convert
from engine_helpers import SPEC, batch, build_engine
from helpers import make_model

from mindspeed_lora.errors import UsageError
from mindspeed_lora.lora.experts import GroupedLora
from mindspeed_lora.ops import grouped, products
from mindspeed_lora.ops.grouped import Products, RowGroups, Sequential, TorchGrouped, Windowed, default_products, grouped_refusal
from mindspeed_lora.parallel.grouped import GroupedLinear, choose_products
from mindspeed_lora.parallel.pipeline import PipelineRunner

EXPERTS, IN, OUT, RANK, SCALE = 4, 24, 16, 8, 2.0
LENGTHS = {
    "usual": (7, 0, 60, 3),
    "long": (70, 0, 300, 33, 5, 20),
    "one takes all": (0, 0, 80, 0),
    "few rows": (1, 0, 2, 0),
    "a token's": (0, 1, 0, 0, 0, 0, 2, 0, 0),
    "none": (0, 0, 0, 0),
}
CPU = torch.device("cpu")
KINDS = [
    Sequential(),
    Windowed(),
    pytest.param(TorchGrouped(), marks=pytest.mark.skipif(grouped_refusal(CPU, torch.float32, []) is not None, reason="torch has none")),
]


def _tensors(lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """x, dy and one matrix per expert, float64."""
    generator, rows = torch.Generator().manual_seed(0), sum(lengths)
    count = len(lengths)
    shapes = {"x": (rows, IN), "dy": (rows, OUT), "w": (count, OUT, IN), "a": (count, RANK, IN), "b": (count, OUT, RANK)}
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def _reference(t: dict[str, torch.Tensor], lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """y and the gradients of x, A and B, from one merged matrix per expert."""
    leaves = {name: t[name].double().requires_grad_() for name in ("x", "a", "b")}
    merged = t["w"].double() + SCALE * leaves["b"] @ leaves["a"]
    y = torch.cat([rows @ matrix.t() for rows, matrix in zip(leaves["x"].split(lengths), merged, strict=True)])
    return {"y": y.detach(), **dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), t["dy"].double()), strict=True))}


def _lora(t: dict[str, torch.Tensor], lengths: tuple[int, ...], products: Products) -> dict[str, torch.Tensor]:
    leaves = {name: t[name].detach().clone().requires_grad_() for name in ("x", "a", "b")}
    groups = RowGroups(torch.tensor(lengths))
    y = GroupedLora.apply(leaves["x"], t["w"], leaves["a"], leaves["b"], SCALE, groups, products)
    return {"y": y.detach(), **dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), t["dy"]), strict=True))}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("products", KINDS, ids=["sequential", "windowed", "torch"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-14), (torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
def test_lora_equals_merged_matrices_in_float64(products: Products, lengths: tuple[int, ...], dtype: torch.dtype, bound: float) -> None:
    if dtype == torch.float64 and isinstance(products, TorchGrouped):
        pytest.skip("torch's grouped product takes no float64")
    t = {name: value.to(dtype) for name, value in _tensors(lengths).items()}
    expected, got = _reference(t, lengths), _lora(t, lengths, products)
    for name, value in expected.items():
        assert got[name].dtype == dtype and got[name].shape == value.shape
        if value.numel():
            assert (got[name].double() - value).abs().max() <= bound * max(value.abs().max().item(), 1.0), name
    for expert, length in enumerate(lengths):
        if not length:
            assert not got["a"][expert].any() and not got["b"][expert].any(), f"expert {expert} has no rows"


@pytest.mark.parametrize("products", KINDS, ids=["sequential", "windowed", "torch"])
def test_an_address_that_the_kernel_does_not_take(products: Products) -> None:
    """A and B are views into the optimizer's flat buffer, at any element."""
    t = {name: value.float() for name, value in _tensors(LENGTHS["usual"]).items()}
    expected = _lora(t, LENGTHS["usual"], Sequential())
    for name in ("a", "b", "w", "x"):
        flat = torch.empty(t[name].numel() + 1)
        t[name] = flat[1:].view(t[name].shape).copy_(t[name])
    for name, value in _lora(t, LENGTHS["usual"], products).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)
    assert t["a"].data_ptr() % 16 and grouped._aligned(t["a"]).data_ptr() % 16 == 0  # torch 2.11's CPU takes any, CUDA does not


@pytest.mark.parametrize("products", KINDS, ids=["sequential", "windowed", "torch"])
def test_the_plain_layer_and_its_weight_gradient(products: Products) -> None:
    t, lengths = _tensors(LENGTHS["usual"]), LENGTHS["usual"]
    layer = GroupedLinear(EXPERTS, IN, OUT, torch.float32, CPU)
    layer.products = products
    layer.weight.data.copy_(t["w"])
    x = t["x"].float().requires_grad_()
    layer(x, RowGroups(torch.tensor(lengths))).backward(t["dy"].float())
    parts = list(zip(t["dy"].split(lengths), t["x"].split(lengths), t["w"], strict=True))
    assert x.grad is not None and layer.weight.grad is not None
    torch.testing.assert_close(x.grad.double(), torch.cat([dy @ w for dy, _, w in parts]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.weight.grad.double(), torch.stack([dy.t() @ rows for dy, rows, _ in parts]), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(grouped_refusal(CPU, torch.float32, []) is not None, reason="torch has no grouped product for a CPU")
def test_grouped_equals_sequential_in_a_model(tmp_path: Path) -> None:
    folder = make_model(tmp_path, "qwen3_moe", num_hidden_layers=2)
    found = {}
    for flag in (False, True):
        engine = build_engine(folder, lora=SPEC)
        words = choose_products(engine.stages, engine.table.config, flag)
        assert words == (TorchGrouped.name if flag else Sequential.name)
        loss = PipelineRunner(engine.stages, engine.context).forward_backward(*batch(), micro_batch_size=1).sum()
        named = {name: value.grad for stage in engine.stages for name, value in stage.named_parameters() if value.requires_grad}
        found[flag] = {"loss": loss, **named}
    for name, value in found[False].items():
        torch.testing.assert_close(found[True][name], value, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_grouped_and_sequential_files_load_either_way(tmp_path: Path) -> None:
    """How a Megatron folder holds its experts says nothing about how they compute."""
    folder = make_model(tmp_path / "hf", "qwen3_moe", num_hidden_layers=2)
    expected = dict(build_engine(folder).stages[0].named_parameters())
    for in_one in (False, True):
        cut = {"target_tensor_parallel_size": 2, "target_expert_parallel_size": 2, "moe_grouped_gemm": in_one}
        run_convert("hf", "mg", folder, tmp_path / str(in_one), **cut)
        engine = build_engine(tmp_path / str(in_one))
        choose_products(engine.stages, engine.table.config, False)
        for name, value in engine.stages[0].named_parameters():
            assert torch.equal(value, expected[name]), name


def test_a_model_without_experts(tmp_path: Path) -> None:
    engine = build_engine(make_model(tmp_path, "qwen3"))
    assert choose_products(engine.stages, engine.table.config, False) is None
    with pytest.raises(UsageError, match="--moe-grouped-gemm: the model has no experts"):
        choose_products(engine.stages, engine.table.config, True)


def _pretend(monkeypatch: pytest.MonkeyPatch, version: tuple[int, int], capability: tuple[int, int]) -> None:
    monkeypatch.setattr(grouped, "torch_version", lambda: version)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "Card")


@pytest.mark.parametrize(
    ("device", "version", "capability", "dtype", "sizes", "words"),
    [
        ("cuda", (2, 13), (9, 0), torch.bfloat16, [8, 64], None),
        ("cuda", (2, 8), (9, 0), torch.bfloat16, [8, 64], None),
        ("cuda", (2, 8), (8, 0), torch.bfloat16, [8], "has no grouped product for Card"),
        ("cuda", (2, 7), (9, 0), torch.bfloat16, [8], "has no grouped product for Card"),
        ("cuda", (2, 13), (9, 0), torch.float16, [8], "takes bfloat16, not float16"),
        ("cuda", (2, 13), (9, 0), torch.bfloat16, [64, 12, 4], "multiples of 8, which 4, 12 is not"),
        ("cpu", (2, 8), (0, 0), torch.float32, [8], "has no grouped product (2.9 on)"),
        ("cpu", (2, 13), (0, 0), torch.float32, [6], "multiples of 4, which 6 is not"),
    ],
)
def test_where_grouped_products_are_refused(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    version: tuple[int, int],
    capability: tuple[int, int],
    dtype: torch.dtype,
    sizes: list[int],
    words: str | None,
) -> None:
    _pretend(monkeypatch, version, capability)
    refusal = grouped_refusal(torch.device(device), dtype, sizes)
    assert (refusal is None) == (words is None) and (words is None or words in str(refusal)), refusal


def test_the_default_is_the_device_s_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    def kind(device: str, dtype: torch.dtype = torch.bfloat16, sizes: tuple[int, ...] = (8,)) -> type:
        return type(default_products(torch.device(device), dtype, sizes))

    _pretend(monkeypatch, (2, 13), (9, 0))
    assert kind("cuda") is TorchGrouped
    assert kind("cuda", sizes=(4,)) is Sequential and kind("cuda", torch.float32) is Sequential and kind("cpu", torch.float64) is Sequential
    for fast in (False, True):
        monkeypatch.setattr(products, "cpu_multiplies_fast", lambda dtype, fast=fast: fast and dtype == torch.bfloat16)
        assert [kind("cpu", dtype) is Windowed for dtype in (torch.float32, torch.bfloat16, torch.float16)] == [False, fast, False]
    _pretend(monkeypatch, (2, 13), (8, 0))
    assert kind("cuda") is Sequential  # torch's function is a loop there


def test_the_flag_names_what_stands_in_its_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine: Any = build_engine(make_model(tmp_path, "qwen3_moe", num_hidden_layers=1), lora=SPEC)
    _pretend(monkeypatch, (2, 7), (0, 0))
    with pytest.raises(UsageError, match=r"--moe-grouped-gemm on cpu: torch .* has no grouped product \(2.9 on\); leave the flag out"):
        choose_products(engine.stages, engine.table.config, True)
    assert choose_products(engine.stages, engine.table.config, False) == Sequential.name
