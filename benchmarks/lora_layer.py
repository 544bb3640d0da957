"""One LoRA layer forward and backward: fused and unfused against the frozen layer, and the gradients' error against float64.

    OMP_NUM_THREADS=2 python benchmarks/lora_layer.py                      # CPU: fp32 and bf16, 1024 x 1024 to 2048 x 2048
    OMP_NUM_THREADS=1 python benchmarks/lora_layer.py --cpu-time           # on a machine that is not this measurement's alone
    python benchmarks/lora_layer.py --device cuda                          # bf16, 8192 tokens, 4096 x 4096 and 4096 x 12288

The roofline counts FLOPs, the frozen layer's two products and LoRA's six: 1 + 3 r (in + out) / (2 in out).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import common

common.add_root_to_path()
RANK = 16


def build(device: str, dtype: Any, in_size: int, out_size: int, tokens: int) -> tuple[Any, Any, Any]:
    """(layer, x, dy): a column layer with LoRA, drawn values."""
    import torch

    from mindspeed_lora.lora.layers import ParallelLoraLinear
    from mindspeed_lora.parallel.context import ParallelContext
    from mindspeed_lora.parallel.layers import ColumnParallelLinear

    torch.manual_seed(0)
    base = ColumnParallelLinear(in_size, out_size, ParallelContext(torch.device(device)), dtype=dtype)
    base.weight.requires_grad_(False).normal_(std=in_size**-0.5)
    layer = ParallelLoraLinear(base, "default", r=RANK, lora_alpha=2 * RANK)
    for matrix in (layer.lora_A, layer.lora_B):
        torch.nn.init.normal_(matrix["default"].weight, std=in_size**-0.5)
    x = torch.randn(tokens, 1, in_size, device=device, dtype=dtype, requires_grad=True)
    return layer, x, torch.randn(tokens, 1, out_size, device=device, dtype=dtype)


def passes(run: Callable[[Any], Any], x: Any, dy: Any) -> Callable[[], None]:
    """Forward and backward of ``run``."""

    def work() -> None:
        x.grad = None
        run(x).backward(dy)

    return work


def worst_error(layer: Any, x: Any, dy: Any) -> float:
    """Largest relative error (norm) of y, dx, dA, dB against float64 over the same rounded inputs."""
    a, b, weight = (
        m.detach().double().requires_grad_()
        for m in (layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.base_layer.weight)
    )
    wide = x.detach().double().requires_grad_()
    want = wide @ weight.t() + 2.0 * (wide @ a.t()) @ b.t()
    want.backward(dy.double())
    layer.zero_grad()
    x.grad = None
    got = layer(x)
    got.backward(dy)
    pairs = ((got, want), (x.grad, wide.grad), (layer.lora_A["default"].weight.grad, a.grad), (layer.lora_B["default"].weight.grad, b.grad))
    return max(float(((one.double() - other).norm() / other.norm()).detach()) for one, other in pairs)


def main() -> None:
    """Measure, print, write."""
    import torch

    made = common.parser(__doc__)
    made.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    made.add_argument("--cpu-time", action="store_true", help="count this process's CPU time (on one thread), in a section of its own")
    options = made.parse_args()
    clock = time.process_time if options.cpu_time else time.perf_counter
    shapes, tokens = (
        ([(4096, 4096), (4096, 12288)], 8192) if options.device == "cuda" else ([(1024, 1024), (1024, 3072), (2048, 2048)], 2048)
    )
    if options.dry_run:
        shapes, tokens = [(64, 64)], 128
    rows: list[list[object]] = []
    for dtype in (torch.bfloat16,) if options.device == "cuda" else (torch.float32, torch.bfloat16):
        for in_size, out_size in shapes:
            layer, x, dy = build(options.device, dtype, in_size, out_size, tokens)
            layer.fusion = False
            unfused, unfused_error = common.seconds(passes(layer, x, dy), clock=clock), worst_error(layer, x, dy)
            fused_layer, _, _ = build(options.device, dtype, in_size, out_size, tokens)
            fused_layer.fusion = True
            error = worst_error(fused_layer, x, dy)
            sides = {"frozen": common.seconds(passes(layer.base_layer, x, dy), clock=clock), "unfused": unfused}
            sides["fused"] = common.seconds(passes(fused_layer, x, dy), clock=clock)
            values = common.alternate(sides, options.rounds, 2)
            roof = 1 + 3 * RANK * (in_size + out_size) / (2 * in_size * out_size)
            ratios = [common.ratio(values, side, "frozen") for side in ("fused", "unfused")]
            frozen_ms = f"{1000 * common.medians(values)['frozen']:.2f}"
            rows.append([str(dtype)[6:], f"{in_size} x {out_size}", frozen_ms, *ratios, roof, f"{error:.1e}", f"{unfused_error:.1e}"])
    head = ["dtype", "layer", "frozen ms", "fused / frozen", "unfused / frozen", "roofline", "fused error", "unfused error"]
    body = common.markdown(head, rows)
    if options.dry_run:
        print(body)
        return
    own = f"{options.device}{', CPU time' if options.cpu_time else ''}"
    name = f"lora_layer_{options.device}{'_cpu_time' if options.cpu_time else ''}"
    common.write_results(name, f"LoRA layer, {own} (`lora_layer.py`)", {"rows": rows}, body, options.output)


if __name__ == "__main__":
    sys.exit(main())
