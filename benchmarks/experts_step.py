"""A LoRA training step of a Qwen3-MoE on one CPU process, an A and B for every expert: this engine against transformers + PEFT at its best.

    OMP_NUM_THREADS=1 python benchmarks/experts_step.py --cpu-time    # on a machine that does other work as well
    OMP_NUM_THREADS=2 python benchmarks/experts_step.py               # --dtype float32 or bfloat16: one of them

Qwen3-MoE: 64 experts of 192, top 8, hidden 512, 4 layers, 8 heads, 2 query groups, vocabulary 8192; LoRA r 16 on attention and all experts,
2 rows of 256 random ids, every position trained, AdamW, clipping 1.0, in fp32 and in bf16. Both sides start at the same loss.

PEFT adapts stacked experts by ``target_parameters``: B A of all experts is added to their weights in every forward pass. The other side
runs transformers' ``experts_implementation`` grouped_mm, in bf16 with ``autocast_adapter_dtype`` on and off, and under
``torch.compile``; the fastest counts. PEFT gives the experts a new class in every forward pass, so dynamo compiles what touches it
anew each time until it meets its recompile limit; from then on that part runs as written, all else compiled: those steps are timed.
"eager" is timed apart, in two steps, as one of them takes seconds. "batched_mm" is left out: it copies an expert's weights for every
row, here 19 GiB. The trained parameters of experts are the same on both sides; q, k, v have one A here, three there.

Floors: "products", the matrix products of our step run alone on tensors of the same shapes and dtypes; "large products", the time that
their operations would take at the rate of one 1024 x 1024 x 1024 product, which 64-row products do not reach.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import common
from train_step_cpu import Step, our_side, products_of, step_of, timed

SHAPE: dict[str, Any] = dict(
    vocab_size=8192,
    hidden_size=512,
    intermediate_size=1536,
    moe_intermediate_size=192,
    num_experts=64,
    num_experts_per_tok=8,
    norm_topk_prob=True,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=2048,
    tie_word_embeddings=False,
)
TINY = SHAPE | dict(vocab_size=256, hidden_size=64, moe_intermediate_size=32, num_experts=8, num_experts_per_tok=2, num_hidden_layers=2)
HF_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
HF_PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
BAR = 1.5
COMPILING = 12  # steps until torch.compile has compiled what it can and given up on the rest; a dozen is twice what it took


def peft_side(folder: Path, dtype: Any, experts: str, autocast: bool, compiled: bool) -> Step:
    """A step of transformers + PEFT, ``experts`` its experts_implementation."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa", experts_implementation=experts, dtype=dtype)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=HF_TARGETS, target_parameters=HF_PARAMETERS)
    model = get_peft_model(base, lora, autocast_adapter_dtype=autocast).train()
    return step_of(model, compiled)


def large_product_rate(dtype: Any, clock: Any) -> float:
    """Operations per second of one large product, the best of ``dtype`` and fp32."""
    import torch

    from mindspeed_lora.ops.products import product

    rates = []
    for kind in {dtype, torch.float32}:
        left, right = torch.randn(1024, 1024).to(kind), torch.randn(1024, 1024).to(kind)
        side = common.seconds(lambda left=left, right=right: product(left, right), 3, clock)  # type: ignore[misc]
        rates.append(2 * 1024**3 / common.medians(common.alternate({"one": side}, 3))["one"])
    return max(rates)


def operations_of(step: Any) -> int:
    """Floating-point operations of the matrix products of ``step``."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    onednn = torch.ops.mkldnn._linear_pointwise

    def operations(x: Any, weight: Any, *_others: Any, **_named: Any) -> int:
        return 2 * x[0] * x[1] * weight[0]

    with FlopCounterMode(display=False, custom_mapping={onednn: operations}) as counter:
        step()
    counts = counter.get_flop_counts()["Global"]
    return sum(count for function, count in counts.items() if "mm" in str(function) or function == onednn)


def measure(folder: Path, dtype: Any, batches: list[Any], options: argparse.Namespace) -> dict[str, Any]:
    """Seconds per side, first losses, and the floors."""
    import torch

    clock = time.process_time if options.cpu_time else time.perf_counter
    steps: dict[str, Step] = {"ours": our_side(folder, dtype)}
    for autocast in (True, False) if dtype != torch.float32 else (True,):
        word = f", autocast_adapter_dtype {autocast}" if dtype != torch.float32 else ""
        for compiled in (False,) if options.no_compile or options.dry_run else (False, True):
            name = f"peft grouped_mm{' compiled' if compiled else ''}{word}"
            steps[name] = peft_side(folder, dtype, "grouped_mm", autocast, compiled)
    losses: dict[str, list[float]] = {name: [] for name in steps}
    for name, step in steps.items():
        for number in range(COMPILING if " compiled" in name else 0):
            loss = step(batches[number % len(batches)])
            losses[name] += [] if number else [loss]
    sides = {name: timed(step, batches, losses[name], clock) for name, step in steps.items()}
    work = our_side(folder, dtype)
    operations = operations_of(lambda: work(batches[0]))
    sides["products"] = common.seconds(products_of(lambda: work(batches[0])), clock=clock)
    values = common.alternate(sides, options.rounds, 2)
    eager = timed(peft_side(folder, dtype, "eager", True, False), batches, losses.setdefault("peft eager", []), clock)
    values["peft eager"] = [eager(), eager()]
    first = {name: series[0] for name, series in losses.items()}
    assert max(first.values()) - min(first.values()) < (1e-4 if dtype == torch.float32 else 2e-3), first
    return {"seconds": values, "first_loss": first, "operations": operations, "large_product_rate": large_product_rate(dtype, clock)}


def table(name: str, result: dict[str, Any], tokens: int) -> tuple[list[list[object]], float]:
    """Rows of the page, and how much faster ours is than the fastest other."""
    values = result["seconds"]
    middle = common.medians(values)
    best = min((side for side in middle if side.startswith("peft")), key=lambda side: middle[side])
    faster = {side: common.ratio(values, side, "ours") for side in middle if side.startswith("peft grouped")}
    rows: list[list[object]] = []
    for side, seconds in middle.items():
        ratio = faster.get(side, seconds / middle["ours"] if side == "peft eager" else "")
        shares = [100 * floor / seconds for floor in (middle["products"], result["operations"] / result["large_product_rate"])]
        words = [f"{1000 * seconds:.0f}", f"{tokens / seconds:.0f}", ratio, *(f"{share:.0f} %" for share in shares)]
        rows.append([name, f"{side} (best)" if side == best else side, *words, result["first_loss"].get(side, "")])
    return rows, faster[best] if best in faster else statistics.median(values[best]) / middle["ours"]


def main() -> int:
    """Measure, print, write."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    made = common.parser(__doc__)
    made.add_argument("--no-compile", action="store_true", help="leave out torch.compile's sides, which take minutes to compile")
    made.add_argument("--dtype", choices=("float32", "bfloat16"), help="measure this one alone, into a section of its own (default: both)")
    made.add_argument("--cpu-time", action="store_true", help="count this process's CPU time (on one thread)")
    options = made.parse_args()
    warnings.filterwarnings("ignore")
    shape, length = (TINY, 16) if options.dry_run else (SHAPE, 256)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(shape["vocab_size"], (2, length), generator=generator) for _ in range(options.rounds + 2)]
    results, rows, faster = {}, [], {}
    for dtype in [getattr(torch, name) for name in ([options.dtype] if options.dtype else ["float32", "bfloat16"])]:
        with tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(0)
            Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape)).to(dtype).save_pretrained(folder)
            name = str(dtype).removeprefix("torch.")
            results[name] = measure(Path(folder), dtype, batches, options)
        more, faster[name] = table(name, results[name], 2 * length)
        rows += more
    body = common.markdown(
        ["dtype", "side", "ms", "tokens/s", "ours is faster by", "products' share", "large products' share", "first loss"], rows
    )
    body += f"\n\nBar: {BAR} x the fastest other side. Found: {', '.join(f'{name} {value:.2f}' for name, value in faster.items())}."
    if options.dry_run:
        print(body)
        return 0
    threads = torch.get_num_threads()
    own = [f"{threads} thread{'s' if threads > 1 else ''}", *(["CPU time"] if options.cpu_time else []), *filter(None, [options.dtype])]
    title = f"Training step with experts on a CPU, {', '.join(own)} (`experts_step.py`)"
    name = "_".join(["experts_step", str(threads), *own[1:]]).replace(" ", "_").lower()
    common.write_results(name, title, {"model": shape, **results}, body, options.output)
    return 0 if min(faster.values()) >= BAR else 1


if __name__ == "__main__":
    sys.exit(main())
