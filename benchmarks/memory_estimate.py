"""The memory estimate against what torch allocates, for models of 1 GiB and more: LoRA and full, recomputation, rows, lengths.

    OMP_NUM_THREADS=2 python benchmarks/memory_estimate.py            # CPU: the allocator's events (allocated.py)
    python benchmarks/memory_estimate.py --device cuda                # torch.cuda.max_memory_allocated
    python benchmarks/memory_estimate.py --experts                    # models with experts, LoRA on each of them

Weights hold one value (their size matters, not their content); one step of the real engine: forward, backward, clipping, AdamW.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import common

common.add_root_to_path()

import torch  # noqa: E402
from allocated import Allocated  # noqa: E402
from engine import build_stage, step_of  # noqa: E402

from mindspeed_lora.arguments.configs import LORA_TARGETS, RecomputeFlags  # noqa: E402
from mindspeed_lora.ops.products import widens  # noqa: E402
from mindspeed_lora.training.memory import GIB, estimate  # noqa: E402
from mindspeed_lora.training.sizes import RunSizes  # noqa: E402
from mindspeed_lora.weights.config import ExpertShape, ModelConfig, Routing  # noqa: E402
from mindspeed_lora.weights.lora_spec import LoraSpec  # noqa: E402

GIB_MODEL = ModelConfig("qwen3", 2048, 6144, 8, 16, 8, 128, 32000, 32000, 1e-6, 1e6, qk_layernorm=True)  # 1.0 GiB in bf16
SMALL = ModelConfig("llama", 256, 768, 4, 4, 2, 64, 2048, 2048, 1e-6, 1e6)
ROUTED = ExpertShape(64, 384, routing=Routing(8, normalize=True))
GIB_EXPERTS = ModelConfig("qwen3_moe", 1024, 3072, 8, 16, 4, 64, 32000, 32000, 1e-6, 1e6, qk_layernorm=True, experts=ROUTED)  # 1.3 GiB
SMALL_EXPERTS = replace(
    GIB_EXPERTS, hidden_size=128, num_layers=2, vocab_size=2048, padded_vocab_size=2048, experts=replace(ROUTED, count=16)
)
UNIFORM, BLOCK, SELECTIVE = RecomputeFlags("full", "uniform", 1), RecomputeFlags("full", "block", 4), RecomputeFlags("selective")
LORA = LoraSpec(16, 32.0, LORA_TARGETS)


@dataclass(frozen=True)
class Case:
    """One run. ``dtype``: torch's name."""

    lora: bool
    dtype: str
    recompute: RecomputeFlags
    rows: int
    length: int
    micro_batches: int = 1

    @property
    def words(self) -> tuple[str, ...]:
        """The cells of the table."""
        mode = " ".join(str(value) for value in vars(self.recompute).values() if value is not None) or "off"
        return ("LoRA r16" if self.lora else "full", self.dtype, mode, f"{self.rows} x {self.length}", str(self.micro_batches))


CASES = (
    Case(True, "bfloat16", RecomputeFlags(), 1, 512),
    Case(True, "bfloat16", RecomputeFlags(), 2, 1024),
    Case(True, "bfloat16", UNIFORM, 1, 2048),
    Case(True, "bfloat16", BLOCK, 2, 512),
    Case(True, "bfloat16", SELECTIVE, 1, 1024),
    Case(True, "float32", RecomputeFlags(), 1, 512, 2),
    Case(False, "bfloat16", RecomputeFlags(), 1, 512),
    Case(False, "bfloat16", UNIFORM, 2, 256),
)
EXPERT_CASES = (
    Case(True, "bfloat16", RecomputeFlags(), 1, 512),
    Case(True, "bfloat16", UNIFORM, 1, 1024),
    Case(True, "float32", RecomputeFlags(), 1, 256),
    Case(False, "bfloat16", RecomputeFlags(), 1, 256),
)


def sizes_of(case: Case, model: ModelConfig, device: torch.device) -> RunSizes:
    """What the estimate is told."""
    dtype = getattr(torch, case.dtype)
    return RunSizes(
        model,
        LORA if case.lora else None,
        dtype.itemsize,
        micro_batch_size=case.rows,
        num_micro_batches=case.micro_batches,
        length=case.length,
        recompute=case.recompute,
        device_type=device.type,
        widened=widens(device.type, dtype),
    )


def run_of(case: Case, model: ModelConfig, device: torch.device) -> Callable[[], None]:
    """Build the engine; returns one training step."""
    stage = build_stage(model, LORA if case.lora else None, getattr(torch, case.dtype), case.recompute, True, device)
    with torch.no_grad():
        for name, parameter in stage.named_parameters():
            if ".lora_" not in name:
                parameter.fill_(1.0 if "norm" in name else 0.01)
    step = step_of(stage, case.rows)
    ids = torch.randint(0, model.vocab_size, (case.rows * case.micro_batches, case.length), device=device)

    def run() -> None:
        step(ids)

    return run


def allocated_peak(case: Case, model: ModelConfig, device: torch.device, steps: int = 1) -> int:
    """Largest number of bytes that torch held, weights included."""
    gc.collect()
    if device.type == "cpu":
        with Allocated() as allocated:
            step = run_of(case, model, device)
            for _ in range(steps):
                step()
            del step
        return allocated.peak
    module = torch.get_device_module(device)
    module.empty_cache()
    module.reset_peak_memory_stats()
    step = run_of(case, model, device)
    for _ in range(steps):
        step()
    return int(module.max_memory_allocated())


def main() -> int:
    """Measure every case, print and write the table."""
    parser = common.parser(__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--experts", action="store_true", help="models with experts")
    parser.add_argument("--cases", type=int, nargs="+", help="measure these alone, counted from 0 (default: all)")
    options = parser.parse_args()
    device = torch.device(options.device)
    cases, models = (EXPERT_CASES, (GIB_EXPERTS, SMALL_EXPERTS)) if options.experts else (CASES, (GIB_MODEL, SMALL))
    model = models[options.dry_run]
    results: list[dict[str, Any]] = []
    cases = cases[:2] if options.dry_run else cases
    for case in [cases[number] for number in options.cases or range(len(cases))]:
        parts = estimate(sizes_of(case, model, device), 0)
        peak = allocated_peak(case, model, device)
        error = parts["total"] / peak - 1
        results.append({"case": case.words, "allocated": peak, "estimate": parts, "error": error})
        print(*case.words, f"allocated {peak / GIB:.3f} GiB, estimate {parts['total'] / GIB:.3f}, {100 * error:+.1f} %", flush=True)
    head = ("training", "dtype", "recomputation", "rows x length", "micro-batches", "allocated GiB", "estimate GiB", "error")
    cells = []
    for one in results:
        estimated = one["estimate"]["total"] / GIB
        cells.append((*one["case"], f"{one['allocated'] / GIB:.3f}", f"{estimated:.3f}", f"{100 * one['error']:+.1f} %"))
    worst = max(abs(one["error"]) for one in results)
    body = f"{common.markdown(head, cells)}\n\nLargest error {100 * worst:.1f} % (bar: 10 %). Model: {model}."
    if options.dry_run:
        print(body)
    else:
        words = (" with experts", "_experts") if options.experts else ("", "")
        name, title = f"memory_estimate{words[1]}_{device.type}", f"Memory estimate{words[0]}, {device.type} (`memory_estimate.py`)"
        common.write_results(name, title, {"results": results}, body, options.output)
    return 0 if options.dry_run or worst <= 0.1 else 1


if __name__ == "__main__":
    sys.exit(main())
