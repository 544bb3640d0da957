"""Break routing, experts, their LoRA and latent attention on purpose, and see that a default test notices each.

    python benchmarks/mutants_experts.py docs/mutants_experts.md

As ``mutants_engine.py``; ``mutants_expert_parallel.py`` has the faults of experts dealt out over processes. Takes about half an hour on
two cores; exit code 1 if one survives. With words behind the page, only the mutants whose names hold one of them run, and nothing is
written.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from mutants_weights import Mutant, apply, copy_tree, failing_tests

ROUTER, EXPERTS, PERMUTE = "model/router.py", "model/experts.py", "ops/permute.py"
LORA, LATENT = "lora/experts.py", "model/latent_attention.py"
AREAS = {
    "routing": ["tests/test_experts_parity.py", "tests/test_latent_parity.py", "-k", "logits or router or full"],
    "experts": ["tests/test_experts_permute.py", "tests/test_experts_grouped.py", "tests/test_experts_parity.py"],
    "balance": ["tests/test_balance.py"],
    "latent attention": ["tests/test_latent_parity.py", "tests/test_latent_inference.py"],
}


@dataclass(frozen=True)
class Placed:
    """A mutant of one file, and the tests that have to notice it."""

    area: str
    name: str
    what: str
    file: str
    old: str
    new: str

    @property
    def mutant(self) -> Mutant:
        """For the helpers of the weight table's mutants."""
        return Mutant(self.name, self.what, ((self.file, self.old, self.new),))


def _routing(name: str, what: str, old: str, new: str) -> Placed:
    return Placed("routing", name, what, ROUTER, old, new)


MUTANTS = (
    _routing(
        "top-k normalised", "the chosen weights are normalised by the other families", "if routing.normalize:", "if not routing.normalize:"
    ),
    _routing("scale lost", "routed_scaling_factor is forgotten", "return weights * routing.scale, experts", "return weights, experts"),
    _routing("sigmoid", "V3's scores are a softmax", 'if self.routing.score == "softmax" else logits.sigmoid()', "if True else logits"),
    _routing("bias in the weights", "V3's bias is part of the weights too", "weights = scores.gather(", "weights = choice.gather("),
    _routing("bias not in the choice", "V3's bias has no part in the choice", "else scores.detach() + bias", "else scores.detach()"),
    _routing("groups", "experts of all groups compete", "~inside.unsqueeze(-1)", "(~inside & inside).unsqueeze(-1)"),
    _routing("group score", "V3's groups count by their best expert", 'if routing.group_score == "max" else', "if True else"),
    _routing(
        "router in bf16",
        "logits are rounded to the weights' dtype",
        "F.linear(tokens.float(), self.weight.float())",
        "F.linear(tokens, self.weight).float()",
    ),
    Placed(
        "experts",
        "shared gate lost",
        "the shared expert is not scaled",
        EXPERTS,
        "return output if self.gate_weight is None else",
        "return output if True else",
    ),
    Placed(
        "experts",
        "shared expert lost",
        "the shared expert is left out",
        EXPERTS,
        "share = share + self.shared_experts(tokens)",
        "share = share",
    ),
    Placed(
        "experts",
        "dropped token",
        "one choice of the last token is lost",
        EXPERTS,
        "rows = permute(tokens, order)\n        if",
        "rows = permute(tokens, order) * (order.slots != len(order.slots) - 1).unsqueeze(-1)\n        if",
    ),
    Placed(
        "experts",
        "permutation not undone",
        "results stay sorted by expert",
        PERMUTE,
        "_gathered_sum(rows, order.place, weights)",
        "_gathered_sum(rows, order.slots.view_as(order.place), weights)",
    ),
    Placed(
        "experts",
        "gradients not put back",
        "gradients of tokens stay sorted by expert",
        PERMUTE,
        "_gathered_sum(grad_rows, ctx.order.place, None)",
        "_gathered_sum(grad_rows, ctx.order.slots.view_as(ctx.order.place), None)",
    ),
    Placed(
        "experts",
        "weights' gradient",
        "the router gets the gradients of other tokens",
        PERMUTE,
        "along.index_select(0, ctx.order.place.flatten())",
        "along.index_select(0, ctx.order.slots)",
    ),
    Placed(
        "experts",
        "adapter of another expert",
        "expert i is adapted by A of expert i - 1",
        LORA,
        "u = products.matmul(wide, a.transpose(1, 2), groups)",
        "u = products.matmul(wide, a.roll(1, 0).transpose(1, 2), groups)",
    ),
    Placed(
        "experts",
        "gradient of another expert",
        "dB of expert i goes to expert i + 1",
        LORA,
        "groups).transpose(1, 2).to(b.dtype)",
        "groups).roll(1, 0).transpose(1, 2).to(b.dtype)",
    ),
    Placed("experts", "adapter's scale", "alpha / r is lost", LORA, "b.transpose(1, 2), groups, scale)", "b.transpose(1, 2), groups, 1.0)"),
    Placed(
        "experts",
        "adapter's dx",
        "dx lacks g_u A",
        LORA,
        "grad_x = products.add_matmul(grad_x, grad_u, a, groups).to(x.dtype)",
        "grad_x = grad_x.to(x.dtype)",
    ),
    Placed(
        "balance",
        "padding counts",
        "padding's choices take part in the load",
        "model/balance.py",
        "shares.repeat_interleave(top_k)",
        "torch.ones_like(shares).repeat_interleave(top_k)",
    ),
    Placed(
        "balance",
        "shares over TP",
        "each TP rank adds the whole loss",
        "model/balance.py",
        "part = 1.0 if spread else 1.0 / context.tp_size",
        "part = 1.0",
    ),
    Placed(
        "latent attention",
        "temperature",
        "yarn's mscale_all_dim does not scale the softmax",
        "model/rotary.py",
        "** 2 if weight else scale",
        "** 2 if False else scale",
    ),
    Placed(
        "latent attention",
        "rotary pairs",
        "pairs that lie side by side are rotated as halves",
        LATENT,
        "if self.shape.interleaved:",
        "if False:",
    ),
    Placed(
        "latent attention",
        "latent's norm",
        "the key-value latent is not normed",
        LATENT,
        "self.q_layernorm(queries), self.kv_layernorm(latents)",
        "self.q_layernorm(queries), latents",
    ),
    Placed(
        "latent attention",
        "own heads",
        "each TP rank takes the first heads' queries",
        LATENT,
        "slice(self.context.tp_rank * own, (self.context.tp_rank + 1) * own)",
        "slice(0, own)",
    ),
    Placed(
        "latent attention",
        "keys of other heads",
        "keys and values are swapped in the up-projection",
        LATENT,
        "key, value = expanded.split((self.shape.nope_head_dim, self.shape.value_head_dim), dim=-1)",
        "value, key = expanded.split((self.shape.value_head_dim, self.shape.nope_head_dim), dim=-1)",
    ),
    Placed(
        "latent attention",
        "cached keys' adapter",
        "behind a cache, the adapter's part of the keys is lost",
        LATENT,
        "return found + (narrow * scale).to(found.dtype) @ a",
        "return found",
    ),
)


def noticed_by(placed: Placed | None, area: str) -> str | None:
    """The first test that fails with a mutant, None if none does."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        copy_tree(Path(name))
        if placed is not None:
            apply(placed.mutant, Path(name))
        failed = failing_tests(Path(name), ["-x", *AREAS[area]])
        return failed[0] if failed else None


def page(results: list[tuple[Placed, str | None]]) -> str:
    """The table as Markdown."""
    lines = [
        "# Mutants of experts and latent attention",
        "",
        "Written by `python benchmarks/mutants_experts.py docs/mutants_experts.md`: each fault is put into a copy on purpose, and the",
        "default tests of its area run there until one fails.",
        "",
        "| area | mutant | what is wrong | noticed first by |",
        "|---|---|---|---|",
    ]
    lines += [f"| {each.area} | {each.name} | {each.what} | {f'`{test}`' if test else '**nobody**'} |" for each, test in results]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run all, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, help="Markdown file to write")
    parser.add_argument("names", nargs="*", help="parts of mutants' names: run only those, and write nothing")
    arguments = parser.parse_args()
    chosen = [each for each in MUTANTS if not arguments.names or any(name in each.name for name in arguments.names)]
    for area in dict.fromkeys(each.area for each in chosen):
        if clean := noticed_by(None, area):
            print(f"{clean} fails without any mutant", file=sys.stderr)
            return 1
    results = []
    for each in chosen:
        results.append((each, noticed_by(each, each.area)))
        print(f"{each.name}: {results[-1][1] or 'SURVIVED'}", flush=True)
    if not arguments.names:
        arguments.page.write_text(page(results), encoding="utf-8")
    return 0 if all(test for _, test in results) else 1


if __name__ == "__main__":
    sys.exit(main())
