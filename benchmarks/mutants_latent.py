"""Break latent attention on purpose and see that its tests notice each fault.

    python benchmarks/mutants_latent.py docs/mutants_latent.md

As ``mutants_engine.py``. Takes about ten minutes; exit code 1 if one survives.
"""

from __future__ import annotations

import sys

from mutants_engine import page_argument, write_page
from mutants_weights import Mutant

CHOICE = "logits_equal_transformers or cached_decoding or scores_scale or (merged_weights and (TP2-SP or lite-TP2) and not PP2)"
TESTS = ["-x", "tests/test_rotary.py", "tests/test_latent_inference.py", "tests/test_latent_parity.py", "-k", CHOICE]
LATENT, ROTARY, ROWS, TABLE = "model/latent_attention.py", "model/rotary.py", "weights/rows.py", "weights/table.py"

MUTANTS = (
    Mutant("rotary pairs", "pairs are taken half the size apart", ((LATENT, "if self.shape.interleaved:", "if False:"),)),
    Mutant(
        "mscale of the scores",
        "the softmax scale lacks YaRN's temperature",
        ((ROTARY, "return scale * _mscale(_yarn_factor(config, scaling), weight) ** 2 if weight else scale", "return scale"),),
    ),
    Mutant("mscale of the rotation", "cos and sin lack theirs", ((ROTARY, "(angles.cos() * scale)", "angles.cos()"),)),
    Mutant(
        "latents' epsilon",
        "the latents' norms take the model's epsilon",
        (
            (
                LATENT,
                "self.kv_layernorm = RMSNorm(self.shape.kv_rank, config, context, dtype, _NORM_EPSILON)",
                "self.kv_layernorm = RMSNorm(self.shape.kv_rank, config, context, dtype)",
            ),
        ),
    ),
    Mutant(
        "grad_sum with a latent",
        "the down projection's gradients are not summed with SP",
        ((ROWS, '_down("q_a_proj", "sp"', '_down("q_a_proj", "never"'),),
    ),
    Mutant("grad_sum without one", "V2-Lite's are summed with SP only", ((ROWS, '_down("q_proj", "always"', '_down("q_proj", "sp"'),)),
    Mutant(
        "adapter's grad_sum",
        "an adapter of a replicated linear is never summed",
        ((TABLE, "None: (base.grad_sum, base.grad_sum)", 'None: ("never", "never")'),),
    ),
    Mutant(
        "own heads",
        "every rank takes the first rank's queries",
        ((LATENT, "slice(self.context.tp_rank * own, (self.context.tp_rank + 1) * own)", "slice(0, own)"),),
    ),
    Mutant(
        "key-value norm",
        "V2-Lite's latents are cached and expanded without their norm",
        ((LATENT, "return queries, self.kv_layernorm(latents), shared", "return queries, latents, shared"),),
    ),
    Mutant(
        "norms with q-lora",
        "the key-value latent of V2 and V3 is not normed",
        ((LATENT, "self.q_layernorm(queries), self.kv_layernorm(latents)", "self.q_layernorm(queries), latents"),),
    ),
    Mutant(
        "keys and values",
        "keys and values are swapped in the up projection",
        (
            (
                LATENT,
                "key, value = expanded.split((self.shape.nope_head_dim, self.shape.value_head_dim), dim=-1)",
                "value, key = expanded.split((self.shape.value_head_dim, self.shape.nope_head_dim), dim=-1)",
            ),
        ),
    ),
    Mutant(
        "unrotated key",
        "the cache holds the shared key as it came",
        ((LATENT, "self._rotated(shared.unsqueeze(2), rotary).squeeze(2)", "shared"),),
    ),
    Mutant(
        "absorbed adapter",
        "the up projection's adapter is lost where queries are moved into the latents",
        ((LATENT, "        return found + (narrow * scale).to(found.dtype) @ a\n", "        return found\n"),),
    ),
    Mutant(
        "heads and positions",
        "the mask of positions is laid head by position",
        ((LATENT, ".repeat(1, 1, self.heads, 1)", ".repeat_interleave(self.heads, dim=2)"),),
    ),
)

if __name__ == "__main__":
    command = f"python benchmarks/mutants_latent.py {page_argument(__doc__)}"
    sys.exit(write_page("latent attention", command, MUTANTS, TESTS))
