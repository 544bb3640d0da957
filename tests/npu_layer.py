"""Run in a process of its own, with the stub CANN libraries preloaded: device choice, process group, one decoder layer.

The real ``torch_npu`` checks every operator's schema, shapes and dtypes on fake tensors; no numbers are computed.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile

import torch
import torch.distributed as dist


def check_device() -> None:
    from mindspeed_lora.device import collective_backend, select_device, select_device_type

    assert select_device_type("auto") == "npu"
    device = select_device("auto")
    assert str(device) == "npu:0", device
    assert collective_backend(device) == "cpu:gloo,npu:hccl"
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(f"{folder}/store", 1)
        dist.init_process_group(collective_backend(device), store=store, rank=0, world_size=1)
        total = torch.ones(1)
        dist.all_reduce(total)
        assert total.item() == 1.0
        dist.destroy_process_group()
    print("device: npu:0, backend cpu:gloo,npu:hccl")


def check_layer(tp_size: int) -> None:
    import torch_npu
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from mindspeed_lora.lora.layers import ParallelLoraLinear
    from mindspeed_lora.model.decode import PackedDocuments
    from mindspeed_lora.model.layers import TransformerLayer
    from mindspeed_lora.parallel.context import ParallelContext
    from mindspeed_lora.weights.config import ModelConfig

    torch_npu.op_plugin.meta._meta_registrations.get_soc_version = lambda: 220
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=tp_size)
    config = ModelConfig("qwen3", 256, 512, 2, 16, 4, 32, 1000, 1000, 1e-6, 1e6, qk_layernorm=True)
    context = ParallelContext(torch.device("npu:0"), tp_size=tp_size, tp_group=dist.group.WORLD, sequence_parallel=True)
    from mindspeed_lora.model.rotary import inverse_frequencies, rotary_tables

    with FakeTensorMode(allow_non_fake_inputs=True):
        layer = TransformerLayer(config, 0, dataclasses.replace(context), torch.bfloat16)
        for parameter in layer.parameters():
            parameter.requires_grad_(False)
        for parent, name in (
            (layer.self_attention, "linear_qkv"),
            (layer.self_attention, "linear_proj"),
            (layer.mlp, "linear_fc1"),
            (layer.mlp, "linear_fc2"),
        ):
            lora = ParallelLoraLinear(getattr(parent, name), "default", r=8, lora_alpha=16)
            lora.fusion = True
            setattr(parent, name, lora)
        length = 64
        inverse = inverse_frequencies(config).to("npu:0")
        tables = rotary_tables(inverse, torch.arange(length, device="npu:0").unsqueeze(0), torch.bfloat16)
        hidden = torch.empty(length // tp_size, 2, 256, dtype=torch.bfloat16, device="npu:0", requires_grad=True)
        output = layer(hidden, tables)
        assert output.shape == hidden.shape and output.device.type == "npu" and output.dtype == torch.bfloat16
        output.sum().backward()
        grads = [parameter.grad for parameter in layer.parameters() if parameter.requires_grad]
        assert len(grads) == 8 and all(grad is not None and grad.device.type == "npu" for grad in grads)
        assert hidden.grad is not None
        for layer.self_attention.window in (None, 16):
            packed = layer(hidden, tables, PackedDocuments([[20, 64], [64]]))
            assert packed.shape == hidden.shape
    dist.destroy_process_group()
    print(f"layer: forward and backward on fake npu tensors at TP{tp_size} with SP, 8 LoRA gradients")


if __name__ == "__main__":
    check_device()
    check_layer(4)
    sys.exit(0)
