"""A column + row pair of linear layers on two gloo processes: fused LoRA and unfused LoRA against the frozen pair.

    OMP_NUM_THREADS=1 python benchmarks/tp2_gloo.py             # starts its two processes itself

Forward and backward, fp32, 2 x 256 tokens, hidden 1024, ffn 4096, r 16; SP on and off. Each call starts and ends with a barrier. Bytes are
the inputs of a rank's collectives, the barriers not counted.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import common

common.add_root_to_path()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from collective_counts import counted  # noqa: E402

from mindspeed_lora.lora.layers import ParallelLoraLinear  # noqa: E402
from mindspeed_lora.parallel.context import ParallelContext, build_context  # noqa: E402
from mindspeed_lora.parallel.layers import ColumnParallelLinear, RowParallelLinear  # noqa: E402

RANK, BATCH, WORLD = 16, 2, 2
KINDS = ("frozen", "fused", "unfused")


def pair(context: ParallelContext, kind: str, hidden: int, ffn: int) -> torch.nn.Module:
    """The two layers, drawn values; LoRA around each but in the frozen pair."""
    layers: list[torch.nn.Module] = [ColumnParallelLinear(hidden, ffn, context), RowParallelLinear(ffn, hidden, context)]
    for number, base in enumerate(layers):
        base.weight.requires_grad_(False).normal_(std=hidden**-0.5)
        if kind != "frozen":
            layer = layers[number] = ParallelLoraLinear(base, "default", r=RANK, lora_alpha=2 * RANK)
            layer.fusion = kind == "fused"
            torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.01)
    return torch.nn.Sequential(*layers)


def work_of(layers: torch.nn.Module, x: torch.Tensor, dy: torch.Tensor) -> Callable[[], None]:
    """Forward and backward between barriers."""

    def work() -> None:
        x.grad = None
        dist.barrier()
        layers(x).backward(dy)
        dist.barrier()

    return work


def measure(sequence_parallel: bool, hidden: int, ffn: int, length: int, rounds: int) -> dict[str, Any]:
    """Of each kind of pair: this rank's collectives, their bytes, and the seconds of each round."""
    context = build_context(torch.device("cpu"), WORLD, 1, sequence_parallel)
    torch.manual_seed(context.rank)
    shape = (length // (WORLD if sequence_parallel else 1), BATCH, hidden)
    x, dy = torch.randn(shape, requires_grad=True), torch.randn(shape)
    works = {kind: work_of(pair(context, kind, hidden, ffn), x, dy) for kind in KINDS}
    calls = {}
    for kind, work in works.items():
        with counted() as calls[kind]:
            work()
    values = common.alternate({kind: common.seconds(work) for kind, work in works.items()}, rounds, 2)
    return {"calls": calls, "seconds": values}


def process(rank: int, store: str, results: Any, sizes: tuple[int, int, int], rounds: int) -> None:
    """One of the two: measures, and rank 0 hands over what it found."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(WORLD), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, WORLD), rank=rank, world_size=WORLD)
    found = {mode: measure(mode == "on", *sizes, rounds) for mode in ("on", "off")}
    dist.barrier()
    if rank == 0:
        results.put(found)
    dist.destroy_process_group()


def rows_of(found: Mapping[str, Any]) -> list[list[object]]:
    """The table's rows: SP mode by kind."""
    rows: list[list[object]] = []
    for mode, one in found.items():
        milliseconds = {kind: 1000 * value for kind, value in common.medians(one["seconds"]).items()}
        base = sum(size for _, size in one["calls"]["frozen"])
        for kind in KINDS:
            sent = sum(size for _, size in one["calls"][kind])
            ratio = common.ratio(one["seconds"], kind, "frozen")
            ratios = [own / other for own, other in zip(one["seconds"][kind], one["seconds"]["frozen"], strict=True)]
            low, _, high = statistics.quantiles(ratios, n=4)
            rows.append(
                [
                    mode,
                    kind,
                    len(one["calls"][kind]),
                    f"{sent:,}",
                    f"{sent - base:,}",
                    f"{milliseconds[kind]:.1f}",
                    ratio,
                    f"{low:.2f} to {high:.2f}",
                ]
            )
    return rows


def main() -> None:
    """Start both processes, print, write."""
    options = common.parser(__doc__).parse_args()
    sizes = (32, 64, 8) if options.dry_run else (1024, 4096, 256)
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (str(Path(folder) / "store"), results, sizes, options.rounds)
        torch.multiprocessing.spawn(process, arguments, WORLD)
        found = results.get()
    head = ["SP", "pair", "collectives", "bytes of a rank", "beyond the frozen pair", "ms", "time / frozen", "middle half of the rounds"]
    body = common.markdown(head, rows_of(found))
    if options.dry_run:
        print(body)
        return
    body += (
        f"\n\nHidden {sizes[0]}, ffn {sizes[1]}, {BATCH} x {sizes[2]} tokens, fp32, r {RANK}, one thread a process, median of "
        f"{options.rounds} rounds in turn. One all-reduce moves about what an all-gather and a reduce-scatter move together. "
        "Where the middle half of the rounds spans 1, the machine did not tell the two apart."
    )
    common.write_results("tp2_gloo", "Tensor parallelism on gloo (`tp2_gloo.py`)", found, body, options.output)


if __name__ == "__main__":
    sys.exit(main())
