"""The memory estimate against what torch allocates on every rank of a layout, for a model of 1 GiB, on gloo processes of one CPU.

    OMP_NUM_THREADS=1 python benchmarks/memory_layouts.py             # starts its processes itself

As ``memory_estimate.py``, which measures one process: one LoRA step of the real engine, weights that nobody set.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import common

common.add_root_to_path()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from allocated import Allocated  # noqa: E402
from engine import build_stage, step_of  # noqa: E402
from memory_estimate import GIB_MODEL, LORA, SMALL, Case, sizes_of  # noqa: E402

from mindspeed_lora.arguments.configs import RecomputeFlags  # noqa: E402
from mindspeed_lora.ops.nf4 import Nf4  # noqa: E402
from mindspeed_lora.parallel.context import build_context  # noqa: E402
from mindspeed_lora.parallel.on_demand import BaseStorage, Plain  # noqa: E402
from mindspeed_lora.training.memory import GIB, estimate  # noqa: E402
from mindspeed_lora.weights.config import ModelConfig  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Layout:
    """Of one run. ``micro_batches``: of a step."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    fsdp_base: bool = False
    qlora: bool = False
    micro_batches: int = 1

    @property
    def processes(self) -> int:
        """Ranks."""
        return self.tp * self.pp * self.dp

    @property
    def name(self) -> str:
        """In one phrase."""
        words = [f"{word}{size}" for word, size in (("TP", self.tp), ("PP", self.pp), ("DP", self.dp)) if size > 1]
        return " ".join([*words, *(["SP"] if self.tp > 1 else []), *(["--fsdp-base"] if self.fsdp_base else [])])


LAYOUTS = (Layout(tp=2), Layout(pp=2, micro_batches=4), Layout(dp=2, fsdp_base=True))


def measured_on_this_rank(layout: Layout, model: ModelConfig, dtype: str, length: int) -> tuple[int, float]:
    """(bytes that torch held at most on this rank, the estimate for its stage)."""
    device = torch.device("cpu")
    case = Case(True, dtype, RecomputeFlags(), 1, length, layout.micro_batches)
    grid = dict(tp_size=layout.tp, pp_size=layout.pp, dp_size=layout.dp, sequence_parallel=layout.tp > 1)
    sizes = dataclasses.replace(sizes_of(case, model, device), **grid, fsdp_base=layout.fsdp_base, qlora=layout.qlora)
    context = build_context(device, layout.tp, layout.pp, layout.tp > 1)

    def make_storage() -> BaseStorage:
        return BaseStorage(context, Nf4() if layout.qlora else Plain(), layout.fsdp_base)

    kept = make_storage if layout.fsdp_base or layout.qlora else None
    gc.collect()  # what an earlier run left would count as negative when it is released
    with Allocated() as allocated:
        stage = build_stage(model, LORA, getattr(torch, dtype), RecomputeFlags(), True, device, context, kept)
        step_of(stage, 1)(torch.zeros(layout.micro_batches, length, dtype=torch.int64))
        del stage
    return allocated.peak, estimate(sizes, context.pp_rank)["total"]


def process(rank: int, layout: Layout, store: str, results: Any, model: ModelConfig, dtype: str, length: int) -> None:
    """One rank: measures and hands over."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(layout.processes), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, layout.processes), rank=rank, world_size=layout.processes)
    results.put((rank, *measured_on_this_rank(layout, model, dtype, length)))
    dist.barrier()
    dist.destroy_process_group()


def ranks_of(layout: Layout, model: ModelConfig, dtype: str, length: int) -> list[tuple[int, int, float]]:
    """(rank, bytes allocated, estimate) of each process."""
    results = torch.multiprocessing.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (layout, str(Path(folder) / "store"), results, model, dtype, length)
        torch.multiprocessing.spawn(process, arguments, layout.processes)
    return sorted(results.get() for _ in range(layout.processes))


def main() -> int:
    """Measure every layout, print, write."""
    options = common.parser(__doc__).parse_args()
    model, length = (SMALL, 128) if options.dry_run else (GIB_MODEL, 512)
    rows: list[list[object]] = []
    results, worst = [], 0.0
    for layout in LAYOUTS:
        for dtype in ("float32", "bfloat16"):
            for rank, peak, estimated in ranks_of(layout, model, dtype, length):
                error = estimated / peak - 1
                worst = max(worst, abs(error))
                cells = [layout.name, dtype, rank, f"{peak / GIB:.3f}", f"{estimated / GIB:.3f}", f"{100 * error:+.1f} %"]
                rows.append(cells)
                results.append({"layout": layout.name, "dtype": dtype, "rank": rank, "allocated": peak, "estimate": estimated})
                print(*cells, flush=True)
    head = ["layout", "dtype", "rank", "allocated GiB", "estimate GiB", "error"]
    body = f"{common.markdown(head, rows)}\n\nLargest error {100 * worst:.1f} % (bar: 10 %). One row of {length} tokens, LoRA r16."
    if options.dry_run:
        print(body)
        return 0
    common.write_results("memory_layouts", "Memory estimate, every rank (`memory_layouts.py`)", {"results": results}, body, options.output)
    return 0 if worst <= 0.1 else 1


if __name__ == "__main__":
    sys.exit(main())
