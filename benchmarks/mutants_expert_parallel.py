"""Break expert parallelism on purpose, twelve ways, and see that its tests notice each.

    python benchmarks/mutants_expert_parallel.py docs/mutants_expert_parallel.md

As ``mutants_engine.py``, with faults in the dispatch, the experts' grid, reductions, saves and continued runs; the tests compare with
transformers and with one process. Takes about ten minutes; exit code 1 if one survives.
"""

from __future__ import annotations

import sys

from mutants_engine import page_argument, write_page
from mutants_weights import Mutant

PARITY = "merged_weights and (tp1-pp1-ep2 or ep4-etp1-dp2 or ep1-etp1)"
CHOICE = f"({PARITY}) or (transformers and etp1-dp1) or (one_process and ep2 and not tp2 and not pp2 and not dp4) or tp2ep4etp1]"
FILES = [f"tests/test_expert_parallel_{name}.py" for name in ("parity", "training", "asking")]
TESTS = ["-x", *FILES, "-k", CHOICE, "-m", "not slow and not full"]
DISPATCH, CONTEXT, EXPERTS = "parallel/dispatch.py", "parallel/context.py", "model/experts.py"
RETURNED = "all_to_all_rows(rows.index_select(0, exchange.back), exchange.received, exchange.sent, exchange.group)"

MUTANTS = (
    Mutant(
        "dropped token",
        "the first row of an exchange comes back as zero",
        ((DISPATCH, RETURNED, f"torch.nn.functional.pad({RETURNED}[1:], (0, 0, 1, 0))"),),
    ),
    Mutant("permutation", "results go back in the experts' order", ((DISPATCH, "rows.index_select(0, exchange.back)", "rows"),)),
    Mutant(
        "arrival",
        "rows are computed in the order of arrival",
        ((DISPATCH, "exchange.group).index_select(0, exchange.order)", "exchange.group)"),),
    ),
    Mutant(
        "expert order",
        "each rank holds the next rank's experts",
        (
            (
                CONTEXT,
                "return range(self.experts.ep_rank * size, (self.experts.ep_rank + 1) * size)",
                "first = (self.experts.ep_rank + 1) % self.experts.ep_size * size\n        return range(first, first + size)",
            ),
        ),
    ),
    Mutant(
        "reduced over DP",
        "gradients of different experts are summed over the data-parallel group",
        ((CONTEXT, "dp_group=grid.dp_group,", "dp_group=self.dp_group,"),),
    ),
    Mutant(
        "not reduced",
        "gradients of the same expert on several ranks are not summed",
        ((CONTEXT, "dp_group=grid.dp_group,", "dp_group=None,"),),
    ),
    Mutant(
        "own norm",
        "the gradient norm leaves out other ranks' experts",
        ((CONTEXT, "model_group=grid.model_group,", "model_group=self.model_group,"),),
    ),
    Mutant(
        "other tokens",
        "a TP rank's results are put to the first tokens",
        ((EXPERTS, "(0, 0, start, len(tokens) - stop)", "(0, 0, 0, len(tokens) - stop + start)"),),
    ),
    Mutant(
        "router's share",
        "the router's gradient is not summed over the ranks that route parts of the tokens",
        (("weights/rows.py", '(dims,), grad_sum="always"', '(dims,), grad_sum="never"'),),
    ),
    Mutant(
        "own answers",
        "results are not summed over the experts' ranks when the model is asked",
        (
            (
                EXPERTS,
                "return all_reduce(self._own_part(tokens, weights, experts), self.grid.ep_group)",
                "return self._own_part(tokens, weights, experts)",
            ),
        ),
    ),
    Mutant(
        "saved numbers",
        "a rank's file counts experts globally",
        (("checkpoint/adapter_files.py", "range(len(stage.experts))", "stage.experts"),),
    ),
    Mutant(
        "saved state",
        "the training state of other ranks' experts is not kept",
        (("checkpoint/resume.py", "(experts.ep_group if stack else None,", "(None,"),),
    ),
)

if __name__ == "__main__":
    command = f"python benchmarks/mutants_expert_parallel.py {page_argument(__doc__)}"
    sys.exit(write_page("expert parallelism", command, MUTANTS, TESTS))
