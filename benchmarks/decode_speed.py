"""Greedy decoding: ours against transformers' ``generate``, in one run of one CPU process, same model, prompts and lengths.

    python benchmarks/decode_speed.py --threads 1 2 --lengths 32+64 128+64 128+256 --output benchmarks/results/decode_speed.json

Both sides run transformers' own ``GenerationMixin.generate`` (greedy, no stop token) in fp32 on the same 60M-parameter Qwen3: theirs over
``AutoModelForCausalLM`` with SDPA attention and its dynamic cache, ours over this project's model and cache (``inference.generator``).
The sides alternate, so that a busy machine slows both; tokens must be equal. Prefill is part of the time of both. ``--cpu-time`` counts
the work of the process's own thread, whatever else the machine does; with one thread only.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
SHAPE = dict(
    vocab_size=32000,
    hidden_size=512,
    intermediate_size=1536,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
    max_position_embeddings=4096,
    tie_word_embeddings=False,
)
BARS = {1: 1.1, 8: 1.2}
Side = Callable[[list[list[int]], int], list[list[int]]]


def transformers_side(folder: Path) -> Side:
    """``generate`` of the original model."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()

    @torch.no_grad()
    def run(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        mask = torch.ones_like(ids)
        output = model.generate(
            ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, use_cache=True, pad_token_id=0, eos_token_id=None
        )
        return output[:, ids.shape[1] :].tolist()

    return run


def our_side(folder: Path) -> Side:
    """``generate`` over this project's model."""
    from mindspeed_lora.arguments.configs import ArchitectureFlags
    from mindspeed_lora.checkpoint.load import load_base
    from mindspeed_lora.checkpoint.resolve import resolve_model_config
    from mindspeed_lora.inference.channel import Channels
    from mindspeed_lora.inference.engine import Engine
    from mindspeed_lora.inference.generator import Limits, ParallelCausalLM, Strategy, generate
    from mindspeed_lora.model.stage import build_stage_modules
    from mindspeed_lora.parallel.context import single_process_context
    from mindspeed_lora.weights.sources import open_base
    from mindspeed_lora.weights.table import WeightTable

    base, context = open_base(folder), single_process_context()
    config = resolve_model_config(base, ArchitectureFlags())
    stages = build_stage_modules(config, context, base.dtype)
    load_base(stages, base, WeightTable(config), context)
    model = ParallelCausalLM(Engine(stages[0].eval().requires_grad_(False), context, Channels()))

    def run(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        return generate(model, prompts, Strategy(), Limits(new_tokens, ()))

    return run


def compare(
    sides: dict[str, Side], batch: int, lengths: tuple[int, int], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Any]:
    """Tokens per second of each side, taking turns; ``lengths``: of prompt and answer; the first round is not counted."""
    import torch

    (prompt_length, new_tokens), generator = lengths, torch.Generator().manual_seed(batch)
    prompts = torch.randint(3, SHAPE["vocab_size"], (batch, prompt_length), generator=generator).tolist()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    answers: dict[str, list[list[int]]] = {}
    for number in range(rounds + 1):
        for name in sides if number % 2 else reversed(sides):
            start = clock()
            answers[name] = sides[name](prompts, new_tokens)
            if number:
                seconds[name].append(clock() - start)
    ours, theirs = (statistics.median(seconds[name]) for name in sides)
    by_round = [theirs_s / ours_s for ours_s, theirs_s in zip(*seconds.values(), strict=True)]
    return {
        "threads": torch.get_num_threads(),
        "batch": batch,
        "prompt_length": prompt_length,
        "new_tokens": new_tokens,
        "equal_tokens": answers["ours"] == answers["transformers"],
        "ours_tokens_per_s": round(batch * new_tokens / ours, 1),
        "transformers_tokens_per_s": round(batch * new_tokens / theirs, 1),
        "ratio": round(theirs / ours, 3),
        "ratio_of_best": round(min(seconds["transformers"]) / min(seconds["ours"]), 3),
        "ratio_by_round": [round(value, 3) for value in by_round],
        "bar": BARS.get(batch),
        "seconds": {name: [round(value, 4) for value in values] for name, values in seconds.items()},
    }


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="prompts answered together")
    parser.add_argument("--lengths", nargs="+", default=["32+64", "128+64", "128+256"], help="tokens of prompt and of answer")
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="of torch")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds of each side")
    parser.add_argument("--cpu-time", action="store_true", help="CPU time of the process in place of wall time; needs --threads 1")
    parser.add_argument("--output", type=Path, default=None, help="JSON file (default: only printed)")
    options = parser.parse_args()
    if options.cpu_time and options.threads != [1]:
        parser.error("--cpu-time: threads that wait for one another count as work; use --threads 1")
    return options


def main() -> None:
    """Measure, print, write."""
    import torch
    from common import machine
    from transformers import Qwen3Config, Qwen3ForCausalLM

    options = parsed()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(Qwen3Config(**SHAPE))
        parameters = sum(parameter.numel() for parameter in model.parameters())
        model.save_pretrained(folder)
        del model
        sides = {"ours": our_side(folder), "transformers": transformers_side(folder)}
        clock = time.process_time if options.cpu_time else time.perf_counter
        for threads, lengths, batch in itertools.product(options.threads, options.lengths, options.batches):
            torch.set_num_threads(threads)
            prompt_length, new_tokens = map(int, lengths.split("+"))
            rows.append(compare(sides, batch, (prompt_length, new_tokens), options.rounds, clock))
            print({key: value for key, value in rows[-1].items() if key != "seconds"}, file=sys.stderr, flush=True)
    result: dict[str, Any] = {
        "machine": machine(),
        "model": {**SHAPE, "parameters": parameters, "dtype": "float32"},
        "clock": "CPU time" if options.cpu_time else "wall time",
        "rounds": options.rounds,
        "results": rows,
    }
    text = json.dumps(result, indent=1)
    print(text)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
