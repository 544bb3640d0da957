"""Break the weight table on purpose, six ways, and see which tests notice.

    python benchmarks/mutants_weights.py docs/mutants.md

Each mutant is applied to a copy of the package in a temporary folder, and three groups of tests run there: what a shard means, round
trips, and the peer's own files (where ``../shared/golden`` is there). A mutant that is wrong both ways survives every round trip;
that is why the other two groups exist. Takes some minutes; exit code 1 if a mutant survives all, or a test fails without one.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 1200
GROUPS = {
    "meaning": ["tests/test_weights_table.py", "tests/test_weights_experts.py"],
    "round trip": ["tests/test_weights_roundtrip.py"],
    "peer's files": ["tests/test_conversion_golden.py", "-k", "peer_writes"],
}


@dataclass(frozen=True)
class Mutant:
    """One fault: (file of the package, text, text instead) for every place that it touches."""

    name: str
    what: str
    changes: tuple[tuple[str, str, str], ...]


MUTANTS = (
    Mutant(
        "wrong interleave",
        "linear_qkv is laid out per tensor rank instead of per query group",
        (("weights/table.py", '"group": self.groups,', '"group": tp_size,'),),
    ),
    Mutant(
        "swapped gate and up",
        "linear_fc1 is [up; gate]",
        (("weights/rows.py", "    gate, up, down = hf\n", "    up, gate, down = hf\n"),),
    ),
    Mutant(
        "unsplit bias",
        "every tensor rank holds the whole linear_qkv.bias",
        (("weights/rows.py", '("q", "k", "k"),\n        axis=0,', '("q", "k", "k"),\n        axis=None,'),),
    ),
    Mutant("k and v swapped", "a query group is q.. v k", (("weights/rows.py", 'for name in "qkv")', 'for name in "qvk")'),)),
    Mutant(
        "lost pad row",
        "the last vocabulary shard is one row short of padding",
        (("weights/table.py", "return start, stop, size - (stop - start)\n", "return start, stop, max(size - (stop - start) - 1, 0)\n"),),
    ),
    Mutant(
        "wrong expert order",
        "a rank's experts are numbered backwards, in writing and in reading",
        (
            ("weights/megatron_files.py", "local = row.expert - experts.start", "local = experts.stop - 1 - row.expert"),
            ("weights/megatron_folder.py", '.local_experts.{block * size + local}."', '.local_experts.{block * size + size - 1 - local}."'),
        ),
    ),
)


def copy_tree(target: Path) -> None:
    """The package, its tests and what they use of the benchmarks, without the time that hypothesis takes to simplify a failure."""
    for name in ("mindspeed_lora", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    shutil.copyfile(ROOT / "pyproject.toml", target / "pyproject.toml")
    path = target / "tests/test_weights_roundtrip.py"
    text = path.read_text(encoding="utf-8").replace("import given, settings", "import Phase, given, settings")
    path.write_text(text.replace("deadline=None", "deadline=None, phases=(Phase.generate,)"), encoding="utf-8")


def apply(mutant: Mutant, target: Path) -> None:
    """Change the copy; a text that is not there exactly once is an error."""
    for name, old, new in mutant.changes:
        path = target / "mindspeed_lora" / name
        text = path.read_text(encoding="utf-8")
        if text.count(old) != 1:
            raise SystemExit(f"{mutant.name}: {name} holds {old!r} {text.count(old)} times; bring this script up to date")
        path.write_text(text.replace(old, new), encoding="utf-8")


def failing_tests(target: Path, arguments: Sequence[str]) -> list[str]:
    """Names of the tests that fail in a copy."""
    shared = {f"MINDSPEED_LORA_TEST_{name.upper()}": str(ROOT.parent / "shared" / name) for name in ("golden", "data")}
    environment = {**shared, **os.environ, "PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=no", *arguments]
    done = subprocess.run(command, cwd=target, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    failed = re.findall(r"^(?:FAILED|ERROR) \S+?::(\w+)", done.stdout, flags=re.MULTILINE)
    if done.returncode not in (0, 1) or (done.returncode and not failed):  # a file that cannot be imported has no test to name
        raise SystemExit(f"pytest ended with {done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return sorted(set(failed))


def run(mutant: Mutant | None) -> dict[str, list[str]]:
    """Failing tests by group, with one mutant or none."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        target = Path(name)
        copy_tree(target)
        if mutant is not None:
            apply(mutant, target)
        return {group: failing_tests(target, arguments) for group, arguments in GROUPS.items()}


def page(results: Sequence[tuple[Mutant, dict[str, list[str]]]]) -> str:
    """The table as Markdown."""
    lines = [
        "# Mutants of the weight table",
        "",
        "Written by `python benchmarks/mutants_weights.py docs/mutants.md`: each fault is put into a copy of the package on purpose, and",
        "the tests run there. A number is how many test functions fail; without a fault none does. `-`: the group does not notice. A fault",
        "that is wrong both ways survives every round trip, so each fused layout also has a test of meaning, and the peer's own files are",
        "compared.",
        "",
        f"| mutant | what is wrong | {' | '.join(GROUPS)} | noticed first by |",
        f"|---|---|{'---|' * len(GROUPS)}---|",
    ]
    for mutant, failed in results:
        cells = [str(len(failed[group])) if failed[group] else "-" for group in GROUPS]
        first = next((f"`{tests[0]}`" for tests in failed.values() if tests), "**nothing**")
        lines.append(f"| {mutant.name} | {mutant.what} | {' | '.join(cells)} | {first} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run all mutants, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, nargs="?", help="Markdown file to write")
    arguments = parser.parse_args()
    broken = {group: tests for group, tests in run(None).items() if tests}
    if broken:
        print(f"these tests fail without any mutant: {broken}", file=sys.stderr)
        return 1
    results = []
    for mutant in MUTANTS:
        results.append((mutant, run(mutant)))
        print(f"{mutant.name}: {results[-1][1]}", flush=True)
    text = page(results)
    print(text)
    if arguments.page is not None:
        arguments.page.write_text(text, encoding="utf-8")
    return int(any(not any(failed.values()) for _, failed in results))


if __name__ == "__main__":
    sys.exit(main())
