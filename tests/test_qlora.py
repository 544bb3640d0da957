"""A base in 4 bits: bitsandbytes' values, our arithmetic. Skips where bitsandbytes (extra ``qlora``) is not installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_helpers import SPEC, Engine, batch, build_engine, peft_twin, reference_loss, twin_gradients
from helpers import make_model, weights_in
from pool import ProcessPool
from training_helpers import losses, make_config, make_workspace, run_training, saved_parameters

from mindspeed_lora.arguments.configs import RecomputeFlags
from mindspeed_lora.errors import MindSpeedLoraError, UsageError
from mindspeed_lora.ops.nf4 import Nf4, check_nf4
from mindspeed_lora.parallel.context import build_context, single_process_context
from mindspeed_lora.parallel.grouped import GroupedLinear
from mindspeed_lora.parallel.on_demand import BaseStorage
from mindspeed_lora.parallel.pipeline import PipelineRunner
from mindspeed_lora.weights.table import WeightTable

UNIFORM = RecomputeFlags("full", "uniform", 1)


def step(engine: Engine) -> tuple[float, dict[str, torch.Tensor]]:
    ids, labels, weights = batch()
    loss = float(PipelineRunner(engine.stages, engine.context).forward_backward(ids, labels, weights, 2).sum())
    named = {name: parameter for stage in engine.stages for name, parameter in stage.named_parameters()}
    return loss, {name: parameter.grad for name, parameter in named.items() if parameter.grad is not None}


def compare(folder: Path, tp: int, pp: int, sharded: bool, recompute: RecomputeFlags, dtype: torch.dtype) -> tuple[float, float, list[str]]:
    """A run on 4-bit weights and a plain run whose weights are the decoded ones: losses, and gradients that differ."""
    context = build_context(torch.device("cpu"), tp, pp, tp > 1)
    storages: list[BaseStorage] = []

    def make_storage() -> BaseStorage:
        storages.append(BaseStorage(context, Nf4(), sharded))
        return storages[-1]

    held = build_engine(folder, context, SPEC, True, dtype, recompute=recompute, make_storage=make_storage)
    plain = build_engine(folder, context, SPEC, True, dtype, recompute=recompute)
    wanted = {name: parameter for stage in plain.stages for name, parameter in stage.named_parameters()}
    for stage in held.stages:
        for layer in stage.storage.layers if stage.storage else []:
            layer.fill()
        for name, parameter in stage.named_parameters():
            if ".lora_" not in name:
                wanted[name].data.copy_(parameter.data)
        for layer in stage.storage.layers if stage.storage else []:
            layer.free()
    (one, grads), (other, expected) = step(held), step(plain)
    return one, other, [name for name, grad in expected.items() if not torch.equal(grad, grads[name])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("bitsandbytes")
    return make_model(tmp_path_factory.mktemp("model"), "qwen3")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute", [RecomputeFlags(), UNIFORM])
def test_it_is_exactly_a_run_on_the_decoded_weights(folder: Path, recompute: RecomputeFlags, dtype: torch.dtype) -> None:
    found, expected, unequal = compare(folder, 1, 1, False, recompute, dtype)
    assert found == expected and unequal == []


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v2", "deepseek_v3"])
@pytest.mark.parametrize(("dtype", "recompute"), [(torch.float32, RecomputeFlags()), (torch.bfloat16, UNIFORM)])
def test_experts_and_latents_in_4_bits_are_exactly_a_run_on_the_decoded_weights(
    tmp_path: Path, family: str, recompute: RecomputeFlags, dtype: torch.dtype
) -> None:
    """Every expert's two matrices, the shared expert's and attention's; the router and gates stay whole."""
    pytest.importorskip("bitsandbytes")
    folder = make_model(tmp_path, family)
    found, expected, unequal = compare(folder, 1, 1, False, recompute, dtype)
    assert found == expected and unequal == []

    context = single_process_context()
    held = build_engine(folder, make_storage=lambda: BaseStorage(context, Nf4(), False)).stages[0]
    assert held.storage is not None
    table = WeightTable(held.model_config)
    on_demand = {name for name, weight in held.named_parameters() if held.storage.holder(weight) is not None}
    assert on_demand == {name for name, _ in held.named_parameters() if table.parse(name)[0].module and ".lora_" not in name}
    for layer in held.storage.layers:
        layer.fill()
    decoded = dict(held.named_parameters())
    for name, whole in build_engine(folder).stages[0].named_parameters():  # each expert at its own place
        for one, other in zip(decoded[name], whole, strict=True) if ".experts." in name else ():
            assert (one - other).norm() < 0.15 * other.norm(), name


def test_an_expert_that_does_not_fill_its_blocks_is_refused() -> None:
    pytest.importorskip("bitsandbytes")
    layer = GroupedLinear(2, 6, 10, torch.float32, torch.device("cpu"))
    with pytest.raises(UsageError, match=r"--qlora codes 64 values together, which \(10, 6\) of an expert does not fill"):
        BaseStorage(single_process_context(), Nf4(), False).take(layer, [layer.weight])


def test_latents_in_4_bits_over_tp(pool: ProcessPool, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    folder = make_model(tmp_path, "deepseek_v3")
    for found, expected, unequal in pool.run(compare, 2, folder, 2, 1, False, RecomputeFlags(), torch.float32):
        assert found == expected and unequal == []


@pytest.mark.parametrize(("processes", "tp", "pp"), [(2, 1, 1), (4, 2, 1), (4, 1, 2)])
def test_it_is_so_at_every_layout_and_cut_over_dp(pool: ProcessPool, folder: Path, processes: int, tp: int, pp: int) -> None:
    for found, expected, unequal in pool.run(compare, processes, folder, tp, pp, True, UNIFORM, torch.float32):
        assert found == expected and unequal == []


def load_in_4_bits(folder: Path) -> Any:
    """transformers with bitsandbytes' layers."""
    import transformers

    settings = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    try:
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=settings, device_map="cpu", attn_implementation="eager", **weights_in(torch.float32)
        )
    except (ImportError, RuntimeError, ValueError) as error:
        pytest.skip(f"transformers does not load 4-bit models here: {error}")


@pytest.fixture(scope="module")
def whole_blocks(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose rows are whole blocks of 64, as bitsandbytes' CPU kernels want them."""
    return make_model(tmp_path_factory.mktemp("rows_of_whole_blocks"), "qwen3", intermediate_size=128)


def test_the_values_are_those_of_transformers_with_bitsandbytes(whole_blocks: Path) -> None:
    """``load_in_4bit`` quantises q, k, v, gate and up one by one; a block of 64 lies within a row, so fusing changes nothing."""
    from bitsandbytes.functional import dequantize_4bit

    reference = load_in_4_bits(whole_blocks)
    engine = build_engine(whole_blocks, make_storage=lambda: BaseStorage(single_process_context(), Nf4(), False))
    (stage,), compared = engine.stages, 0
    assert stage.storage is not None
    for layer in stage.storage.layers:
        layer.fill()
    for name, parameter in stage.named_parameters():
        row, number = engine.table.parse(name)
        for part, hf_name in zip(engine.table.unshard(row, [parameter.data]), row.hf_names(number), strict=True):
            other = reference.get_parameter(hf_name)
            if row.module is not None:
                other, compared = dequantize_4bit(other.data, other.quant_state), compared + 1
            assert torch.equal(part, other), hf_name
    assert compared == 4 * 7


@pytest.mark.parametrize("fusion", [True, False])
def test_loss_and_gradients_are_those_of_pefts_qlora(whole_blocks: Path, fusion: bool) -> None:
    """peft's ``Linear4bit`` over bitsandbytes' in training (its CPU kernel for inference multiplies in bf16, 0.5 % away); 1.3e-6 seen."""
    storage = BaseStorage(single_process_context(), Nf4(), False)
    engine = build_engine(whole_blocks, None, SPEC, fusion, make_storage=lambda: storage)
    twin = peft_twin(load_in_4_bits(whole_blocks), engine.table).train()
    assert "lora.Linear4bit" in repr(twin)
    loss, found = step(engine)
    assert loss == pytest.approx(float(reference_loss(twin).detach()), rel=1e-6)
    expected = twin_gradients(twin, engine.table)
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        whole = torch.cat(engine.table.unshard(engine.table.lora_row(name), [found[name]]))
        assert float((whole - gradient).norm()) <= 5e-6 * float(gradient.norm()), name


def test_a_training_run_saves_an_adapter_that_goes_on(folder: Path, tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path)
    config = make_config(workspace, save__save=tmp_path / "save", runtime__qlora=True, train_iters=3)
    text = run_training(config)
    assert "runtime.qlora: True" in text
    assert all(bool(value.isfinite().all()) for value in saved_parameters(tmp_path / "save").values())
    plain = make_config(workspace, save__save=tmp_path / "plain", train_iters=3)
    run_training(plain)
    assert losses(tmp_path / "plain")[0] != losses(tmp_path / "save")[0]


def test_4_bits_are_held(folder: Path) -> None:
    storage = BaseStorage(single_process_context(), Nf4(), False)
    build_engine(folder, make_storage=lambda: storage)
    whole = sum(weight.numel() for layer in storage.layers for weight in layer.weights)
    assert sum(held.nbytes for layer in storage.layers for held in layer.holders) == whole * 0.5625


def test_an_npu_has_no_kernels_and_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"no kernels for Ascend NPUs; use --bf16 with --fsdp-base"):
        check_nf4("npu")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MindSpeedLoraError, match=r"--qlora needs bitsandbytes.*pip install 'mindspeed_lora\[qlora\]'"):
        check_nf4("cpu")
