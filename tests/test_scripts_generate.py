"""The generate_* and chat_* scripts of every family: their defaults parse, and the program's exit code is theirs."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from helpers import ROOT

from mindspeed_lora.arguments.parser import parse

FOLDER = ROOT / "examples" / "mcore"
SCRIPTS = sorted(path for kind in ("generate_*", "chat_*") for path in FOLDER.glob(f"*/{kind}.sh"))


def test_every_family_has_them() -> None:
    assert {path.parent.name for path in SCRIPTS} == {"llama3", "qwen25", "qwen3"} and len(SCRIPTS) == 9


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_defaults_parse_and_the_exit_code_is_the_programs(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = script.parent.name
    size = {"llama3": "llama3-8b", "qwen25": "qwen25-7b", "qwen3": "qwen3-8b"}[family]
    for folder in (f"model_from_hf/{family}_hf", f"model_weights/{family}_mcore", f"ckpt/{size}-lora"):
        (tmp_path / folder).mkdir(parents=True)
    python = tmp_path / "fake_python"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\nexit 3\n', encoding="utf-8")
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python), "CHECKPOINT_LORA": f"./ckpt/{size}-lora"}
    result = subprocess.run(
        ["bash", str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL
    )
    assert result.returncode == 3, result.stderr
    words = (tmp_path / "logs" / f"{script.stem}.log").read_text(encoding="utf-8").splitlines()
    place = next(index for index, word in enumerate(words) if word.startswith(str(ROOT)))
    monkeypatch.chdir(tmp_path)
    config = parse(Path(words[place]).name, words[place + 1 :])[0]
    assert config.tasks == (("chat",) if script.stem.startswith("chat") else ("greedy", "do_sample"))
