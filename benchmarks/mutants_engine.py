"""Break the engine on purpose and see that a test notices each fault.

    python benchmarks/mutants_engine.py docs/mutants_engine.md

As ``mutants_weights.py``, with faults in the fused LoRA functions, attention, rotary tables, the loss head, the initial values and the
reductions; the tests compare logits and gradients with transformers and PEFT. Then the kernels: products and linears of 16-bit values
on a CPU, norms, rotation and SwiGLU, the loss head's blocks and chunks, a base on demand and its prefetching; their own tests are run.
Takes about twenty minutes; exit code 1 if one survives.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mutants_weights import Mutant, apply, copy_tree, failing_tests

CHOICE = "(TP2-SP or TP2-PP2 or packed or logits_equal) and not llama3 and not mistral"
TESTS = ["-x", "tests/test_engine_parity.py", "-k", CHOICE]
KERNEL_TESTS = ["-x", *(f"tests/test_{name}.py" for name in ("ops", "cross_entropy", "lora_functions", "on_demand"))]
FUNCTIONS, LAYERS, LOSS = "lora/functions.py", "model/layers.py", "parallel/cross_entropy.py"
FUSED, CPU, PRODUCTS, ON_DEMAND = "ops/fused.py", "ops/cpu.py", "ops/products.py", "parallel/on_demand.py"

MUTANTS = (
    Mutant(
        "column dx",
        "the column layer's dx lacks g_u A",
        ((FUNCTIONS, "_add_low_rank(grad_x.view(-1, width), grad_u, a)", "pass"),),
    ),
    Mutant(
        "row dx", "the row layer's dx lacks g_u A", ((FUNCTIONS, "_add_low_rank(times(whole, weight), grad_u, a)", "times(whole, weight)"),)
    ),
    Mutant(
        "row u",
        "u is not summed over the tensor ranks",
        ((FUNCTIONS, "u = _rows(u).contiguous()", "u = times_transposed(wide_rows(x), a)[: _rows(u).shape[0]]"),),
    ),
    Mutant(
        "B's scale",
        "the row layer's dB is not scaled by alpha / r",
        ((FUNCTIONS, "_grad_b(wide, u, b, ctx.scale)\n            whole", "_grad_b(wide, u, b, 1.0)\n            whole"),),
    ),
    Mutant(
        "rotary halves",
        "the rotation turns the wrong way",
        ((FUSED, "sines[back], value=1 if back else -1)", "sines[back])"),),
    ),
    Mutant(
        "key and value",
        "key and value are swapped after the split",
        ((LAYERS, "query, key, value = qkv.split", "query, value, key = qkv.split"),),
    ),
    Mutant(
        "q norm",
        "queries are not normalised",
        ((LAYERS, "self.q_layernorm(query), self.k_layernorm(key)", "query, self.k_layernorm(key)"),),
    ),
    Mutant(
        "documents",
        "documents of a packed row see each other",
        ((LAYERS, "ops.document_attention(query, key, value, attend.ends, self.window)", "ops.attention(query, key, value)"),),
    ),
    Mutant(
        "target's rank",
        "each rank takes targets for its own columns",
        ((LOSS, "local = target.unsqueeze(1) - self.first", "local = target.unsqueeze(1)"),),
    ),
    Mutant(
        "softmax's sum",
        "each rank divides by its own slice's sum",
        ((LOSS, "total, target_logit = all_reduce(", "total, target_logit = (lambda tensor, group: tensor)("),),
    ),
    Mutant(
        "partial A",
        "A's partial gradient is never summed over the tensor ranks",
        (("weights/table.py", '0: ("always", "never")', '0: ("never", "never")'),),
    ),
    Mutant(
        "initial A",
        "A's initial values depend on the tensor rank",
        (("lora/inject.py", "kaiming_uniform(name, seed,", "kaiming_uniform(name, seed + context.tp_rank,"),),
    ),
)

KERNEL_MUTANTS = (
    Mutant("widened bias", "a product in fp32 forgets the bias", ((PRODUCTS, "y.add_(bias)", "pass"),)),
    Mutant(
        "blocks of dy W",
        "the last block of the weight's rows replaces the others",
        ((PRODUCTS, "if number else product(", "if False else product("),),
    ),
    Mutant(
        "blocks of dy^T x",
        "every block takes dy's first columns",
        ((PRODUCTS, "product(dy[:, rows].t(), x)", "product(dy[:, : len(outer[rows])].t(), x)"),),
    ),
    Mutant(
        "x of a frozen weight",
        "a 16-bit linear keeps an input that nobody needs",
        ((CPU, "(x if weight.requires_grad else None, ", "(x, "),),
    ),
    Mutant("gradient of a bias", "it is the mean over the rows", ((CPU, "wide.sum(dim=0)", "wide.mean(dim=0)"),)),
    Mutant("norm's dx", "it lacks the part along x", ((FUSED, "torch.mul(grad, scale).addcmul_(wide, along)", "torch.mul(grad, scale)"),)),
    Mutant(
        "rotation's gradient",
        "it turns the same way again",
        (
            (
                FUSED,
                "grad[..., half:].addcmul_(dy[..., :half], sine[..., :half], value=-1)",
                "grad[..., half:].addcmul_(dy[..., :half], sine[..., :half])",
            ),
        ),
    ),
    Mutant("up's gradient", "it takes gate, not silu(gate)", ((FUSED, "torch.mul(F.silu(gate), dy", "torch.mul(gate, dy"),)),
    Mutant("sum of blocks", "the softmax's sum is not rescaled to a new maximum", ((LOSS, "total.mul_(shrink).add_(", "total.add_("),)),
    Mutant(
        "gradient of blocks",
        "hidden's gradient is not rescaled",
        ((LOSS, "_add_product(grad.mul_(shrink.unsqueeze(1)),", "_add_product(grad,"),),
    ),
    Mutant(
        "padding of the vocabulary", "padding rows take part", ((LOSS, "max(0, min(self.rows, vocab_size - self.first))", "self.rows"),)
    ),
    Mutant(
        "target's block",
        "every block adds its logit",
        ((LOSS, "inside = here & (local >= columns.start) & (local < columns.stop)", "inside = here"),),
    ),
    Mutant(
        "token's factor",
        "a trained head forgets the losses' factors",
        ((LOSS, "logit_grad.mul_(grad[rows].unsqueeze(1)).t()", "logit_grad.t()"),),
    ),
    Mutant(
        "chunks of tokens",
        "every chunk takes the first one's hidden states",
        ((LOSS, ".t(), wide[rows])", ".t(), wide[: len(logit_grad)])"),),
    ),
    Mutant(
        "rows at a time",
        "dB takes the first rows' u for all of dy",
        ((FUNCTIONS, "add_outer(grad_b, adapted[rows], dy[rows])", "add_outer(grad_b, adapted[: len(dy[rows])], dy[rows])"),),
    ),
    Mutant("u alone", "the row layer keeps y with the u that lies beside it", ((FUNCTIONS, "u = _rows(u).contiguous()", "u = _rows(u)"),)),
    Mutant(
        "scale of g_u", "with SP, the column layer's g_u is not scaled", ((FUNCTIONS, "scaled(_rows(grad_u), ctx.scale)", "_rows(grad_u)"),)
    ),
    Mutant("scale of u", "the low-rank part is added unscaled", ((FUNCTIONS, "alpha=factor", "alpha=1.0"),)),
    Mutant(
        "freed too early", "a recomputed layer is freed before its backward", ((ON_DEMAND, "if not self._backward_pending:", "if True:"),)
    ),
    Mutant("freed too late", "a layer stays whole after its forward", ((ON_DEMAND, "if not self._backward_pending:", "if False:"),)),
    Mutant(
        "first layer", "it stays whole after the backward pass", ((ON_DEMAND, "            layer.backward_done()", "            pass"),)
    ),
    Mutant(
        "prefetch, forward",
        "the next layer is not gathered behind this one",
        ((ON_DEMAND, "            behind.begin()", "            pass"),),
    ),
    Mutant(
        "prefetch, backward",
        "the layer before is not gathered behind this one",
        ((ON_DEMAND, "            before.begin()", "            pass"),),
    ),
)


def noticed_by(mutant: Mutant | None, tests: Sequence[str]) -> str | None:
    """The first test that fails with ``mutant``, None if none does."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        copy_tree(Path(name))
        if mutant is not None:
            apply(mutant, Path(name))
        failed = failing_tests(Path(name), tests)
        return failed[0] if failed else None


def write_page(
    what: str, command: str, mutants: Sequence[Mutant], tests: Sequence[str], *more: tuple[Sequence[Mutant], Sequence[str]]
) -> int:
    """Run all, each group with its tests, and write the page that is the command's last word; the exit code."""
    results = []
    for group, own_tests in ((mutants, tests), *more):
        if clean := noticed_by(None, own_tests):
            print(f"{clean} fails without any mutant", file=sys.stderr)
            return 1
        for mutant in group:
            results.append((mutant, noticed_by(mutant, own_tests)))
            print(f"{mutant.name}: {results[-1][1] or 'SURVIVED'}", flush=True)
    rows = [f"| {mutant.name} | {mutant.what} | {f'`{test}`' if test else 'nobody'} |" for mutant, test in results]
    head = f"# Mutants of {what}\n\nWritten by `{command}`: each fault is put into a copy on purpose.\n"
    page = Path(command.split()[-1])
    page.write_text("\n".join([head, "| mutant | what is wrong | noticed first by |", "|---|---|---|", *rows]) + "\n", encoding="utf-8")
    return 0 if all(test for _, test in results) else 1


def page_argument(doc: str | None) -> Path:
    """The Markdown file that the command line names."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, help="Markdown file to write")
    page: Path = parser.parse_args().page
    return page


def main() -> int:
    """Run all, write the page."""
    command = f"python benchmarks/mutants_engine.py {page_argument(__doc__)}"
    return write_page("the engine", command, MUTANTS, TESTS, (KERNEL_MUTANTS, KERNEL_TESTS))


if __name__ == "__main__":
    sys.exit(main())
