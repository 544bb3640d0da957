"""One GPU, Qwen3-8B's shape: this project's step against transformers + PEFT, in turn, in one run.

    python benchmarks/train_step_gpu.py                       # bf16, one row of 4096 tokens, r 16, every position trained
    python benchmarks/train_step_gpu.py --length 1024 --rows 4 --rank 64 --recompute full
    python benchmarks/train_step_gpu.py --dry-run             # a tiny shape on the CPU

Random weights are made on the device; ours are copies of theirs, so the first losses are equal. Sides: ours (fused), ours unfused, the bare
frozen model (forward + activation gradient: the floor), transformers + PEFT with ``autocast_adapter_dtype`` on and off and under
``torch.compile``. A side that fails (out of memory, say) is reported and left out. A step is forward, backward, clipping, AdamW.
Memory is the peak of a step above what was held before it. MFU: FLOPs of design.md section 5 over the device's dense bf16 peak.
A is shared by q, k, v and by gate, up on our side and separate on theirs. TRL, Unsloth and LLaMA-Factory are named where they are
installed; their trainers wrap the step measured here as "transformers + PEFT".
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import common

common.add_root_to_path()

import torch  # noqa: E402
from engine import Step, build_stage, frozen_step_of, step_of  # noqa: E402

from mindspeed_lora.arguments.configs import LORA_TARGETS, RecomputeFlags  # noqa: E402
from mindspeed_lora.training.flops import flops_model, peak_flops  # noqa: E402
from mindspeed_lora.weights.config import ModelConfig  # noqa: E402
from mindspeed_lora.weights.families import model_config_from_hf  # noqa: E402
from mindspeed_lora.weights.lora_spec import LoraSpec  # noqa: E402
from mindspeed_lora.weights.table import WeightTable  # noqa: E402

SHAPES = {  # hidden, ffn, layers, heads, vocabulary, head dim; 8 query groups, untied
    "qwen3-8b": (4096, 12288, 36, 32, 151936, 128),
    "qwen3-1.7b": (2048, 6144, 28, 16, 151936, 128),
    "tiny": (64, 128, 2, 16, 512, 8),
}
FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "head_dim")
HF_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PEERS = ("transformers + PEFT", "transformers + PEFT, adapter in bf16", "transformers + PEFT, compiled")


def hf_model(shape: str, device: torch.device) -> Any:
    """transformers' model with random weights, made on the device."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    config = Qwen3Config(
        num_key_value_heads=8, max_position_embeddings=40960, tie_word_embeddings=False, **dict(zip(FIELDS, SHAPES[shape], strict=True))
    )
    torch.manual_seed(0)
    with torch.device(device):
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
        except TypeError:  # transformers 4
            model = AutoModelForCausalLM.from_config(config, torch_dtype=torch.bfloat16, attn_implementation="sdpa")
    return model.requires_grad_(False)


def peft_step(model: Any, rank: int, name: str, recompute: bool) -> tuple[Step, Any]:
    """(step, wrapper) of transformers + PEFT around ``model``."""
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(
        model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=HF_TARGETS), autocast_adapter_dtype="adapter in bf16" not in name
    ).train()
    if recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=trained[0].device.type == "cuda")
    forward: Callable[..., Any] = torch.compile(wrapped) if "compiled" in name else wrapped

    def step(ids: torch.Tensor) -> float:
        loss = forward(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step, wrapped


def our_step(source: Any, model: ModelConfig, lora: LoraSpec | None, options: Any, fusion: bool, device: torch.device) -> Step:
    """Our step on a copy of transformers' weights; ``lora`` None: the frozen floor."""
    recompute = RecomputeFlags("full", "uniform", 1) if options.recompute == "full" else RecomputeFlags()
    stage, table = build_stage(model, lora, torch.bfloat16, recompute, fusion, device), WeightTable(model)
    with torch.no_grad():
        for name, parameter in stage.named_parameters():
            if ".lora_" not in name:
                row, layer = table.parse(name.replace(".base_layer", ""))
                parameter.copy_(table.shard(row, [source.get_parameter(part).data for part in row.hf_names(layer)], 0, 1))
    return frozen_step_of(stage) if lora is None else step_of(stage, options.rows)


def measured(step: Step, ids: torch.Tensor, memory: list[int], losses: list[float]) -> Callable[[], float]:
    """A side: seconds of a step; its peak above what is held before goes to ``memory``, its loss to ``losses``."""
    device = ids.device

    def work() -> None:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        losses.append(step(ids))
        if device.type == "cuda":
            memory.append(torch.cuda.max_memory_allocated() - before)

    return common.seconds(work)


def measure(options: Any, device: torch.device) -> dict[str, Any]:
    """Build one pair of sides after the other (two models at a time), each against our fused step in turn."""
    from tempfile import TemporaryDirectory

    source = hf_model(options.shape, device)
    with TemporaryDirectory() as folder:
        source.config.save_pretrained(folder)
        model = model_config_from_hf(folder)  # type: ignore[arg-type]
    lora = LoraSpec(options.rank, 2.0 * options.rank, LORA_TARGETS)
    ids = torch.randint(0, model.vocab_size, (options.rows, options.length), device=device)
    ours = our_step(source, model, lora, options, True, device)
    makers: dict[str, Callable[[], tuple[Step, Any]]] = {
        "ours, unfused": lambda: (our_step(source, model, lora, options, False, device), None),
        "frozen base (floor)": lambda: (our_step(source, model, None, options, False, device), None),
    }
    makers |= {
        name: lambda name=name: peft_step(source, options.rank, name, options.recompute == "full")
        for name in (PEERS[:2] if options.dry_run else PEERS)
    }  # type: ignore[misc]
    sides: dict[str, Any] = {}
    for name, make in makers.items():
        try:
            sides[name] = _pair(name, make, ours, ids, options)
        except Exception as error:  # a side that cannot run here is a result too
            sides[name] = {"failed": f"{type(error).__name__}: {str(error)[:200]}"}
        if device.type == "cuda":
            torch.cuda.empty_cache()
        print(name, sides[name], flush=True)
    flops = flops_model(model, WeightTable(model), lora).total(ids.numel(), options.rows)
    return {"sides": sides, "tokens": ids.numel(), "flops": flops}


def _pair(name: str, make: Callable[[], tuple[Step, Any]], ours: Step, ids: torch.Tensor, options: Any) -> dict[str, Any]:
    step, wrapper = make()
    memory: dict[str, list[int]] = {"ours": [], name: []}
    losses: dict[str, list[float]] = {"ours": [], name: []}
    sides = {key: measured(one, ids, memory[key], losses[key]) for key, one in (("ours", ours), (name, step))}
    try:
        values = common.alternate(sides, options.rounds, warm_up=2)
    finally:
        if wrapper is not None:
            wrapper.unload()
    return {
        "seconds": values,
        "ratio": common.ratio(values, name, "ours"),
        "first loss": {key: series[0] for key, series in losses.items()},
        "peak above weights": {key: max(series) if series else None for key, series in memory.items()},
    }


def table(result: dict[str, Any], peak: float | None) -> str:
    """Markdown: one row per side, ours from its first pair."""
    rows: list[tuple[object, ...]] = []

    def line(name: str, seconds: list[float], memory: int | None, ratio: object) -> None:
        median = common.medians({name: seconds})[name]
        utilisation = f"{100 * result['flops'] / median / peak:.1f} %" if peak else "-"
        held = f"{memory / 2**30:.2f}" if memory is not None else "-"
        rows.append((name, f"{1000 * median:.1f}", f"{result['tokens'] / median:,.0f}", utilisation, held, ratio))

    for name, side in result["sides"].items():
        if "failed" in side:
            rows.append((name, side["failed"], "-", "-", "-", "-"))
            continue
        memory = side["peak above weights"]
        if not rows or rows[0][0] != "ours, fused":
            line("ours, fused", side["seconds"]["ours"], memory["ours"], "1")
            rows.insert(0, rows.pop())
        line(name, side["seconds"][name], memory[name], f"{side['ratio']:.3f}")
    return common.markdown(("side", "ms", "tokens/s", "MFU", "peak - weights, GiB", "time / ours in turn"), rows)


def main() -> int:
    """Measure, print, write."""
    parser = common.parser(__doc__)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="qwen3-8b")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a row, one document")
    parser.add_argument("--rows", type=int, default=1, help="micro-batch size")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--recompute", choices=("off", "full"), default="off", help="on both sides")
    options = parser.parse_args()
    if options.dry_run:
        options.shape, options.length, options.rounds = "tiny", 32, 1
    device = torch.device("cpu" if options.dry_run else "cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        print(f"train_step_gpu.py: {common.NOT_RUN}; --dry-run shows that the script runs", file=sys.stderr)
        return 1
    result = measure(options, device)
    peak = peak_flops(torch.cuda.get_device_name()) if device.type == "cuda" else None
    title = f"{options.shape}, {options.rows} x {options.length} tokens, r {options.rank}, recompute {options.recompute}"
    if options.dry_run:
        print(table(result, peak))
        return 0
    name = f"train_step_gpu_{options.shape}_{options.rows}x{options.length}_r{options.rank}_{options.recompute}"
    common.write_results(name, f"Training step on a GPU: {title} (`train_step_gpu.py`)", result, table(result, peak), options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
