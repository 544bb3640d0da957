"""Conversion: work time against copying the same bytes, peak memory, start-up; one run, both sides taking turns.

    python benchmarks/convert_speed.py --work /tmp/convert-speed --output benchmarks/results/convert_speed.json [--large]

Makes a random bf16 Qwen3 (1.5 GB: 28 layers, hidden 1024, vocabulary 151,936, untied; with ``--large`` also one of 6 GB) and an adapter
(r 16, every linear) and measures Hugging Face -> Megatron TP2 PP2, back, and back with the adapter merged, each as a fresh process:

- *work* = wall time of the command minus that of an idle interpreter with the same imports;
- *cp* = ``cp`` of the bytes that the conversion wrote and fsync of each file, source in the page cache, in the same round;
- *CPU* = user + system time of the command minus the idle one's, which other processes on the machine hardly touch;
- *peak* = the command's VmHWM, the maximal resident size, shared pages of mapped files included.

Each round runs idle, cp and every conversion once, so that a busy machine slows both sides. Ratios are of medians over ``--rounds``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
SHAPES: dict[str, dict[str, int]] = {
    "1.5 GB": dict(hidden_size=1024, intermediate_size=3072, num_hidden_layers=28),
    "6 GB": dict(hidden_size=2048, intermediate_size=6144, num_hidden_layers=48),
}
BARS = {"work / cp": 3.0, "peak GiB": 1.0, "start-up s": 4.0, "merge / plain": 1.3}
SAME = "same bytes after the way back"
R, ALPHA = 16, 32
IDLE = "import mindspeed_lora.arguments.parser, mindspeed_lora.conversion.run, safetensors.torch, numpy, tqdm"
# Runs in the child: the entry point, then its own VmHWM as the last line (RUSAGE_CHILDREN would mix several children).
CHILD = """
import runpy, sys
sys.argv = ["convert_ckpt.py", *sys.argv[1:]]
try:
    runpy.run_path("convert_ckpt.py", run_name="__main__")
except SystemExit as done:
    assert not done.code, done.code
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def make_model(folder: Path, shape: dict[str, int]) -> Path:
    """Write a random bf16 Qwen3 as safetensors, one tensor at a time."""
    import torch

    from mindspeed_lora.conversion.megatron_to_hf import write_hugging_face
    from mindspeed_lora.weights.block_writer import Block
    from mindspeed_lora.weights.families import model_config_from_hf
    from mindspeed_lora.weights.table import Row, WeightTable

    folder.mkdir(parents=True)
    config = dict(
        architectures=["Qwen3ForCausalLM"],
        model_type="qwen3",
        vocab_size=151936,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        max_position_embeddings=40960,
        tie_word_embeddings=False,
        hidden_act="silu",
        attention_bias=False,
        torch_dtype="bfloat16",
        **shape,
    )
    (folder / "config.json").write_text(json.dumps(config))

    class Random:
        verb = "making"

        def part_dtypes(self, row: Row, layer: int | None) -> list[torch.dtype]:
            return [torch.bfloat16] * len(row.part_shapes)

        def blocks(self, row: Row, layer: int | None, ranges: list[tuple[int, int, int]]) -> list[Block]:
            shapes = [(stop - start, *row.part_shapes[part][1:]) for part, start, stop in ranges]
            return [Block(shape, torch.bfloat16, partial(self.make, f"{row.name(layer)} {ranges}", shape)) for shape in shapes]

        @staticmethod
        def make(name: str, shape: tuple[int, ...]) -> list[torch.Tensor]:
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            return [torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)]

    write_hugging_face(folder, Random(), WeightTable(model_config_from_hf(folder)))  # type: ignore[arg-type]
    return folder


def make_adapter(folder: Path, model: Path) -> Path:
    """Write a random PEFT adapter of every linear for ``model``."""
    import torch

    from mindspeed_lora.arguments.configs import LORA_TARGETS
    from mindspeed_lora.weights.families import model_config_from_hf
    from mindspeed_lora.weights.lora_spec import LoraSpec
    from mindspeed_lora.weights.peft_files import write_peft_adapter
    from mindspeed_lora.weights.table import WeightTable

    table = WeightTable(model_config_from_hf(model))
    generator = torch.Generator().manual_seed(1)
    tensors = {
        (row, layer): (
            torch.randn(R, row.part_shapes[0][1], generator=generator).bfloat16(),
            [torch.randn(shape[0], R, generator=generator).mul_(0.01).bfloat16() for shape in row.part_shapes],
        )
        for row, layer in table.target_entries(LORA_TARGETS)
    }
    write_peft_adapter(folder, table, LoraSpec(R, ALPHA, LORA_TARGETS), tensors, model)
    return folder


def timed(command: Sequence[str]) -> dict[str, float]:
    """Run a process to its end: wall and CPU seconds, and the VmHWM in GiB that its last line says.

    Raises:
        RuntimeError: it failed.
    """
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    wall, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)[:200]}: exit code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    last = done.stdout.split()[-1:] or ["0"]
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return {"wall": wall, "cpu": cpu, "peak GiB": int(last[0]) / 2**20 if last[0].isdigit() else 0.0}


def convert(*flags: str | Path) -> dict[str, float]:
    """One run of ``convert_ckpt.py``."""
    return timed([sys.executable, "-c", CHILD, *map(str, flags)])


def copied(source: Path, target: Path) -> dict[str, float]:
    """``cp -r`` and fsync of every file; the copy is removed after the clock has stopped."""
    script = 'cp -r "$0" "$1" && find "$1" -type f -exec sync {} +'
    result = timed(["bash", "-c", script, str(source), str(target)])
    shutil.rmtree(target)
    return result


def warm(folder: Path) -> None:
    """Read every file once, so that both sides find it in the page cache."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                while stream.read(1 << 24):
                    pass


def folder_bytes(folder: Path) -> int:
    """Bytes of all files."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def steps_of(place: Path, adapter: Path) -> dict[str, tuple[Path, Path, Callable[[Path], dict[str, float]]]]:
    """Name -> (source, target, command) of the three conversions; the later ones read what the first wrote."""
    hf, mg = place / "hf", place / "mg"
    sizes = ("--target-tensor-parallel-size", "2", "--target-pipeline-parallel-size", "2")
    back = ("--load-model-type", "mg", "--save-model-type", "hf", "--load-dir", mg)
    return {
        "hf -> mg TP2 PP2": (
            hf,
            mg,
            lambda out: convert("--load-model-type", "hf", "--save-model-type", "mg", "--load-dir", hf, "--save-dir", out, *sizes),
        ),
        "mg TP2 PP2 -> hf": (mg, place / "hf2", lambda out: convert(*back, "--save-dir", out)),
        "merge into hf": (mg, place / "merged", lambda out: convert(*back, "--lora-load", adapter, "--save-dir", out)),
    }


def unzip_passes(folder: Path) -> bool | None:
    """Whether ``unzip -t`` accepts every ``.pt``; None: there is no unzip."""
    if shutil.which("unzip") is None:
        return None
    return all(subprocess.run(["unzip", "-tq", file], capture_output=True, check=False).returncode == 0 for file in folder.rglob("*.pt"))


def measure(place: Path, shape: dict[str, int], rounds: int) -> dict[str, Any]:
    """All rounds for one model; returns medians, ratios, and every single value."""
    print(f"making the model in {place}", flush=True)
    hf = make_model(place / "hf", shape)
    adapter = make_adapter(place / "adapter", hf)
    steps = steps_of(place, adapter)
    runs: dict[str, list[dict[str, float]]] = {"idle": []}
    result: dict[str, Any] = {"model bytes": folder_bytes(hf)}
    for turn in range(rounds):
        runs["idle"].append(timed([sys.executable, "-c", IDLE]))
        for name, (source, target, command) in steps.items():
            shutil.rmtree(target, ignore_errors=True)
            warm(source)
            runs.setdefault(name, []).append(command(target))
            warm(target)
            runs.setdefault(f"cp, {name}", []).append(copied(target, place / "copy"))
            print(f"round {turn + 1}: {name}: {runs[name][-1]}, cp {runs[f'cp, {name}'][-1]['wall']:.1f} s", flush=True)
    result["unzip -t"] = unzip_passes(place / "mg")
    result[SAME] = same_weights(hf, place / "hf2")
    result["steps"], result["start-up s"] = summary(runs, list(steps)), median(runs["idle"], "wall")
    result["runs"] = runs
    return result


def same_weights(first: Path, second: Path) -> bool:
    """Whether the safetensors of two folders are byte for byte the same."""
    files = sorted(path.name for path in first.glob("*.safetensors"))
    return bool(files) and all(subprocess.run(["cmp", "-s", first / name, second / name], check=False).returncode == 0 for name in files)


def median(runs: Sequence[dict[str, float]], key: str) -> float:
    """Median of one value over the rounds."""
    return statistics.median(run[key] for run in runs)


def summary(runs: dict[str, list[dict[str, float]]], names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Per conversion: work, cp, their ratio, CPU times and peak; the merge also against the plain conversion."""
    idle_wall, idle_cpu = median(runs["idle"], "wall"), median(runs["idle"], "cpu")
    rows: dict[str, dict[str, float]] = {}
    for name in names:
        work, copy = median(runs[name], "wall") - idle_wall, median(runs[f"cp, {name}"], "wall")
        rows[name] = {
            "work s": work,
            "cp s": copy,
            "work / cp": work / copy,
            "CPU s": median(runs[name], "cpu") - idle_cpu,
            "cp CPU s": median(runs[f"cp, {name}"], "cpu"),
            "peak GiB": max(run["peak GiB"] for run in runs[name]),
        }
    plain, merge = names[-2], names[-1]
    rows[merge]["merge / plain"] = rows[merge]["work s"] / rows[plain]["work s"]
    rows[merge]["merge / plain, CPU"] = rows[merge]["CPU s"] / rows[plain]["CPU s"]
    return rows


def table_of(results: dict[str, dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    head = ("model", "conversion", "work s", "cp s", "work / cp", "CPU s", "cp CPU s", "peak GiB", "merge / plain")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for model, result in results.items():
        for name, row in result["steps"].items():
            values = [f"{row[key]:.2f}" if key in row else "" for key in head[2:]]
            lines.append(f"| {model} | {name} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """What the numbers belong to."""
    import torch

    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory GiB": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load average": os.getloadavg(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
        "command": f"python {' '.join(sys.argv)}",
    }


def main() -> int:
    """Measure, print the table and the bars, write the JSON, remove the models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--work", type=Path, default=Path("/tmp/convert-speed"), help="folder for the models (6 GB; with --large 30 GB)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--large", action="store_true", help="also 6 GB, one round in place of --rounds")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    flags = parser.parse_args()
    flags.work.mkdir(parents=True)
    found: dict[str, Any] = {"machine": machine()}
    results = {}
    try:
        for name in ["1.5 GB", "6 GB"] if flags.large else ["1.5 GB"]:
            place = flags.work / name.replace(" ", "")
            results[name] = measure(place, SHAPES[name], flags.rounds if name == "1.5 GB" else 1)
            shutil.rmtree(place)
    finally:
        shutil.rmtree(flags.work)
    print(table_of(results))
    for name, result in results.items():
        print(f"{name}: start-up {result['start-up s']:.2f} s, unzip -t {result['unzip -t']}, same bytes {result[SAME]}")
    print("bars:", ", ".join(f"{name} <= {value}" for name, value in BARS.items()))
    if flags.output:
        flags.output.parent.mkdir(parents=True, exist_ok=True)
        flags.output.write_text(json.dumps({**found, "bars": BARS, "results": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
