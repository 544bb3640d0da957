"""The evaluate scripts of every family: their words parse, and what a caller adds comes last."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from helpers import ROOT

SCRIPTS = sorted((ROOT / "examples" / "mcore").glob("*/evaluate_*.sh"))


def test_every_family_has_both() -> None:
    names = {path.name.removesuffix(".sh") for path in SCRIPTS}
    assert {f"evaluate_{family}{kind}" for family in ("qwen3_8b", "llama3_8b", "qwen25_7b") for kind in ("_ptd", "_lora_ptd")} <= names


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
@pytest.mark.parametrize("task", ["mmlu", "mmlu gsm8k"])
def test_the_words_of_a_script_parse(script: Path, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mindspeed_lora.arguments.parser import parse

    fake = tmp_path / "fake_python"
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n', encoding="utf-8")
    fake.chmod(0o755)
    family = script.parent.name
    size = script.stem.split("_")[2]
    for folder in (f"model_from_hf/{family}_hf", f"model_weights/{family}_mcore", f"ckpt/{family}-{size}-lora", "mmlu/test"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    environment = {"PATH": os.environ["PATH"], "PYTHON": str(fake), "TASK": task}
    subprocess.run(["bash", str(script), "--compare-base", "--log-samples"], cwd=tmp_path, env=environment, check=True, timeout=60)
    words = (tmp_path / "logs" / f"{script.stem}.log").read_text(encoding="utf-8").splitlines()
    words = words[next(index for index, word in enumerate(words) if word.endswith("evaluation.py")) + 1 :]
    if "lora" not in script.stem:
        words.remove("--compare-base")
    config, _ = parse("evaluation.py", words)
    assert config.tasks == tuple(task.split()) and config.log_samples and config.task_data_path == (Path("mmlu/test"),)
    assert config.compare_base == ("lora" in script.stem)
