"""Run in a process of its own, with the stub CANN libraries preloaded: device choice, process group, fused LoRA, a decoder
layer and the loss head at TP4, SP on and off.

The real ``torch_npu`` checks every operator's schema, shapes and dtypes on fake tensors; no numbers are computed. Collectives go
to a group that does nothing, and are counted.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from mindspeed_lora.device import torch_version
from mindspeed_lora.lora.experts import GroupedLoraLinear
from mindspeed_lora.lora.layers import ParallelLoraLinear
from mindspeed_lora.model.decode import PackedDocuments
from mindspeed_lora.model.experts import RoutedExperts
from mindspeed_lora.model.layers import TransformerLayer
from mindspeed_lora.model.rotary import inverse_frequencies, rotary_tables
from mindspeed_lora.parallel.context import ParallelContext
from mindspeed_lora.parallel.cross_entropy import linear_cross_entropy
from mindspeed_lora.parallel.grouped import choose_products
from mindspeed_lora.parallel.layers import ColumnParallelLinear, RowParallelLinear
from mindspeed_lora.weights.config import ExpertShape, ModelConfig, Routing

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from collective_counts import Calls, counted  # the benchmarks are no package

HIDDEN, RANK, LENGTH, BATCH = 256, 8, 64, 2


def check_device() -> None:
    from mindspeed_lora.device import collective_backend, make_profiler, select_device, select_device_type

    assert select_device_type("auto") == "npu"
    device = select_device("auto")
    assert str(device) == "npu:0", device
    assert collective_backend(device) == "cpu:gloo,npu:hccl"
    profiler = make_profiler(device, record_shapes=True, with_memory=True, with_stack=True)
    assert type(profiler).__module__.startswith("torch_npu") and all(callable(getattr(profiler, n)) for n in ("start", "stop"))
    assert callable(profiler.export_chrome_trace)
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(f"{folder}/store", 1)
        dist.init_process_group(collective_backend(device), store=store, rank=0, world_size=1)
        total = torch.ones(1)
        dist.all_reduce(total)
        assert total.item() == 1.0
        dist.destroy_process_group()
    print("device: npu:0, backend cpu:gloo,npu:hccl")


def start_fake_group(tp_size: int) -> None:
    """A process group of ``tp_size`` ranks whose collectives do nothing; this process is rank 0."""
    import torch_npu

    if torch.__version__.startswith("2.7"):  # there, collectives on fake tensors want it imported
        importlib.import_module("torch.distributed._tools.fake_collectives")
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch_npu.op_plugin.meta._meta_registrations.get_soc_version = lambda: 220
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=tp_size)


def npu_context(sequence_parallel: bool) -> ParallelContext:
    group = dist.group.WORLD
    assert group is not None
    return ParallelContext(torch.device("npu:0"), tp_size=group.size(), tp_group=group, sequence_parallel=sequence_parallel)


def with_lora(base: torch.nn.Module, fusion: bool) -> torch.nn.Module:
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    lora = ParallelLoraLinear(base, "default", r=RANK, lora_alpha=16)
    lora.fusion = fusion
    return lora


def check_gradients(parameters: Iterable[torch.nn.Parameter], number: int) -> None:
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    assert len(trained) == number, len(trained)
    for parameter in trained:
        grad = parameter.grad
        assert grad is not None and grad.device.type == "npu" and (grad.shape, grad.dtype) == (parameter.shape, parameter.dtype)


def expected_calls(sequence_parallel: bool, pairs: int) -> tuple[Calls, Calls]:
    """Forward's and backward's collectives of ``pairs`` column + row pairs with fused LoRA: the frozen pair's, and r columns more."""
    tokens, tp_size = LENGTH * BATCH, dist.get_world_size()
    width = 2  # bytes of a bf16
    narrow, wide = tokens * HIDDEN * width, tokens * (HIDDEN + RANK) * width
    if sequence_parallel:
        one = [("all_gather", narrow // tp_size), ("reduce_scatter", wide)]
        return one * pairs, one * pairs
    return [("all_reduce", wide)] * pairs, [("all_reduce", narrow)] * pairs


def check_functions(sequence_parallel: bool, fusion: bool) -> None:
    """A column + row pair; then the column layer whose input needs no gradient, as in a model's first layer."""
    context = npu_context(sequence_parallel)
    rows = LENGTH // (context.tp_size if sequence_parallel else 1)
    with FakeTensorMode(allow_non_fake_inputs=True):
        column = with_lora(ColumnParallelLinear(HIDDEN, 4 * HIDDEN, context, bias=True, dtype=torch.bfloat16), fusion)
        row = with_lora(RowParallelLinear(4 * HIDDEN, HIDDEN, context, dtype=torch.bfloat16), fusion)
        x = torch.empty(rows, BATCH, HIDDEN, dtype=torch.bfloat16, device="npu:0", requires_grad=True)
        with counted() as forward:
            y = row(torch.nn.functional.silu(column(x)))
        with counted() as backward:
            y.sum().backward()
        assert y.shape == x.shape and x.grad is not None and x.grad.shape == x.shape
        check_gradients([*column.parameters(), *row.parameters()], 4)
        if fusion:
            assert (forward, backward) == expected_calls(sequence_parallel, 1), (forward, backward)
        else:
            assert len(forward) + len(backward) > (4 if sequence_parallel else 2), "more than the frozen pair's"
        with counted() as first:
            column(x.detach()).sum().backward()
        if fusion:
            tokens = LENGTH * BATCH
            narrow, low_rank = tokens * HIDDEN * 2 // context.tp_size, tokens * RANK * 2
            assert first == ([("all_gather", narrow), ("reduce_scatter", low_rank)] if sequence_parallel else []), first
    kind = "fused" if fusion else "unfused"
    print(f"{kind} LoRA pair at TP{context.tp_size}, SP {sequence_parallel}: {len(forward)} + {len(backward)} collectives")


def check_layer(sequence_parallel: bool) -> None:
    """A decoder layer, forward and backward; then over packed documents, with and without a window."""
    config = ModelConfig("qwen3", HIDDEN, 512, 2, 16, 4, 32, 1000, 1000, 1e-6, 1e6, qk_layernorm=True)
    context = npu_context(sequence_parallel)
    rows = LENGTH // (context.tp_size if sequence_parallel else 1)
    with FakeTensorMode(allow_non_fake_inputs=True):
        layer = TransformerLayer(config, 0, context, torch.bfloat16)
        for parameter in layer.parameters():
            parameter.requires_grad_(False)
        for parent, name in (
            (layer.self_attention, "linear_qkv"),
            (layer.self_attention, "linear_proj"),
            (layer.mlp, "linear_fc1"),
            (layer.mlp, "linear_fc2"),
        ):
            setattr(parent, name, with_lora(getattr(parent, name), fusion=True))
        tables = rotary_tables(inverse_frequencies(config).to("npu:0"), torch.arange(LENGTH, device="npu:0").unsqueeze(0), torch.bfloat16)
        hidden = torch.empty(rows, BATCH, HIDDEN, dtype=torch.bfloat16, device="npu:0", requires_grad=True)
        for documents, window in ((None, None), (PackedDocuments([[20, 64], [64]]), None), (PackedDocuments([[20, 64], [64]]), 16)):
            layer.self_attention.window = window
            layer.zero_grad()
            hidden.grad = None
            with counted() as forward:
                output = layer(hidden, tables, documents)
            assert output.shape == hidden.shape and output.device.type == "npu" and output.dtype == torch.bfloat16
            with counted() as backward:
                output.sum().backward()
            check_gradients(layer.parameters(), 8)
            assert hidden.grad is not None
            assert (forward, backward) == expected_calls(sequence_parallel, 2), (forward, backward)
    print(f"layer at TP{context.tp_size}, SP {sequence_parallel}: {len(forward)} + {len(backward)} collectives, 8 LoRA gradients")


def check_experts() -> None:
    """A mixture's routed experts with LoRA on both linears, in grouped products: values' and gradients' shapes and dtypes."""
    choice = Routing(top_k=2)
    config = ModelConfig("qwen3_moe", HIDDEN, 512, 2, 16, 4, 32, 1000, 1000, 1e-6, 1e6, experts=ExpertShape(8, 128, choice))
    assert config.experts is not None
    context = ParallelContext(torch.device("npu:0"))
    with FakeTensorMode(allow_non_fake_inputs=True):
        experts = RoutedExperts(config, config.experts, context, torch.bfloat16).requires_grad_(False)
        for name in ("linear_fc1", "linear_fc2"):
            setattr(experts, name, GroupedLoraLinear(getattr(experts, name), "default", r=RANK, lora_alpha=16))
        assert choose_products([experts], config, True) == "npu_grouped_matmul"
        tokens = torch.empty(LENGTH, HIDDEN, dtype=torch.bfloat16, device="npu:0", requires_grad=True)
        weights = torch.empty(LENGTH, 2, device="npu:0", requires_grad=True)
        output = experts(tokens, weights, torch.zeros(LENGTH, 2, dtype=torch.int64, device="npu:0"))
        assert output.shape == tokens.shape and output.dtype == tokens.dtype
        if torch_version() < (2, 8):
            print("experts: npu_grouped_matmul, forward alone: the fake kernel of torch_npu 2.7 refuses group_type 2")
            return
        output.sum().backward()
        check_gradients(experts.parameters(), 4)
        assert tokens.grad is not None and weights.grad is not None and weights.grad.dtype == torch.float32
    print("experts: npu_grouped_matmul, 4 LoRA gradients")


def check_loss(trained_head: bool) -> None:
    """The loss head over this rank's rows of the vocabulary, two small collectives in forward."""
    context, vocab_size = npu_context(True), 1000
    with FakeTensorMode(allow_non_fake_inputs=True):
        weight = torch.empty(vocab_size // context.tp_size, HIDDEN, dtype=torch.bfloat16, device="npu:0", requires_grad=trained_head)
        hidden = torch.empty(LENGTH, HIDDEN, dtype=torch.bfloat16, device="npu:0", requires_grad=True)
        target = torch.zeros(LENGTH, dtype=torch.int64, device="npu:0")
        with counted() as calls:
            losses = linear_cross_entropy(hidden, weight, target, vocab_size, context)
            losses.sum().backward()
        assert losses.shape == (LENGTH,) and losses.dtype == torch.float32
        assert calls == [("all_reduce", 4 * LENGTH), ("all_reduce", 8 * LENGTH)], calls
        assert hidden.grad is not None and hidden.grad.dtype == torch.bfloat16
        assert (weight.grad is not None) == trained_head
    print(f"loss head at TP{context.tp_size}, trained {trained_head}: {len(calls)} collectives")


if __name__ == "__main__":
    check_device()
    start_fake_group(4)
    for sp in (True, False):
        for fused in (True, False):
            check_functions(sp, fused)
        check_layer(sp)
    check_experts()
    for trained in (False, True):
        check_loss(trained)
    dist.destroy_process_group()
