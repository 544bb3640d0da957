"""How long training waits for its batches: the share of the step that the loader holds up, and the time to make one batch.

The model is a toy, so that a step is short and the share large; the batches are as large as those of real runs. Target: below 1 %.

    OMP_NUM_THREADS=1 python benchmarks/data_wait.py --rounds 20
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import add_root_to_path, machine, markdown, parser, write_results

add_root_to_path()
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

VOCAB, SAMPLES = 320, 4000
HEAD = ("data", "rows x tokens of a step", "step ms", "waited ms", "share %", "one batch ms")


def write_samples(folder: Path) -> None:
    """Records of 50 to 1024 tokens, the same as packs of 4096, and pairs."""
    from mindspeed_lora.data.indexed_dataset import IndexedDatasetBuilder
    from mindspeed_lora.data.packing import fill_bags, packed_samples
    from mindspeed_lora.data.sft_dataset import KEYS, PAIR_KEYS, key_stem

    random = np.random.RandomState(0)
    ids = [random.randint(4, VOCAB, random.randint(50, 1024)) for _ in range(SAMPLES)]
    labels = [np.where(np.arange(len(row)) < len(row) // 3, -100, row) for row in ids]
    packs = list(packed_samples(ids, labels, fill_bags([len(row) for row in ids], 4095), 4096, 0, neat=True))
    columns = {"records": [ids, labels, [np.ones_like(row) for row in ids]], "packs": [[pack[key] for pack in packs] for key in KEYS]}
    columns["pairs"] = [ids[::2], labels[::2], ids[1::2], labels[1::2]]
    for name, values in columns.items():
        for key, rows in zip(PAIR_KEYS if name == "pairs" else KEYS, values, strict=True):
            with IndexedDatasetBuilder(key_stem(folder / name, key)) as builder:
                for row in rows:
                    builder.add_document(row)
                builder.finish()


def configs(folder: Path, steps: int) -> dict[str, Any]:
    """A run of each kind of batch."""
    from training_helpers import make_config

    from mindspeed_lora.arguments.configs import PreferenceFlags

    def run(data: str, **changes: Any) -> Any:
        common = dict(train_iters=steps, save__save=folder / "out" / data, data__data_path=str(folder / data), runtime__seed=1)
        return make_config(folder, **{**common, **changes})

    records = dict(data__seq_length=1024, micro_batch_size=4, global_batch_size=32)
    return {
        "padded records": run("records", **records),
        "padding-free records": run("records", **records, data__padding_free=True, save__save=folder / "out" / "free"),
        "packs, --reset-attention-mask": run(
            "packs", data__seq_length=4096, micro_batch_size=1, global_batch_size=8, data__reset_attention_mask=True
        ),
        "pairs, --stage dpo": run("pairs", **{**records, "global_batch_size": 16}, stage="dpo", preference=PreferenceFlags()),
    }


def make_time(config: Any, count: int = 5) -> float:
    """Milliseconds to make one batch, on this thread."""
    from mindspeed_lora.parallel.context import single_process_context
    from mindspeed_lora.training.preflight import plan_training
    from mindspeed_lora.training.run import training_batches

    batches = training_batches(plan_training(config, 1), single_process_context())
    batches.prefetch = False
    times = []
    iterator = iter(batches)
    for _ in range(count):
        start = time.perf_counter()
        next(iterator)
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def measure(name: str, config: Any, run: Callable[[Any], Any]) -> dict[str, Any]:
    """One run; the first step, whose batch nobody prepared, is left out."""
    import dataclasses

    made = make_time(dataclasses.replace(config, save=dataclasses.replace(config.save, save=None)))
    run(config)
    records = [json.loads(line) for line in (config.save.save / "metrics.jsonl").read_text().splitlines()][1:]
    step, waited = (statistics.mean(record[key] for record in records) for key in ("elapsed_ms", "data_ms"))
    rows = config.global_batch_size * (2 if config.preference else 1)
    return {
        "data": name,
        "step": f"{rows} x {config.data.seq_length}",
        "step_ms": step,
        "waited_ms": waited,
        "share_percent": 100 * waited / step,
        "make_ms": made,
    }


def main() -> None:
    """Measure the four kinds of batches and write the section; ``--rounds`` are steps."""
    options = parser(__doc__).parse_args()
    options.rounds = 2 if options.dry_run else max(options.rounds, 3)
    from helpers import make_model
    from training_helpers import run_training, write_tokenizer

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model", "qwen3", num_hidden_layers=2, max_position_embeddings=8192)
        write_tokenizer(folder / "model")
        write_samples(folder)
        found = machine()
        results = [measure(name, config, run_training) for name, config in itertools.islice(configs(folder, options.rounds).items(), 4)]
    table = markdown(HEAD, [list(result.values()) for result in results])
    if options.dry_run:
        print(table)
        return
    body = (
        f"Target: a share below 1 %. A toy model of 2 layers (a real one's step is longer, its batches the same); one process.\n\n{table}"
    )
    write_results("data_wait", "Waiting for data (`data_wait.py`)", {"machine": found, "results": results}, body, options.output)


if __name__ == "__main__":
    main()
