"""The memory estimate: its counts are the model's, and its total is what torch allocates."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from pool import ProcessPool

from mindspeed_lora.arguments.configs import LORA_TARGETS, RecomputeFlags
from mindspeed_lora.device import torch_version
from mindspeed_lora.lora.inject import inject_lora
from mindspeed_lora.model.stage import build_stage_modules
from mindspeed_lora.ops.cpu_attention import flash_takes_groups
from mindspeed_lora.parallel.context import ParallelContext
from mindspeed_lora.parallel.fill_drain import OLDEST_WITH_WAITING_TRANSFERS
from mindspeed_lora.training.memory import estimate
from mindspeed_lora.training.sizes import RunSizes, stage_parameters
from mindspeed_lora.weights.config import LatentShape, ModelConfig
from mindspeed_lora.weights.lora_spec import LoraSpec
from mindspeed_lora.weights.table import WeightTable

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import memory_estimate
from memory_layouts import LAYOUTS, Layout, measured_on_this_rank

LORA = LoraSpec(4, 8.0, LORA_TARGETS)
MODEL = ModelConfig("qwen3", 64, 96, 4, 8, 4, 16, 320, 320, 1e-6, 1e4, qk_layernorm=True)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("tp_size", "pp_size"), [(1, 1), (2, 1), (1, 2), (2, 4)])
def test_counts_are_those_of_the_built_stage(tied: bool, tp_size: int, pp_size: int) -> None:
    model = dataclasses.replace(MODEL, tied_embeddings=tied)
    sizes = RunSizes(model, LORA, 4, tp_size, pp_size)
    for pp_rank in range(pp_size):
        context = ParallelContext(torch.device("meta"), tp_size=tp_size, pp_size=pp_size, pp_rank=pp_rank)
        (stage,) = build_stage_modules(model, context, torch.float32)
        inject_lora(stage, WeightTable(model), LORA, context)
        counts = stage_parameters(sizes, pp_rank)
        sorts = {name: parameter.numel() for name, parameter in stage.named_parameters()}
        assert counts.adapter == sum(size for name, size in sorts.items() if ".lora_" in name)
        assert counts.base == sum(size for name, size in sorts.items() if ".lora_" not in name)
        linears = [size for name, size in sorts.items() if "base_layer.weight" in name]
        assert counts.layer_linear * counts.layers == sum(linears)


def test_the_total_is_the_sum_of_its_parts_and_grows_with_what_it_should() -> None:
    sizes = RunSizes(MODEL, LORA, 2, micro_batch_size=2, length=64)
    parts = estimate(sizes, 0)
    assert parts["total"] == sum(value for name, value in parts.items() if name != "total")
    more = estimate(dataclasses.replace(sizes, length=128), 0)
    assert more["activations"] == 2 * parts["activations"] and more["weights"] == parts["weights"]
    assert estimate(dataclasses.replace(sizes, recompute=RecomputeFlags("full", "uniform", 1)), 0)["activations"] < parts["activations"]


LATENT = dataclasses.replace(
    memory_estimate.SMALL, family="deepseek_v2", num_query_groups=4, kv_channels=96, latent=LatentShape(96, 64, 64, 32, 64)
)
DIRECT = dataclasses.replace(LATENT, latent=LatentShape(None, 64, 64, 32, 64))


@pytest.mark.parametrize(("model", "dtype"), [(LATENT, "bfloat16"), (DIRECT, "float32")])
def test_latent_attention_keeps_what_is_estimated(model: ModelConfig, dtype: str) -> None:
    case, device = memory_estimate.Case(True, dtype, RecomputeFlags(), 1, 512), torch.device("cpu")
    total = estimate(memory_estimate.sizes_of(case, model, device), 0)["total"]
    assert total == pytest.approx(memory_estimate.allocated_peak(case, model, device), rel=0.15)


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize(("dtype", "recompute"), [("bfloat16", RecomputeFlags()), ("float32", RecomputeFlags("full", "uniform", 1))])
def test_the_total_is_what_torch_allocates(lora: bool, dtype: str, recompute: RecomputeFlags) -> None:
    """A small version of benchmarks/memory_estimate.py (there: 10 % for models of 1 GiB); tens of MiB have larger odds and ends."""
    case = memory_estimate.Case(lora, dtype, recompute, 1, 512)
    device = torch.device("cpu")
    total = estimate(memory_estimate.sizes_of(case, memory_estimate.SMALL, device), 0)["total"]
    assert total == pytest.approx(memory_estimate.allocated_peak(case, memory_estimate.SMALL, device), rel=0.15)


@pytest.mark.parametrize(("lora", "dtype"), [(True, "bfloat16"), (True, "float32"), (False, "bfloat16")])
def test_the_total_with_experts_is_what_torch_allocates(lora: bool, dtype: str) -> None:
    case = memory_estimate.Case(lora, dtype, RecomputeFlags(), 1, 512)
    model, device = memory_estimate.SMALL_EXPERTS, torch.device("cpu")
    if not flash_takes_groups():  # there a CPU keeps a copy of keys and values for each query head, which the estimate leaves out
        model = dataclasses.replace(model, num_query_groups=model.num_attention_heads)
    total = estimate(memory_estimate.sizes_of(case, model, device), 0)["total"]
    assert total == pytest.approx(memory_estimate.allocated_peak(case, model, device), rel=0.1)


def test_what_experts_keep_is_cut_as_they_are() -> None:
    """A rank with uncut experts (expert TP 1) gets its part of the rows; attention's adapters alone keep no linear's input."""
    whole = RunSizes(memory_estimate.GIB_EXPERTS, memory_estimate.LORA, 2, tp_size=2, length=128)
    uncut = dataclasses.replace(whole, ep_size=2, expert_tensor_parallel_size=1)
    attention = dataclasses.replace(whole, lora=LoraSpec(16, 32.0, ("linear_qkv", "linear_proj")))
    kept = [estimate(sizes, 0)["activations"] for sizes in (whole, uncut, attention)]
    assert kept[1] < 0.7 * kept[0] and kept[2] < 0.7 * kept[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", [*LAYOUTS, Layout(qlora=True)], ids=["TP2-SP", "PP2", "fsdp-base", "qlora"])
def test_every_ranks_total_is_what_torch_allocates_there(pool: ProcessPool, layout: Layout, dtype: str) -> None:
    """benchmarks/memory_layouts.py: within 10 % for models of 1 GiB."""
    if layout.qlora:
        pytest.importorskip("bitsandbytes")
    if layout.pp > 1 and torch_version() < OLDEST_WITH_WAITING_TRANSFERS:
        pytest.skip("on a CPU this torch's pipeline holds all micro-batches; the estimate is of the library's schedules")
    for rank, (peak, total) in enumerate(pool.run(measured_on_this_rank, layout.processes, layout, memory_estimate.SMALL, dtype, 256)):
        assert total == pytest.approx(peak, rel=0.15), f"rank {rank}"
