"""Preprocessing: 52,002 Alpaca records with Qwen3's tokenizer and template, against the tokenizer alone on the same text.

    TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 python benchmarks/preprocess_speed.py --rounds 3
    TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 python benchmarks/preprocess_speed.py --memory

The tokenizer alone is ``tokenizer(batch)`` in batches of 1000, each record one text, as the template writes it. Ours is
``preprocess_data.py`` from records to finished files; its loop is reading, encoding and writing, without start-up and without the
checksums at the end, which are listed beside it. Every side is a process of its own; they take turns.
``--memory``: peak resident memory of ours with the records once and ten times over, as parquet and as one JSON list.
Needs ../shared/data (or MINDSPEED_LORA_TEST_DATA); ``--dry-run`` makes its own tokenizer and records.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from common import ROOT, add_root_to_path, alternate, markdown, medians, parser, ratio, spread, write_results

BATCH = 1000
TURNS = ("tokenizer", "workers 1", "workers 2")
BARS = {"loop": 1.3, "two": 1.6, "start": 5.0}


def measure_tokenizer(source: Path, tokenizer_dir: Path) -> dict[str, float]:
    """Seconds of the tokenizer alone, in this process."""
    from collections import Counter

    from mindspeed_lora.arguments.configs import PreprocessConfig, TemplateFlags, TokenizerFlags
    from mindspeed_lora.data.planning import make_plan

    plan = make_plan(PreprocessConfig(source, None, TokenizerFlags(tokenizer_dir), TemplateFlags("qwen3")))
    form = plan.recipe.form(plan.tokenizer, plan.recipe)
    records = (record for record in plan.source.records() if isinstance(record, dict))
    texts = ["".join(str(element) for part in form.parts(record, Counter()) for element in part) for record in records]
    start = time.perf_counter()
    for first in range(0, len(texts), BATCH):
        plan.tokenizer(texts[first : first + BATCH])
    return {"loop": time.perf_counter() - start, "records": float(len(texts))}


def measure_ours(source: Path, tokenizer_dir: Path, workers: int, output: Path, spawned: float) -> dict[str, float]:
    """Seconds and peak memory (MiB) of ``preprocess_data.py``, in this process and its workers. ``spawned``: when it was started."""
    from mindspeed_lora.arguments.parser import parse
    from mindspeed_lora.data.preprocess import write_dataset
    from mindspeed_lora.device import check_torch_version

    words = ["--input", str(source), "--tokenizer-name-or-path", str(tokenizer_dir), "--output-prefix", str(output / "out")]
    words += ["--handler-name", "AlpacaStyleInstructionHandler", "--prompt-type", "qwen3", "--workers", str(workers)]
    config, _ = parse("preprocess_data.py", words)
    check_torch_version()
    before = time.time() - spawned
    report = write_dataset(config)
    own, children = (resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {
        "loop": report.loop_seconds,
        "start": before + report.start_seconds,
        "finish": report.seconds - report.loop_seconds - report.start_seconds,
        "records": float(report.num_records),
        "tokens": float(report.num_tokens),
        "peak MiB": own,
        "worker peak MiB": children if workers > 1 else 0.0,
    }


def run_side(side: str, source: Path, tokenizer_dir: Path) -> dict[str, float]:
    """One side in a process of its own."""
    with tempfile.TemporaryDirectory() as output:
        words = [sys.executable, __file__, "--side", side, "--source", str(source), "--tokenizer", str(tokenizer_dir), "--files", output]
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*words, "--spawned", str(time.time())], stdout=subprocess.PIPE, check=True, env=environment)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def speed(source: Path, tokenizer_dir: Path, rounds: int, warm_up: int) -> tuple[dict[str, Any], str]:
    """All sides in turn: every value, and the tables."""
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in TURNS}

    def once(side: str) -> float:
        runs[side].append(run_side(side, source, tokenizer_dir))
        return runs[side][-1]["loop"]

    values = alternate({side: partial(once, side) for side in TURNS}, rounds, warm_up)
    kept = {side: found[-rounds:] for side, found in runs.items()}
    middle = medians(values)
    start = medians({side: [run["start"] for run in kept[side]] for side in TURNS[1:]})
    finish = medians({side: [run["finish"] for run in kept[side]] for side in TURNS[1:]})
    rows = [[side, middle[side], f"{spread(values[side]):.0%}", start.get(side, ""), finish.get(side, "")] for side in TURNS]
    loop, two = ratio(values, "workers 1", "tokenizer"), ratio(values, "workers 1", "workers 2")
    bars = [
        [f"loop with --workers 1 <= {BARS['loop']} x the tokenizer alone", loop, _met(loop <= BARS["loop"])],
        [f"--workers 2 >= {BARS['two']} x faster", two, _met(two >= BARS["two"])],
        [f"start-up <= {BARS['start']:g} s", max(start.values()), _met(max(start.values()) <= BARS["start"])],
    ]
    counts = f"{kept['workers 1'][0]['records']:,.0f} records, {kept['workers 1'][0]['tokens']:,.0f} tokens; medians of {rounds} rounds."
    head = ["side", "loop s", "spread", "start-up s", "checksums and moving s"]
    return {"runs": kept, "loop": loop, "two": two}, f"{counts}\n\n{markdown(head, rows)}\n\n{markdown(['bar', 'found', 'met'], bars)}"


def memory(source: Path, tokenizer_dir: Path, folder: Path) -> tuple[dict[str, Any], str]:
    """Peak memory with the records once and ten times over."""
    made = {f"{kind}, {times} x": _copies(source, folder / f"{times}.{kind}", times) for kind in ("parquet", "json") for times in (1, 10)}
    found = {name: {side: run_side(side, path, tokenizer_dir) for side in TURNS[1:]} for name, path in made.items()}
    rows = []
    for (name, sides), path in zip(found.items(), made.values(), strict=True):
        one, two = (sides[side] for side in TURNS[1:])
        peaks = [one["peak MiB"], two["peak MiB"], two["worker peak MiB"]]
        rows.append([name, f"{one['records']:,.0f}", path.stat().st_size / 2**20, *peaks])
    head = ["input", "records", "file MiB", "peak MiB, one process", "peak MiB, parent of two workers", "largest worker"]
    return {"memory": found}, markdown(head, rows)


def _copies(source: Path, target: Path, times: int) -> Path:
    """The records ``times`` over, in a file of the target's kind."""
    import pyarrow
    import pyarrow.parquet

    from mindspeed_lora.data.readers import open_records

    records = [record for record in open_records(source).records() if isinstance(record, dict)]
    if target.suffix == ".parquet":
        table = pyarrow.Table.from_pylist(records)
        with pyarrow.parquet.ParquetWriter(target, table.schema) as writer:
            for _ in range(times):
                writer.write_table(table)
        return target
    with target.open("w", encoding="utf-8") as file:
        for number in range(times):
            text = json.dumps(records, ensure_ascii=False)[1:-1]
            file.write(("[" if number == 0 else ",\n") + text)
        file.write("]")
    return target


def _met(met: bool) -> str:
    return "yes" if met else "**no**"


def _inputs(dry_run: bool, folder: Path) -> tuple[Path, Path]:
    """The records and the tokenizer."""
    if dry_run:
        sys.path.insert(0, str(ROOT / "tests"))
        from data_helpers import alpaca_records, tiny_tokenizer, write_json

        return write_json(folder / "alpaca.json", alpaca_records(3000)), tiny_tokenizer(folder / "tokenizer")
    data = Path(os.environ.get("MINDSPEED_LORA_TEST_DATA", ROOT.parent / "shared" / "data"))
    sources = sorted((data / "alpaca").glob("*.parquet"))
    if not sources:
        sys.exit(f"{data} has no alpaca/*.parquet; set MINDSPEED_LORA_TEST_DATA")
    return sources[0], data / "qwen3-tokenizer"


def _child(options: argparse.Namespace) -> None:
    if options.side == "tokenizer":
        found = measure_tokenizer(options.source, options.tokenizer)
    else:
        found = measure_ours(options.source, options.tokenizer, int(options.side.split()[1]), options.files, options.spawned)
    print(json.dumps(found))


def main() -> None:
    """Measure and write the results."""
    add_root_to_path()
    made = parser(__doc__)
    made.add_argument("--memory", action="store_true", help="measure memory instead of time")
    for name, kind in (("side", str), ("source", Path), ("tokenizer", Path), ("files", Path), ("spawned", float)):
        made.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)  # of the processes that this one starts
    options = made.parse_args()
    if options.side:
        _child(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        source, tokenizer_dir = _inputs(options.dry_run, Path(folder))
        if options.memory:
            result, body = memory(source, tokenizer_dir, Path(folder))
        else:
            result, body = speed(source, tokenizer_dir, options.rounds, warm_up=0 if options.dry_run else 1)
    kind = "memory" if options.memory else "speed"
    if options.dry_run:
        print(body)
        return
    write_results(f"preprocess_{kind}", f"Preprocessing: {kind} (`preprocess_speed.py`)", result, body, options.output)


if __name__ == "__main__":
    main()
