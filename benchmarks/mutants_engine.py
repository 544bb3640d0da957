"""Break the engine on purpose, twelve ways, and see that the parity tests notice each.

    python benchmarks/mutants_engine.py docs/mutants_engine.md

As ``mutants_weights.py``, with faults in the fused LoRA functions, attention, rotary tables, the loss head, the initial values and the
reductions; the tests compare logits and gradients with transformers and PEFT. Takes about ten minutes; exit code 1 if one survives.
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
FUNCTIONS, LAYERS, LOSS = "lora/functions.py", "model/layers.py", "parallel/cross_entropy.py"

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
        ((FUNCTIONS, "_grad_b(wide, u, b, ctx.scale)\n        whole", "_grad_b(wide, u, b, 1.0)\n        whole"),),
    ),
    Mutant(
        "rotary halves",
        "the rotation turns the wrong way",
        (("ops/fused.py", "y_first.addcmul_(second, sine_first, value=-1)", "y_first.addcmul_(second, sine_first)"),),
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
    Mutant("target's rank", "each rank takes targets for its own columns", ((LOSS, "local = target - self.first", "local = target"),)),
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


def noticed_by(mutant: Mutant | None, tests: Sequence[str]) -> str | None:
    """The first test that fails with ``mutant``, None if none does."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        copy_tree(Path(name))
        if mutant is not None:
            apply(mutant, Path(name))
        failed = failing_tests(Path(name), tests)
        return failed[0] if failed else None


def write_page(what: str, command: str, mutants: Sequence[Mutant], tests: Sequence[str]) -> int:
    """Run all, write the page that is the command's last word; the exit code."""
    if clean := noticed_by(None, tests):
        print(f"{clean} fails without any mutant", file=sys.stderr)
        return 1
    results = []
    for mutant in mutants:
        results.append((mutant, noticed_by(mutant, tests)))
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
    return write_page("the engine", f"python benchmarks/mutants_engine.py {page_argument(__doc__)}", MUTANTS, TESTS)


if __name__ == "__main__":
    sys.exit(main())
