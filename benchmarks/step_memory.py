"""What a LoRA step holds above what was held before it: this engine against transformers + PEFT, as torch's allocator counts on a CPU.

    OMP_NUM_THREADS=1 python benchmarks/step_memory.py

The model and the sides of ``train_step_cpu.py`` (nothing compiled), no recomputation, each after a first step that made optimizer states.
Counts of bytes: other work on the machine does not change them. The measure of a GPU (at most half of transformers + PEFT's) is
``train_step_gpu.py``'s.
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import common

common.add_root_to_path()

import train_step_cpu as step_cpu  # noqa: E402

MIB = float(1 << 20)


def peak_of(step: step_cpu.Step, ids: Any) -> int:
    """Bytes at most beyond those held before, in the second step."""
    from allocated import Allocated

    step(ids)
    with Allocated() as allocated:
        step(ids)
    return allocated.peak


def measure(shape: dict[str, Any], dtype: Any, rows: int, length: int) -> dict[str, int]:
    """Bytes of each side."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    ids = torch.randint(shape["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        Qwen3ForCausalLM(Qwen3Config(**shape)).to(dtype).save_pretrained(folder)
        peaks = {
            "ours": peak_of(step_cpu.our_side(folder, dtype), ids),
            "ours, unfused": peak_of(step_cpu.our_side(folder, dtype, fusion=False), ids),
        }
        for autocast in (True, False) if dtype != torch.float32 else (True,):
            word = f", autocast_adapter_dtype {autocast}" if dtype != torch.float32 else ""
            peaks[f"peft sdpa{word}"] = peak_of(step_cpu.peft_side(folder, dtype, autocast, "sdpa", False), ids)
    return peaks


def main() -> None:
    """Measure, print, write."""
    import torch

    options = common.parser(__doc__).parse_args()
    warnings.filterwarnings("ignore")
    shape, sizes = (step_cpu.TINY, ((2, 16),)) if options.dry_run else (step_cpu.SHAPE, ((2, 256), (2, 1024)))
    rows: list[list[object]] = []
    results: dict[str, dict[str, int]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for size in sizes:
            name = f"{str(dtype)[6:]} {size[0]} x {size[1]}"
            peaks = results[name] = measure(shape, dtype, *size)
            best = min(peak for side, peak in peaks.items() if not side.startswith("ours"))
            for side, peak in peaks.items():
                rows.append([str(dtype)[6:], f"{size[0]} x {size[1]}", side, f"{peak / MIB:.1f}", f"{peak / best:.2f}"])
    body = common.markdown(["dtype", "rows x length", "side", "MiB above what is held", "of transformers + PEFT's best"], rows)
    if options.dry_run:
        print(body)
        return
    common.write_results("step_memory_cpu", "Memory of a step, cpu (`step_memory.py`)", {"peaks": results}, body, options.output)


if __name__ == "__main__":
    main()
