"""A LoRA training step on one CPU process: this engine against transformers + PEFT at its best, and against its own matrix products.

    OMP_NUM_THREADS=2 python benchmarks/train_step_cpu.py                      # --dtype float32 or bfloat16: one of them

Qwen3 60M (hidden 512, 8 layers, 8 heads, 4 query groups, head_dim 64, ffn 1536, vocabulary 32,000, untied), LoRA r 16 on all linears,
2 rows of 256 random ids, every position trained, AdamW, clipping 1.0, in fp32 and in bf16. The other side runs with
``autocast_adapter_dtype`` on and off, eager and under ``torch.compile``, each with SDPA and eager attention; the fastest counts. Beside it
stand TRL's ``SFTTrainer`` (its ``training_step`` and what its loop does after it) and our unfused layers. ``--full`` trains every
parameter on both sides instead. All start at the same loss. A call during which other processes took more than 4 % of the cores is
repeated, as the machine may not be this measurement's alone; where it never is, ``OMP_NUM_THREADS=1 ... --cpu-time`` counts the
process's own CPU time. A is shared by q, k, v and by gate, up on our side (as in Megatron's fused
layers) and separate on theirs, so ours has fewer LoRA parameters. The floor is the time of exactly the matrix products of our step
(attention's left out), run alone on tensors of the same shapes, strides and dtypes. A CPU says nothing about an NPU.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common

common.add_root_to_path()
SHAPE = dict(
    vocab_size=32000,
    hidden_size=512,
    intermediate_size=1536,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
    max_position_embeddings=2048,
    tie_word_embeddings=False,
)
TINY = SHAPE | dict(vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, head_dim=16)
HF_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RATE = 1e-4
Step = Callable[[Any], float]


def step_of(model: Any, compiled: bool) -> Step:
    """A step of transformers' ``model``, or one that PEFT wrapped: loss, gradients, clipping, AdamW."""
    import torch

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE)
    run = torch.compile(model) if compiled else model

    def step(ids: Any) -> float:
        loss = run(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def peft_side(folder: Path, dtype: Any, autocast: bool, attention: str, compiled: bool, full: bool = False) -> Step:
    """A step of transformers + PEFT; ``full``: of transformers alone."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention, dtype=dtype)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=HF_TARGETS)
    model = base.train() if full else get_peft_model(base, lora, autocast_adapter_dtype=autocast).train()
    return step_of(model, compiled)


def trl_side(folder: Path, dtype: Any) -> Step:
    """A step of TRL's SFTTrainer, gradient checkpointing off."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    base = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa", dtype=dtype)
    half = dtype == torch.bfloat16
    words = dict(use_cpu=True, bf16=half, gradient_checkpointing=False, report_to=[], learning_rate=RATE, max_grad_norm=1.0)
    config = SFTConfig(output_dir=str(folder / "trl"), per_device_train_batch_size=2, disable_tqdm=True, save_strategy="no", **words)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0}, "<pad>")), pad_token="<pad>", eos_token="<pad>"
    )
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=HF_TARGETS)
    rows = Dataset.from_dict({"input_ids": [[1, 2, 3]] * 2})
    trainer = SFTTrainer(model=base, args=config, train_dataset=rows, processing_class=tokenizer, peft_config=lora)
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1  # its loop sets it
    model = trainer.model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step(ids: Any) -> float:
        loss = trainer.training_step(model, {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)})
        trainer.accelerator.clip_grad_norm_(trained, 1.0)
        trainer.optimizer.step()
        model.zero_grad()
        return float(loss.detach())

    return step


def our_side(folder: Path, dtype: Any, fusion: bool = True, full: bool = False) -> Step:
    """A step of this engine: stage, flat gradients, flat optimizer."""
    import torch

    from mindspeed_lora.arguments.configs import LORA_TARGETS, OptimizerFlags
    from mindspeed_lora.checkpoint.load import load_base
    from mindspeed_lora.lora.inject import inject_lora
    from mindspeed_lora.model.stage import build_stage_modules
    from mindspeed_lora.parallel.context import single_process_context
    from mindspeed_lora.parallel.grouped import choose_products
    from mindspeed_lora.training.flat import FlatLayout
    from mindspeed_lora.training.gradients import FlatGradients
    from mindspeed_lora.training.optimizer import FlatAdamW
    from mindspeed_lora.training.parameters import trained_parameters
    from mindspeed_lora.weights.lora_spec import LoraSpec
    from mindspeed_lora.weights.sources import open_base
    from mindspeed_lora.weights.table import WeightTable

    base = open_base(folder)
    assert base.config is not None
    context, table = single_process_context(), WeightTable(base.config)
    stages = build_stage_modules(base.config, context, dtype)
    if not full:
        inject_lora(stages[0], table, LoraSpec(16, 32.0, LORA_TARGETS), context, fusion=fusion, seed=0)
    load_base(stages, base, table, context)
    choose_products(stages, base.config, grouped=False)
    layout = FlatLayout(trained_parameters(stages, table, context), context, False)
    flat = layout.flatten_parameters()
    gradients = FlatGradients(layout, context, False)
    optimizer = FlatAdamW(layout, flat, gradients, OptimizerFlags(lr=RATE), context)
    stage = stages[0].train()

    def step(ids: Any) -> float:
        labels = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
        weights = torch.full((ids.shape[0],), 1.0 / (labels != -100).sum().item())
        gradients.zero()
        loss = stage(ids, labels=labels, row_weights=weights).sum()
        loss.backward()
        gradients.reduce()
        gradients.clip(gradients.norm(), 1.0)
        optimizer.step(RATE)
        return float(loss.detach())

    return step


def products_of(step: Callable[[], object]) -> Callable[[], None]:
    """The matrix products that ``step`` makes, on tensors of their own."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    calls: list[tuple[Any, list[Any]]] = []
    aten, onednn = torch.ops.aten, torch.ops.mkldnn._linear_pointwise.default
    ours = {aten.mm.default, aten.mm.out, aten.addmm_.default, aten.addmm.default, onednn}

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function in ours:
                plain = aten.mm.default if "mm.out" in str(function) else function
                calls.append((plain, [(arg.shape, arg.stride(), arg.dtype) if isinstance(arg, torch.Tensor) else arg for arg in args]))
            return function(*args, **(kwargs or {}))

    with Record():
        step()
    made: dict[Any, Any] = {}

    def tensor(spec: Any) -> Any:
        if not isinstance(spec, tuple):
            return spec
        if spec not in made:
            shape, stride, dtype = spec
            made[spec] = torch.zeros(1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)), dtype=dtype).as_strided(
                shape, stride
            )
        return made[spec]

    bound = [(function, [tensor(spec) for spec in specs]) for function, specs in calls]

    def run() -> None:
        for function, args in bound:
            function(*args)

    return run


def timed(step: Step, batches: list[Any], losses: list[float], clock: Callable[[], float]) -> Callable[[], float]:
    """Seconds of a step on the next batch; its loss goes into ``losses``."""

    def side() -> float:
        ids = batches[len(losses) % len(batches)]
        start = clock()
        losses.append(step(ids))
        return clock() - start

    return side


def steps_of(folder: Path, dtype: Any, compiled: bool, full: bool) -> dict[str, Step]:
    """Every side, ours first."""
    import torch

    if full:
        steps = {"ours": our_side(folder, dtype, full=True)}
        kinds = [(attention, run) for attention in ("sdpa", "eager") for run in ([False, True] if compiled else [False])]
        return steps | {
            f"transformers {attention}{' compiled' * run}": peft_side(folder, dtype, True, attention, run, True) for attention, run in kinds
        }
    steps = {"ours": our_side(folder, dtype), "ours, unfused": our_side(folder, dtype, fusion=False)}
    for autocast in (True, False) if dtype != torch.float32 else (True,):
        word = f", autocast_adapter_dtype {autocast}" if dtype != torch.float32 else ""
        for attention in ("sdpa", "eager"):
            steps[f"peft {attention}{word}"] = peft_side(folder, dtype, autocast, attention, False)
            if compiled:
                steps[f"peft {attention} compiled{word}"] = peft_side(folder, dtype, autocast, attention, True)
    return steps | ({"trl SFTTrainer": trl_side(folder, dtype)} if common.package_version("trl") else {})


def measure(folder: Path, dtype: Any, batches: list[Any], options: argparse.Namespace) -> dict[str, Any]:
    """Seconds per side, what other processes took meanwhile, first losses, and the floor."""
    import torch

    compiled = not (options.no_compile or options.dry_run)
    clock = time.process_time if options.cpu_time else time.perf_counter
    limit = 1.0 if options.dry_run or options.cpu_time else 0.04
    steps = steps_of(folder, dtype, compiled, options.full)
    losses: dict[str, list[float]] = {name: [] for name in steps}
    sides = {name: timed(step, batches, losses[name], clock) for name, step in steps.items()}
    sides["floor"] = torch.no_grad()(
        common.seconds(products_of(lambda: our_side(folder, dtype, full=options.full)(batches[0])), clock=clock)
    )
    for side in sides.values():  # compiles, and draws memory
        side()
    shares: dict[str, list[float]] = {name: [] for name in sides}
    values = common.alternate({name: common.undisturbed(side, shares[name], limit) for name, side in sides.items()}, options.rounds, 0)
    return {"seconds": values, "foreign": shares, "first_loss": {name: series[0] for name, series in losses.items()}}


def table(name: str, result: dict[str, Any], tokens: int) -> list[list[object]]:
    """Rows of the page: ours, every other with the fastest marked, the floor."""
    values = result["seconds"]
    middle = common.medians(values)
    others = [side for side in middle if not side.startswith(("ours", "floor"))]
    best = min(others, key=lambda side: middle[side])
    rows: list[list[object]] = []
    for side, seconds in middle.items():
        faster = f"{common.ratio(values, side, 'ours'):.3f}" if side not in ("ours", "floor") else ""
        mark = f"{side} (best)" if side == best else side
        share = f"{100 * statistics.median(values['floor']) / seconds:.0f} %"
        disturbed = f"{100 * max(result['foreign'][side]):.0f} %"
        loss = f"{result['first_loss'][side]:.5f}" if side in result["first_loss"] else ""
        rows.append([name, mark, f"{1000 * seconds:.0f}", f"{tokens / seconds:.0f}", faster, share, loss, disturbed])
    return rows


def main() -> None:
    """Measure, print, write."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    made = common.parser(__doc__)
    made.add_argument("--no-compile", action="store_true", help="leave out torch.compile's sides, which take a minute to compile")
    made.add_argument("--dtype", choices=("float32", "bfloat16"), help="measure this one alone, into a section of its own (default: both)")
    made.add_argument("--full", action="store_true", help="train every parameter, in a section of its own")
    made.add_argument("--cpu-time", action="store_true", help="count this process's CPU time (on one thread), in a section of its own")
    options = made.parse_args()
    warnings.filterwarnings("ignore")
    shape, length = (TINY, 16) if options.dry_run else (SHAPE, 256)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(shape["vocab_size"], (2, length), generator=generator) for _ in range(options.rounds + 2)]
    results, rows = {}, []
    for dtype in [getattr(torch, name) for name in ([options.dtype] if options.dtype else ["float32", "bfloat16"])]:
        with tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(0)
            Qwen3ForCausalLM(Qwen3Config(**shape)).to(dtype).save_pretrained(folder)
            name = str(dtype).removeprefix("torch.")
            results[name] = measure(Path(folder), dtype, batches, options)
        rows += table(name, results[name], 2 * length)
    body = common.markdown(
        ["dtype", "side", "ms", "tokens/s", "ours is faster by", "products' share", "first loss", "taken by others, at most"], rows
    )
    if options.dry_run:
        print(body)
        return
    own = [word for word in ("full" if options.full else "", "CPU time" if options.cpu_time else "", options.dtype) if word]
    title = ", ".join(["Training step on a CPU", *own]) + " (`train_step_cpu.py`)"
    common.write_results(
        "_".join(["train_step_cpu", *own]).replace(" ", "_").lower(), title, {"model": shape, **results}, body, options.output
    )


if __name__ == "__main__":
    sys.exit(main())
