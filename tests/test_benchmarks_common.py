"""The benchmarks' shared parts: sides take turns, a section replaces itself and nothing else, mutants fit the code."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import common  # noqa: E402  (the benchmarks are no package)


def test_sides_take_turns_and_the_warm_up_is_left_out() -> None:
    calls: list[str] = []

    def side(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    values = common.alternate({"a": lambda: side("a"), "b": lambda: side("b")}, rounds=2, warm_up=1)
    assert calls == ["a", "b", "b", "a", "a", "b"]
    assert values == {"a": [4.0, 5.0], "b": [3.0, 6.0]}
    assert common.medians(values) == {"a": 4.5, "b": 4.5}
    assert common.ratio(values, "a", "b") == pytest.approx((4 / 3 + 5 / 6) / 2)


def test_a_disturbed_call_is_repeated_until_it_is_quiet_or_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    disturbed = iter([(3.0, 0.5), (2.0, 0.3), (1.0, 0.01)])
    monkeypatch.setattr(common, "foreign_share", lambda _side: next(disturbed))
    shares: list[float] = []
    assert common.undisturbed(lambda: 0.0, shares, limit=0.04)() == 1.0 and shares == [0.01]
    disturbed = iter([(3.0, 0.5)])
    assert common.undisturbed(lambda: 0.0, shares, limit=0.04, patience=0.0)() == 3.0 and shares == [0.01, 0.5]


def test_a_section_replaces_itself_and_keeps_the_others() -> None:
    page = "# Results\n\nIntro.\n\n## One\n\nold\n\n## Two\n\nkept\n"
    once = common.replace_section(page, "One", "new")
    assert once == "# Results\n\nIntro.\n\n## One\n\nnew\n\n## Two\n\nkept\n"
    assert common.replace_section(once, "One", "new") == once
    assert common.replace_section(once, "Three", "more").endswith("## Two\n\nkept\n\n## Three\n\nmore\n")


def test_results_name_machine_and_command(tmp_path: Path) -> None:
    common.write_results("x", "X", {"value": 1}, "body", tmp_path / "deep" / "x.json")
    written = json.loads((tmp_path / "deep" / "x.json").read_text())
    assert written["value"] == 1
    assert {"date", "commit", "command", "cpu", "cores", "load average", "python", "torch"} <= written["machine"].keys()
    assert common.provenance(written["machine"]).count("`") == 2


def test_a_table_is_aligned_with_its_head() -> None:
    assert common.markdown(("side", "s"), [("ours", 1.23456), ("peer", 2)]) == "| side | s |\n|---|---|\n| ours | 1.235 |\n| peer | 2 |"


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "benchmarks").glob("mutants_*.py")))
def test_every_mutant_still_finds_its_place(name: str) -> None:
    """A table of mutants is run by hand, hours apart; a change of the code that it misses is seen here."""
    for each in importlib.import_module(name).MUTANTS:
        for file, old, new in getattr(each, "mutant", each).changes:
            text = (ROOT / "mindspeed_lora" / file).read_text(encoding="utf-8")
            assert text.count(old) == 1 and old != new, f"{name}: {each.name}: {file} holds {old!r} {text.count(old)} times"
