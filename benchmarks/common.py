"""What the benchmarks share: the machine, sides that take turns, medians, and where results go.

Every script measures both sides in one process and one run (:func:`alternate`), so that a busy machine slows both; it writes all single
values as JSON into ``results/`` and replaces its own section of ``RESULTS.md`` (:func:`write_results`). Needs nothing but torch.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PACKAGES = ("torch", "transformers", "peft", "trl", "unsloth", "llamafactory", "liger_kernel", "bitsandbytes", "torchao", "flash_attn")
NOT_RUN = "not run (no GPU lent)"
Values = dict[str, list[float]]


def add_root_to_path() -> None:
    """Make ``import mindspeed_lora`` work from a bare checkout."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))


def machine() -> dict[str, Any]:
    """What a number has to be read with: date, commit, command, processor, device, load, versions."""
    import torch

    found: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "command": " ".join(["python", *sys.argv]),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory GiB": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load average": [round(value, 2) for value in os.getloadavg()],
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        found |= {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return found | {name: version for name in PACKAGES if (version := package_version(name))}


def commit() -> str:
    """Short hash of the checkout, with "+" where files differ from it; "" outside git."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results", ":!benchmarks/RESULTS.md")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def package_version(name: str) -> str | None:
    """Installed version, None where it is not installed; nothing is imported."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def alternate(sides: Mapping[str, Callable[[], float]], rounds: int = 5, warm_up: int = 1) -> Values:
    """Call every side once per round, in turn; returns what the calls returned, less ``warm_up`` first rounds.

    Every second round goes backwards, so that no side always runs on the caches of the same neighbour.
    """
    values: Values = {name: [] for name in sides}
    for number in range(warm_up + rounds):
        order = list(sides) if number % 2 == 0 else list(reversed(sides))
        for name in order:
            value = sides[name]()
            if number >= warm_up:
                values[name].append(value)
    return values


def _busy_seconds() -> float:
    """Time that all cores together have worked so far, for whichever process (Linux; in steps of 10 ms)."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def foreign_share(work: Callable[[], float]) -> tuple[float, float]:
    """(what ``work`` returned, the part of all cores' time that other processes took meanwhile)."""
    busy, own, start = _busy_seconds(), sum(os.times()[:4]), time.perf_counter()
    value = work()
    cores = (time.perf_counter() - start) * (os.cpu_count() or 1)
    return value, max(0.0, _busy_seconds() - busy - (sum(os.times()[:4]) - own)) / cores


def undisturbed(side: Callable[[], float], shares: list[float], limit: float = 0.04, patience: float = 4.0) -> Callable[[], float]:
    """``side``, repeated while other processes took more than ``limit`` of the cores; after ``patience`` seconds the quietest try counts.

    ``shares`` gets the foreign share of each value that counts. For a machine that is not this measurement's alone.
    """

    def quiet() -> float:
        tries, end = [], time.perf_counter() + patience
        while not tries or (tries[-1][1] > limit and time.perf_counter() < end):
            tries.append(foreign_share(side))
        value, share = min(tries, key=lambda one: one[1])
        shares.append(share)
        return value

    return quiet


def seconds(work: Callable[[], object], calls: int = 1, clock: Callable[[], float] = time.perf_counter) -> Callable[[], float]:
    """A side for :func:`alternate`: seconds per call of ``work``, the device's queue included.

    ``clock``: ``time.process_time`` counts the work of this process's threads, whatever else the machine does: to be used with one
    thread, since threads that wait for each other may count as working.
    """

    def side() -> float:
        wait()
        start = clock()
        for _ in range(calls):
            work()
        wait()
        return (clock() - start) / calls

    return side


def wait() -> None:
    """Until the device has done what was queued."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def medians(values: Values) -> dict[str, float]:
    """Median of each side."""
    return {name: statistics.median(series) for name, series in values.items()}


def spread(series: Sequence[float]) -> float:
    """(largest - smallest) / median: how quiet the machine was."""
    return (max(series) - min(series)) / statistics.median(series)


def ratio(values: Values, above: str, below: str) -> float:
    """Median over the rounds of ``above / below``, which slow spells of the machine hardly touch."""
    return statistics.median(one / other for one, other in zip(values[above], values[below], strict=True))


def markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table; floats in four significant digits."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        lines.append("| " + " | ".join(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row) + " |")
    return "\n".join(lines)


def provenance(found: Mapping[str, Any]) -> str:
    """One line of Markdown: date, machine, versions, commit and command of :func:`machine`."""
    versions = ", ".join(f"{name} {found[name]}" for name in PACKAGES if name in found)
    place = f"{found['device']}, " if "device" in found else ""
    return (
        f"{found['date']}, {place}{found['cpu']} ({found['cores']} cores, {found['threads']} threads, {found['memory GiB']} GiB, load "
        f"{found['load average'][0]}), Python {found['python']}, {versions}, commit {found['commit']}: `{found['command']}`"
    )


def replace_section(text: str, title: str, body: str) -> str:
    """``text`` with the section ``## title`` replaced by ``body``, or added at the end."""
    section = f"## {title}\n\n{body.strip()}\n"
    head, *parts = text.split("\n## ")
    kept, found = [], False
    for part in parts:
        own = part.split("\n", 1)[0].strip() == title
        found = found or own
        kept.append(section if own else f"## {part.rstrip()}\n")
    if not found:
        kept.append(section)
    return "\n".join([head.rstrip() + "\n", *kept])


def write_results(name: str, title: str, result: Mapping[str, Any], body: str, output: Path | None = None) -> None:
    """Write ``results/<name>.json`` and the section ``title`` of ``RESULTS.md``; with ``output`` only that JSON file.

    ``result`` gets :func:`machine` beside it where it has none; the section gets its line.
    """
    whole = {"machine": result.get("machine") or machine(), **result}
    path = output or HERE / "results" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    print(body)
    if output is None:
        page = HERE / "RESULTS.md"
        page.write_text(replace_section(page.read_text(encoding="utf-8"), title, f"{provenance(whole['machine'])}\n\n{body}"), "utf-8")


def parser(doc: str | None) -> argparse.ArgumentParser:
    """``--rounds``, ``--output``, ``--dry-run``: what every script takes."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    made.add_argument("--rounds", type=int, default=5, help="rounds whose median counts; every side runs once a round (default: 5)")
    made.add_argument("--output", type=Path, help="JSON file to write in place of results/ and RESULTS.md")
    made.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU: shows that the script runs, measures nothing")
    return made
