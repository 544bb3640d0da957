"""Greedy decoding at batch 1 against the limit that memory bandwidth sets: every weight is read once for each token.

    python benchmarks/decode_bandwidth.py --output benchmarks/results/decode_bandwidth.json        # on a GPU: the shape of Qwen3-8B, bf16
    python benchmarks/decode_bandwidth.py --dry-run                                                # a small shape on a CPU: does it run?

The limit is bandwidth / bytes per token, with the data sheet's bandwidth by the device's name (``--bandwidth`` for others), and bytes per
token = all weights but the embedding's unread rows + keys and values at half of the generated length. Weights are random: their values do
not change the time. Timed is ``generate`` without the prompt's pass (a run of one token is subtracted).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
QWEN3_8B = dict(
    family="qwen3",
    num_layers=36,
    hidden_size=4096,
    ffn_hidden_size=12288,
    num_attention_heads=32,
    num_query_groups=8,
    kv_channels=128,
    vocab_size=151936,
    padded_vocab_size=151936,
)
SMALL = dict(
    family="qwen3",
    num_layers=4,
    hidden_size=256,
    ffn_hidden_size=512,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=32,
    vocab_size=4096,
    padded_vocab_size=4096,
)
BANDWIDTH_GB_S = {"H200": 4800, "H100": 3350, "A100": 2039, "L40S": 864, "4090": 1008}  # NVIDIA's data sheets, SXM and 80 GB parts
BAR = 0.6


def build(shape: dict[str, Any], device: Any, dtype: Any) -> Any:
    """(generate's model, stage) with random weights."""
    import torch

    from mindspeed_lora.inference.channel import Channels
    from mindspeed_lora.inference.engine import Engine
    from mindspeed_lora.inference.generator import ParallelCausalLM
    from mindspeed_lora.model.stage import build_stage_modules
    from mindspeed_lora.parallel.context import single_process_context
    from mindspeed_lora.weights.config import ModelConfig

    config = ModelConfig(
        **shape, norm_epsilon=1e-6, rotary_base=1e6, qk_layernorm=True, tied_embeddings=False, max_position_embeddings=40960
    )
    context = single_process_context(device)
    stage = build_stage_modules(config, context, dtype)[0].eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.normal_(std=0.02)
    return ParallelCausalLM(Engine(stage, context, Channels())), stage


def bytes_per_token(stage: Any, length: int) -> int:
    """Weights that are read, and keys and values of ``length`` positions."""
    config = stage.model_config
    weights = sum(parameter.numel() * parameter.element_size() for parameter in stage.parameters())
    embedding = stage.embedding.word_embeddings.weight
    cache = 2 * config.num_layers * config.num_query_groups * config.kv_channels * length * embedding.element_size()
    return int(weights - embedding.numel() * embedding.element_size() + cache)


def device_bandwidth(name: str, given: float | None) -> float | None:
    """GB/s."""
    return given or next((value for part, value in BANDWIDTH_GB_S.items() if part in name), None)


def main() -> None:
    """Measure, print, write."""
    import torch

    from mindspeed_lora.device import select_device, synchronize
    from mindspeed_lora.inference.generator import Limits, Strategy, generate

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--dry-run", action="store_true", help="a small shape on the CPU; its share means nothing")
    parser.add_argument("--bandwidth", type=float, default=None, help="GB/s, for a device that the table does not know")
    parser.add_argument("--prompt-length", type=int, default=128, help="tokens")
    parser.add_argument("--new-tokens", type=int, default=256, help="tokens generated")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds")
    parser.add_argument("--output", type=Path, default=None, help="JSON file (default: only printed)")
    options = parser.parse_args()
    device = select_device("cpu" if options.dry_run else "auto")
    model, stage = build(SMALL if options.dry_run else QWEN3_8B, device, torch.bfloat16)
    prompt = [list(range(3, 3 + options.prompt_length))]
    seconds = {}
    for count in (1, options.new_tokens):
        times = []
        for _ in range(options.rounds + 1):
            start = time.perf_counter()
            generate(model, prompt, Strategy(), Limits(count, ()))
            synchronize(device)
            times.append(time.perf_counter() - start)
        seconds[count] = statistics.median(times[1:])
    token_s = (seconds[options.new_tokens] - seconds[1]) / (options.new_tokens - 1)
    size = bytes_per_token(stage, options.prompt_length + options.new_tokens // 2)
    name = "cpu" if device.type == "cpu" else str(torch.get_device_module(device).get_device_name(device))
    bandwidth = device_bandwidth(name, options.bandwidth)
    reached = size / token_s / 1e9
    result = {
        "device": name,
        "torch": torch.__version__,
        "dry_run": options.dry_run,
        "bytes_per_token": size,
        "ms_per_token": round(token_s * 1e3, 3),
        "reached_gb_s": round(reached, 1),
        "bandwidth_gb_s": bandwidth,
        "share": None if bandwidth is None else round(reached / bandwidth, 3),
        "bar": BAR,
    }
    text = json.dumps(result, indent=1)
    print(text)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
