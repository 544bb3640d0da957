"""How a LoRA step grows with sequence length, rank r and rows: fused and unfused layers against the frozen model.

    OMP_NUM_THREADS=2 python benchmarks/train_step_scaling.py                  # CPU, fp32, the model of train_step_cpu.py
    OMP_NUM_THREADS=1 python benchmarks/train_step_scaling.py --cpu-time       # on a machine that is not this measurement's alone
    OMP_NUM_THREADS=2 python benchmarks/train_step_scaling.py --changes r      # one table alone, in a section of its own
    python benchmarks/train_step_scaling.py --device cuda                      # bf16, 8 layers of Qwen3-8B's shape

From 2 rows of 256 tokens at r 16 (cuda: 2 of 2048) one size changes at a time. "Frozen" is forward and the activation gradient of the bare
model: the floor of a LoRA step. Each size is built, measured in turns and dropped.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from typing import Any

import common

common.add_root_to_path()

import torch  # noqa: E402
from engine import build_stage, frozen_step_of, step_of  # noqa: E402

from mindspeed_lora.arguments.configs import LORA_TARGETS, RecomputeFlags  # noqa: E402
from mindspeed_lora.weights.config import ModelConfig  # noqa: E402
from mindspeed_lora.weights.lora_spec import LoraSpec  # noqa: E402

CPU_MODEL = ModelConfig("qwen3", 512, 1536, 8, 8, 4, 64, 32000, 32000, 1e-6, 1e6, qk_layernorm=True)
CUDA_MODEL = ModelConfig("qwen3", 4096, 12288, 8, 32, 8, 128, 151936, 151936, 1e-6, 1e6, qk_layernorm=True)
TINY_MODEL = ModelConfig("qwen3", 64, 96, 2, 4, 2, 16, 320, 320, 1e-6, 1e6, qk_layernorm=True)


@dataclass(frozen=True)
class Size:
    """Of one step."""

    rows: int
    length: int
    r: int


def sizes_of(cuda: bool, tiny: bool) -> list[tuple[str, Size]]:
    """(which size changes, the step)."""
    base = Size(2, 2048 if cuda else 256, 16)
    lengths, ranks, rows = ((512, 1024, 2048, 4096, 8192) if cuda else (128, 256, 512, 1024, 2048)), (8, 16, 32, 64, 128), (1, 2, 4, 8)
    if tiny:
        base, lengths, ranks, rows = Size(2, 16, 4), (8, 16), (2, 4), (1, 2)
    made = [("length", replace(base, length=value)) for value in lengths]
    made += [("r", replace(base, r=value)) for value in ranks]
    return made + [("rows", replace(base, rows=value)) for value in rows]


def measure(model: ModelConfig, size: Size, device: torch.device, rounds: int, clock: Any) -> common.Values:
    """Seconds of each side."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    ids = torch.randint(0, model.vocab_size, (size.rows, size.length), device=device)

    def side(kind: str) -> Any:
        lora = None if kind == "frozen" else LoraSpec(size.r, 2.0 * size.r, LORA_TARGETS)
        stage = build_stage(model, lora, dtype, RecomputeFlags(), kind == "fused", device).train()
        with torch.no_grad():
            for name, parameter in stage.named_parameters():
                if ".lora_" not in name:
                    parameter.normal_(std=0.02) if parameter.dim() > 1 else parameter.fill_(1.0)
        step = frozen_step_of(stage) if kind == "frozen" else step_of(stage, size.rows)
        return common.seconds(lambda: step(ids), clock=clock)

    return common.alternate({kind: side(kind) for kind in ("frozen", "fused", "unfused")}, rounds, 1)


def main() -> None:
    """Measure, print, write."""
    made = common.parser(__doc__)
    made.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    made.add_argument("--cpu-time", action="store_true", help="count this process's CPU time (on one thread), in a section of its own")
    made.add_argument("--changes", choices=("length", "r", "rows"), help="this size alone (default: all three)")
    options = made.parse_args()
    device, clock = torch.device(options.device), time.process_time if options.cpu_time else time.perf_counter
    model = TINY_MODEL if options.dry_run else CUDA_MODEL if options.device == "cuda" else CPU_MODEL
    rows, results = [], []
    for changes, size in sizes_of(options.device == "cuda", options.dry_run):
        if options.changes not in (None, changes):
            continue
        values = measure(model, size, device, options.rounds, clock)
        middle = common.medians(values)
        tokens = size.rows * size.length / middle["fused"]
        ratios = [common.ratio(values, "fused", "frozen"), common.ratio(values, "unfused", "fused")]
        rows.append([changes, size.rows, size.length, size.r, f"{1000 * middle['fused']:.0f}", f"{tokens:.0f}", *ratios])
        results.append({"changes": changes, **vars(size), "seconds": values})
        print(*rows[-1], flush=True)
    head = ["changes", "rows", "length", "r", "fused ms", "tokens/s", "fused / frozen", "unfused / fused"]
    body = common.markdown(head, rows)
    if options.dry_run:
        print(body)
        return
    own = [word for word in (options.changes, options.device, "CPU time" if options.cpu_time else "") if word]
    name, title = "_".join(["train_step_scaling", *own]).replace(" ", "_").lower(), ", ".join(["Scaling of a step", *own])
    common.write_results(name, f"{title} (`train_step_scaling.py`)", {"results": results}, body, options.output)


if __name__ == "__main__":
    sys.exit(main())
