"""Break routing, experts, their LoRA, their balancing and the flags about them on purpose, and see that a default test notices each.

    python benchmarks/mutants_experts.py docs/mutants_experts.md

As ``mutants_engine.py``; ``mutants_expert_parallel.py`` has the faults of experts dealt out over processes, ``mutants_latent.py``
those of latent attention. Takes about half an hour on
two cores; exit code 1 if one survives. With words behind the page, only the mutants whose names hold one of them run, and nothing is
written.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from mutants_engine import noticed_by
from mutants_weights import Mutant

ROUTER, EXPERTS, PERMUTE = "model/router.py", "model/experts.py", "ops/permute.py"
LORA, BALANCE, LOSSES, FLAGS = "lora/experts.py", "model/balance.py", "training/balance.py", "checkpoint/resolve_experts.py"
AREAS = {
    "routing": ["tests/test_experts_parity.py", "tests/test_latent_parity.py", "-k", "logits or router or full"],
    "experts": ["tests/test_experts_permute.py", "tests/test_experts_grouped.py", "tests/test_experts_parity.py"],
    "balance": ["tests/test_balance.py"],
    "flags": ["tests/test_peer_experts_scripts.py"],
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
        "u = low_rank.matmul(wide, a.transpose(-2, -1), groups)",
        "u = low_rank.matmul(wide, a.roll(1, 0).transpose(-2, -1), groups)",
    ),
    Placed(
        "experts",
        "gradient of another expert",
        "dB of expert i goes to expert i + 1",
        LORA,
        "groups).transpose(-2, -1).to(b.dtype)",
        "groups).roll(1, 0).transpose(-2, -1).to(b.dtype)",
    ),
    Placed(
        "experts", "adapter's scale", "alpha / r is lost", LORA, "b.transpose(-2, -1), groups, factor)", "b.transpose(-2, -1), groups, 1.0)"
    ),
    Placed(
        "experts",
        "adapter's dx",
        "dx lacks g_u A",
        LORA,
        "grad_x = low_rank.add_matmul(grad_x, grad_u, a, groups).to(x.dtype)",
        "grad_x = grad_x.to(x.dtype)",
    ),
    Placed(
        "balance",
        "padding counts",
        "padding's choices take part in the load",
        BALANCE,
        "shares.repeat_interleave(top_k)",
        "torch.ones_like(shares).repeat_interleave(top_k)",
    ),
    Placed(
        "balance",
        "shares over TP",
        "each TP rank adds the whole loss",
        BALANCE,
        "part = 1.0 if spread else 1.0 / context.tp_size",
        "part = 1.0",
    ),
    Placed(
        "balance",
        "z's coefficient",
        "the z loss counts in full",
        BALANCE,
        "loss = terms.aux * aux + terms.z * z",
        "loss = terms.aux * aux + z",
    ),
    Placed(
        "balance",
        "no gradient",
        "the losses are logged alone",
        BALANCE,
        "return grad, grad.new_ones(())",
        "return grad, grad.new_zeros(())",
    ),
    Placed(
        "balance",
        "sigmoids",
        "sigmoid scores are not made to sum to 1",
        BALANCE,
        "probabilities = scores / scores.sum(-1, keepdim=True)",
        "probabilities = scores",
    ),
    Placed(
        "balance", "rows", "the loss of a row takes positions for rows", BALANCE, ".remainder(rows)", ".div(len(shares) // rows).long()"
    ),
    Placed("balance", "counted again", "a recomputed layer counts twice", BALANCE, "if layer in self._seen:", "if False:"),
    Placed(
        "balance", "own load", "a TP rank's load is that of its part of the tokens", BALANCE, "        if spread:\n", "        if False:\n"
    ),
    Placed(
        "balance",
        "other shares",
        "each TP rank takes the first tokens' shares",
        BALANCE,
        "start = context.tp_rank * whole // context.tp_size if spread else 0",
        "start = 0",
    ),
    Placed(
        "balance",
        "seq-aux",
        "--seq-aux is forgotten",
        LOSSES,
        "kind == _OF_A_ROW or (flags.by_row and kind in _WITH_SEQ_AUX)",
        "kind == _OF_A_ROW",
    ),
    Placed(
        "balance",
        "loss scale",
        "the logged losses hold fp16's factor",
        LOSSES,
        'self._gather("losses", 2) / loss_scale',
        'self._gather("losses", 2)',
    ),
    Placed(
        "balance",
        "replicas' shares",
        "shares of micro-batches leave out the other replicas",
        LOSSES,
        "(counts.clamp(min=1) * len(counts) * dp_size)",
        "(counts.clamp(min=1) * len(counts))",
    ),
    Placed(
        "balance",
        "bias upwards",
        "a busy expert gets more bias",
        LOSSES,
        "(counts.mean(1, keepdim=True) - counts).sign()",
        "(counts - counts.mean(1, keepdim=True)).sign()",
    ),
    Placed(
        "balance",
        "own counts",
        "biases follow one replica's tokens",
        LOSSES,
        "for group in (self.context.tp_group, self.context.dp_group):",
        "for group in (self.context.tp_group,):",
    ),
    Placed(
        "flags",
        "falsehoods",
        "a flag's 0 is not compared",
        FLAGS,
        "if passed is not None and passed != found:",
        "if passed and passed != found:",
    ),
    Placed(
        "flags",
        "top-k",
        "--moe-router-topk is not compared",
        FLAGS,
        '"--moe-router-topk", flags.top_k, routing.top_k',
        '"--moe-router-topk", None, routing.top_k',
    ),
    Placed(
        "flags", "dense layers", "--first-k-dense-replace is not compared", FLAGS, "layer < (first or 0) or layer not in", "layer not in"
    ),
    Placed(
        "flags",
        "period of layers",
        "every period has experts in its last layer",
        FLAGS,
        "if layer % step == 0]",
        "if layer % step == step - 1]",
    ),
    Placed(
        "flags",
        "pre-softmax",
        "weights that do not sum to one for the peer are taken",
        FLAGS,
        "and routing.normalize and not flags.normalize",
        "and not routing.normalize",
    ),
    Placed("flags", "groups", "groups of experts are not compared", FLAGS, "if flags.groups_matter:", "if False:"),
)


def page(results: list[tuple[Placed, str | None]]) -> str:
    """The table as Markdown."""
    lines = [
        "# Mutants of experts",
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
        if clean := noticed_by(None, ["-x", *AREAS[area]]):
            print(f"{clean} fails without any mutant", file=sys.stderr)
            return 1
    results = []
    for each in chosen:
        results.append((each, noticed_by(each.mutant, ["-x", *AREAS[each.area]])))
        print(f"{each.name}: {results[-1][1] or 'SURVIVED'}", flush=True)
    if not arguments.names:
        arguments.page.write_text(page(results), encoding="utf-8")
    return 0 if all(test for _, test in results) else 1


if __name__ == "__main__":
    sys.exit(main())
