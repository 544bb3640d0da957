"""Training step: ours against transformers + PEFT, in one run on one CPU process each, same model, records and LoRA.

    OMP_NUM_THREADS=2 python benchmarks/train_step_cpu.py --output benchmarks/results/train_step_cpu.json

Both train LoRA (q, k, v, o, gate, up, down; r 16) on the same padded batches of random token ids in fp32, AdamW, clipping 1.0. Ours runs
``--lora-fusion``'s functions and the loss head; the other side is ``AutoModelForCausalLM`` with SDPA attention under PEFT. A is shared by
q, k, v and by gate, up on our side (as in Megatron's fused layers) and separate on theirs, so ours has fewer LoRA parameters: the
result file states both counts. The sides alternate, so that a busy machine slows both. A CPU says nothing about an NPU: this guards
against regressions and against a slow design, no more.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
SHAPE = dict(
    vocab_size=8192,
    hidden_size=512,
    intermediate_size=1536,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
    max_position_embeddings=2048,
    tie_word_embeddings=False,
)
HF_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Step = Callable[[Any], float]


def make_batches(count: int, batch: int, length: int) -> list[Any]:
    """Random ids [b, s] int64, the same for both sides."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return [torch.randint(SHAPE["vocab_size"], (batch, length), generator=generator) for _ in range(count)]


def peft_side(folder: Path, lr: float) -> tuple[Step, int]:
    """(step, trainable parameters) of transformers + PEFT."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules=HF_TARGETS)).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr)

    def step(ids: Any) -> float:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step, sum(parameter.numel() for parameter in trained)


def our_side(folder: Path, lr: float) -> tuple[Step, int]:
    """(step, trainable parameters) of this project's engine, one process."""
    import torch

    from mindspeed_lora.arguments.configs import LORA_TARGETS
    from mindspeed_lora.checkpoint.load import load_base
    from mindspeed_lora.lora.inject import inject_lora
    from mindspeed_lora.model.stage import build_stage_modules
    from mindspeed_lora.parallel.context import single_process_context
    from mindspeed_lora.weights.lora_spec import LoraSpec
    from mindspeed_lora.weights.sources import open_base
    from mindspeed_lora.weights.table import WeightTable

    base = open_base(folder)
    assert base.config is not None
    context, table = single_process_context(), WeightTable(base.config)
    stages = build_stage_modules(base.config, context, torch.float32)
    inject_lora(stages[0], table, LoraSpec(16, 32.0, LORA_TARGETS), context, fusion=True, seed=0)
    load_base(stages, base, table, context)
    stage = stages[0].train()
    trained = [parameter for parameter in stage.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr)

    def step(ids: Any) -> float:
        labels = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
        weights = torch.full((ids.shape[0],), 1.0 / (labels != -100).sum().item())
        loss = stage(ids, labels=labels, row_weights=weights).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step, sum(parameter.numel() for parameter in trained)


def machine() -> dict[str, Any]:
    """What a number has to be read with."""
    import peft
    import torch
    import transformers

    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "command": " ".join(["python", *sys.argv]),
    }


def measure(sides: dict[str, Step], batches: list[Any], warm_up: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds and losses per step of each side, the sides taking turns; ``warm_up`` steps are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    losses: dict[str, list[float]] = {name: [] for name in sides}
    for number, ids in enumerate(batches):
        for name, step in sides.items():
            start = time.perf_counter()
            loss = step(ids)
            if number >= warm_up:
                seconds[name].append(time.perf_counter() - start)
            losses[name].append(loss)
    return seconds, losses


def main() -> None:
    """Measure, print, write."""
    import tempfile

    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=20, help="counted steps of each side")
    parser.add_argument("--batch", type=int, default=4, help="records per step")
    parser.add_argument("--length", type=int, default=512, help="tokens per record")
    parser.add_argument("--output", type=Path, default=None, help="JSON file (default: only printed)")
    options = parser.parse_args()
    warm_up = 3
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        Qwen3ForCausalLM(Qwen3Config(**SHAPE)).save_pretrained(folder)
        built = {"ours": our_side(Path(folder), 1e-4), "transformers+peft": peft_side(Path(folder), 1e-4)}
        batches = make_batches(options.steps + warm_up, options.batch, options.length)
        seconds, losses = measure({name: side[0] for name, side in built.items()}, batches, warm_up)
    tokens = options.batch * options.length
    result: dict[str, Any] = {
        "machine": machine(),
        "model": SHAPE,
        "batch": options.batch,
        "length": options.length,
        "steps": options.steps,
        "sides": {},
    }
    for name, times in seconds.items():
        median = statistics.median(times)
        result["sides"][name] = {
            "tokens_per_s_median": round(tokens / median, 1),
            "step_s_median": round(median, 4),
            "step_s_min": round(min(times), 4),
            "step_s_max": round(max(times), 4),
            "trainable_parameters": built[name][1],
            "first_loss": losses[name][0],
            "last_loss": losses[name][-1],
        }
    text = json.dumps(result, indent=1)
    print(text)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
