"""Latent attention behind a cache, one layer of DeepSeek-V2-Lite's shape in fp32: attending to latents against expanding them.

    OMP_NUM_THREADS=1 python benchmarks/latent_decode.py       # CPU time of one thread, so that a busy machine does not matter

Shows that the rule of ``absorbing_is_cheaper``, which counts multiplications, chooses the faster way.
"""

from __future__ import annotations

import sys
import time
from unittest import mock

import common

common.add_root_to_path()

import torch  # noqa: E402

from mindspeed_lora.model import latent_attention  # noqa: E402
from mindspeed_lora.model.decode import DecodeState, KVCache  # noqa: E402
from mindspeed_lora.model.rotary import inverse_frequencies, rotary_tables  # noqa: E402
from mindspeed_lora.parallel.context import single_process_context  # noqa: E402
from mindspeed_lora.weights.config import LatentShape, ModelConfig  # noqa: E402

SHAPE = LatentShape(None, 512, 128, 64, 128)
LITE = ModelConfig("deepseek_v2", 2048, 10944, 1, 16, 16, 192, 320, 320, 1e-6, 1e4, latent=SHAPE)
CASES = ((1, 512), (1, 4096), (16, 1024), (128, 1024), (192, 1024), (384, 1024))  # new positions, cached ones


def layer() -> latent_attention.LatentAttention:
    """With values of some size."""
    made = latent_attention.LatentAttention(LITE, 0, single_process_context(), torch.float32, recompute_core=False)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return made


def one_pass(attention: latent_attention.LatentAttention, new: int, seen: int, absorbed: bool) -> torch.Tensor:
    """``new`` positions behind ``seen``; the cache is as long as it was afterwards."""
    generator = torch.Generator().manual_seed(1)
    positions, hidden = torch.arange(seen, seen + new)[None], torch.randn(new, 1, LITE.hidden_size, generator=generator)
    tables = rotary_tables(inverse_frequencies(LITE), positions, torch.float32)
    held = torch.randn(1, 1, seen + new, LITE.cached_per_token, generator=generator)
    cache = KVCache()
    cache.append(0, held)
    cache.length = seen
    with mock.patch.object(latent_attention, "absorbing_is_cheaper", lambda *_: absorbed):  # the side, in place of the rule
        result: torch.Tensor = attention(hidden, tables, DecodeState(positions, cache=cache))
    return result


def main() -> int:
    """Measure, print and write the table."""
    options = common.parser(__doc__).parse_args()
    torch.set_num_threads(1)
    rule, attention, rows, results = latent_attention.absorbing_is_cheaper, layer(), [], []
    with torch.inference_mode():
        for new, seen in CASES[:1] if options.dry_run else CASES:
            torch.testing.assert_close(*(one_pass(attention, new, seen, way) for way in (True, False)), rtol=1e-3, atol=1e-3)
            sides = {
                name: common.seconds(lambda way=way, new=new, seen=seen: one_pass(attention, new, seen, way), clock=time.process_time)
                for name, way in (("absorbed", True), ("expanded", False))
            }
            values = common.alternate(sides, options.rounds)
            found, chosen = common.medians(values), "absorbed" if rule(SHAPE, new, seen + new) else "expanded"
            results.append({"new": new, "seen": seen, "values": values, "rule": chosen})
            rows.append((new, seen, 1e3 * found["absorbed"], 1e3 * found["expanded"], chosen))
    body = common.markdown(("new positions", "cached", "absorbed, ms", "expanded, ms", "the rule takes"), rows)
    if options.dry_run:
        print(body)
    else:
        common.write_results("latent_decode", "Latent attention behind a cache", {"cases": results}, body, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
