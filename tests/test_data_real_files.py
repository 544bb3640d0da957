"""Public files through real tokenizers: what docs/real_data.md records is what comes out."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import pytest
from helpers import ROOT, shared_data

from mindspeed_lora.data.preprocess import preview


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """benchmarks/real_data.py"""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        spec = importlib.util.spec_from_file_location("real_data", ROOT / "benchmarks" / "real_data.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["real_data"] = module
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


@pytest.mark.slow
def test_counts_and_previews_are_those_recorded(script: ModuleType) -> None:
    recorded = (ROOT / "docs" / "real_data.md").read_text(encoding="utf-8")
    assert script.page(shared_data()) == recorded


@pytest.mark.slow
@pytest.mark.parametrize("template", ["qwen3", "llama3"])
def test_every_answer_of_every_file_ends_with_a_stop_token(template: str, script: ModuleType) -> None:
    data = shared_data()
    for case in script.CASES:
        lines = list(preview(script.config_of(case, template, data, None), 50))
        titles = [line for line in lines if line.startswith("record ") and ": skipped" not in line]
        assert titles and all("ends with the stop token" in line for line in titles), case
