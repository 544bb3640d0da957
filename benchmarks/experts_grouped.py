"""The routed experts of one layer with LoRA on every expert, forward and backward: each way of multiplying them, and the gradients' error.

    OMP_NUM_THREADS=1 python benchmarks/experts_grouped.py            # CPU: 64 experts of 192, hidden 512, 512 tokens, fp32 and bf16
    python benchmarks/experts_grouped.py --device cuda                # Qwen3-30B-A3B's layer (128 of 768, hidden 2048), 4096 tokens, bf16

Sides: one expert after the other, torch's grouped product, and the floor: the frozen weights' four products alone, all rows with one
expert's matrices. LoRA's six of r 16 come on top of it (13 % more operations on the CPU's sizes, 3 % on the others). Rows lie as a random
router spreads them. Errors: largest difference from float64 over the same inputs, relative to the largest value.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import common

common.add_root_to_path()

import torch  # noqa: E402

from mindspeed_lora.lora.experts import GroupedLoraLinear  # noqa: E402
from mindspeed_lora.model.experts import RoutedExperts  # noqa: E402
from mindspeed_lora.ops.grouped import Products, Sequential, TorchGrouped, default_products, grouped_refusal  # noqa: E402
from mindspeed_lora.parallel.context import single_process_context  # noqa: E402
from mindspeed_lora.weights.config import ExpertShape, ModelConfig, Routing  # noqa: E402

TOP_K, RANK = 8, 16
SIZES = {"cpu": (64, 192, 512, 512), "cuda": (128, 768, 2048, 4096), "dry": (8, 32, 64, 32)}
"""(experts, width of one, hidden size, tokens)."""
Tensors = dict[str, torch.Tensor]


def make_layer(device: torch.device, dtype: torch.dtype, sizes: tuple[int, int, int, int]) -> RoutedExperts:
    """Experts with LoRA on both linears, weights, A and B random."""
    count, width, hidden, _ = sizes
    shape = ExpertShape(count, width, routing=Routing(TOP_K))
    config = ModelConfig("qwen3_moe", hidden, width, 1, 8, 8, 64, 64, 64, 1e-6, 1e6, experts=shape)
    layer = RoutedExperts(config, shape, single_process_context(device), dtype).requires_grad_(False)
    torch.manual_seed(0)
    for name in ("linear_fc1", "linear_fc2"):
        setattr(layer, name, GroupedLoraLinear(getattr(layer, name), "default", r=RANK, lora_alpha=2 * RANK))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter, dtype=torch.float32) * parameter.shape[-1] ** -0.5)
    return layer


def inputs(device: torch.device, dtype: torch.dtype, sizes: tuple[int, int, int, int]) -> Tensors:
    """Tokens, their experts and weights, and the gradient of the result."""
    count, _, hidden, tokens = sizes
    generator = torch.Generator().manual_seed(1)
    weights, experts = torch.rand(tokens, count, generator=generator).topk(TOP_K, dim=-1)
    made = {"x": torch.randn(tokens, hidden, generator=generator), "dy": torch.randn(tokens, hidden, generator=generator)}
    return {name: value.to(device, dtype) for name, value in made.items()} | {"w": weights.to(device), "experts": experts.to(device)}


def run(layer: RoutedExperts, given: Tensors, products: Products) -> Tensors:
    """Forward and backward; y and the gradients of the tokens, of their weights, and of A and B."""
    for linear in (layer.linear_fc1, layer.linear_fc2):
        linear.get_base_layer().products = products  # type: ignore[operator]
    leaves = {name: given[name].detach().requires_grad_() for name in ("x", "w")}
    trained = {name: value for name, value in layer.named_parameters() if value.requires_grad}
    y = layer(leaves["x"], leaves["w"], given["experts"])
    gradients = torch.autograd.grad(y, [*leaves.values(), *trained.values()], given["dy"])
    return {"y": y.detach(), **dict(zip([*leaves, *trained], gradients, strict=True))}


def errors(layer: RoutedExperts, given: Tensors, kinds: dict[str, Products], sizes: tuple[int, int, int, int]) -> dict[str, float]:
    """Largest relative difference of each kind's results from float64's."""
    exact = make_layer(torch.device("cpu"), torch.float64, sizes)
    exact.load_state_dict({name: value.double().cpu() for name, value in layer.state_dict().items()})
    wide = {name: value.cpu() if name == "experts" else value.double().cpu() for name, value in given.items()}
    expected = run(exact, wide, Sequential())
    found = {}
    for kind, products in kinds.items():
        got = run(layer, given, products)
        found[kind] = max(((got[n].double().cpu() - v).abs().max() / v.abs().max()).item() for n, v in expected.items())
    return found


def floor_of(layer: RoutedExperts, given: Tensors) -> Callable[[], None]:
    """The frozen weights' four products, all rows with one expert's matrices."""
    fc1, fc2 = (linear.get_base_layer().weight[0] for linear in (layer.linear_fc1, layer.linear_fc2))  # type: ignore[operator]
    rows = given["x"].repeat(TOP_K, 1)
    inside, narrow = rows @ fc1.t(), rows[:, : fc2.shape[1]].contiguous()

    def products() -> None:
        rows @ fc1.t()
        narrow @ fc2.t()
        rows @ fc2
        inside @ fc1

    return products


def measure(device: torch.device, dtype: torch.dtype, sizes: tuple[int, int, int, int], rounds: int) -> dict[str, Any]:
    """Seconds of each side, and errors."""
    layer, given = make_layer(device, dtype, sizes), inputs(device, dtype, sizes)
    columns = (RANK, *sizes[1:3])
    kinds: dict[str, Products] = {kind.name: kind for kind in (Sequential(), default_products(device, dtype, columns))}
    if grouped_refusal(device, dtype, columns) is None:
        kinds[TorchGrouped.name] = TorchGrouped()
    sides: dict[str, Callable[[], object]] = {name: lambda kind=kind: run(layer, given, kind) for name, kind in kinds.items()}  # type: ignore[misc]
    sides["floor"] = floor_of(layer, given)
    values = common.alternate({name: common.seconds(work, 3) for name, work in sides.items()}, rounds, 2)
    return {"seconds": values, "error": errors(layer, given, kinds, sizes)}


def main() -> int:
    """Measure, print, write."""
    made = common.parser(__doc__)
    made.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options = made.parse_args()
    device, sizes = torch.device(options.device), SIZES["dry" if options.dry_run else options.device]
    results, rows = {}, []
    for dtype in (torch.float32, torch.bfloat16) if device.type == "cpu" else (torch.bfloat16,):
        name = str(dtype).removeprefix("torch.")
        results[name] = found = measure(device, dtype, sizes, options.rounds)
        middle = common.medians(found["seconds"])
        for side, seconds in middle.items():
            error = found["error"].get(side)
            words = ["" if error is None else f"{error:.1e}", f"{100 * middle['floor'] / seconds:.0f} %"]
            rows.append([name, side, f"{1000 * seconds:.2f}", *words])
    head = ["dtype", "side", "ms, forward and backward", "largest error", "floor's share"]
    body = common.markdown(head, rows) + f"\n\n(experts, width, hidden, tokens) {sizes}, top {TOP_K}, r {RANK}."
    if options.dry_run:
        print(body)
        return 0
    threads = torch.get_num_threads()
    place = device.type if device.type == "cuda" else f"cpu, {threads} thread{'s' if threads > 1 else ''}"
    name = f"experts_grouped_{device.type}" + (f"_{threads}" if device.type == "cpu" else "")
    common.write_results(name, f"Experts of a layer, {place} (`experts_grouped.py`)", results, body, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
