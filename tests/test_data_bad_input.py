"""What goes wrong while preprocessing runs: a full disk, a worker that dies, a parent that does; and messages from start to end."""

from __future__ import annotations

import errno
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from data_helpers import alpaca_records, tiny_tokenizer, write_json
from helpers import ROOT

from mindspeed_lora.arguments.cli import main
from mindspeed_lora.arguments.configs import PreprocessConfig, TemplateFlags, TokenizerFlags
from mindspeed_lora.data import indexed_dataset
from mindspeed_lora.data.encoding import RecordEncoder
from mindspeed_lora.data.preprocess import write_dataset
from mindspeed_lora.errors import DataError


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def config(tokenizer_dir: Path, tmp_path: Path, records: list[dict[str, Any]], **more: Any) -> PreprocessConfig:
    source = write_json(tmp_path / "in.json", records)
    return PreprocessConfig(source, tmp_path / "out" / "x", TokenizerFlags(tokenizer_dir), TemplateFlags("qwen3"), **more)


def earlier_files(tokenizer_dir: Path, tmp_path: Path) -> dict[str, bytes]:
    """Write a dataset, which a failing run must leave as it is."""
    write_dataset(config(tokenizer_dir, tmp_path, alpaca_records(3)))
    return {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def now(tmp_path: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["bin_path", "idx_path"])
def test_a_full_disk(kind: str, packed: bool, tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every write of a .bin or an .idx file says what a full disk says."""
    before = earlier_files(tokenizer_dir, tmp_path)
    monkeypatch.setattr(indexed_dataset, kind, lambda stem: Path("/dev/full"))
    full = os.strerror(errno.ENOSPC)
    with pytest.raises(DataError, match=rf"--output-prefix .*out/x: cannot write there: {full}"):
        write_dataset(config(tokenizer_dir, tmp_path, alpaca_records(20), pack=packed, seq_length=256))
    assert now(tmp_path) == before


def test_a_worker_that_dies(tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = earlier_files(tokenizer_dir, tmp_path)
    encode, parent = RecordEncoder.encode, os.getpid()

    def die(self: RecordEncoder, records: Any) -> Any:
        if os.getpid() != parent and any(record["output"] == "killer" for record in records):
            os.kill(os.getpid(), signal.SIGKILL)
        return encode(self, records)

    monkeypatch.setattr(RecordEncoder, "encode", die)
    records = [*alpaca_records(20), {"instruction": "x", "output": "killer"}]
    with pytest.raises(DataError, match=r"--workers 2: a worker process died \(out of memory\?\); use fewer workers"):
        write_dataset(config(tokenizer_dir, tmp_path, records, workers=2))
    assert now(tmp_path) == before


def test_workers_end_with_their_parent(tokenizer_dir: Path, tmp_path: Path) -> None:
    """However the parent ends: a worker that waits for work for ever would keep its memory."""
    config(tokenizer_dir, tmp_path, alpaca_records(50_000))
    words = ["--input", str(tmp_path / "in.json"), "--output-prefix", str(tmp_path / "out" / "x"), "--prompt-type", "qwen3"]
    words += ["--tokenizer-name-or-path", str(tokenizer_dir), "--workers", "2"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "preprocess_data.py"), *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    children: list[str] = []
    try:
        for _ in range(600):
            found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=False)
            children = found.stdout.split()
            if len(children) >= 2 or process.poll() is not None:
                break
            time.sleep(0.05)
        assert len(children) >= 2, "it ended before its workers were seen"
    finally:
        process.kill()
        process.wait()
    for _ in range(100):
        alive = [pid for pid in children if Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]]
        if not alive:
            break
        time.sleep(0.05)
    assert not alive


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--prompt-type", "qwen33"], 2, "qwen3"),
        (["--handler-name", "AlpacaStylePairHandler"], 2, "did you mean AlpacaStylePairwiseHandler"),
        (["--prompt-type", "qwen3", "--pack"], 2, "--pack needs --seq-length"),
        (["--prompt-type", "glm4"], 2, "--prompt-type glm4 needs the token"),
        (["--prompt-type", "llama2", "--seq-length", "2"], 1, "none of 3 records could be used, nothing is written"),
        (["--prompt-type", "qwen3", "--map-keys", '{"prompt": "question"}'], 2, "which has input, instruction, output"),
    ],
)
def test_one_message_and_nothing_written(
    words: list[str], code: int, message: str, tokenizer_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_json(tmp_path / "in.json", alpaca_records(3))
    common = ["--input", str(source), "--tokenizer-name-or-path", str(tokenizer_dir), "--output-prefix", str(tmp_path / "out" / "x")]
    assert main("preprocess_data.py", [*common, *words]) == code
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err
    assert not (tmp_path / "out").exists()
    logging.getLogger("mindspeed_lora").handlers.clear()


def test_skips_are_counted_with_their_places(tokenizer_dir: Path, tmp_path: Path) -> None:
    lines = [
        '{"conversations": [{"from": "gpt", "value": "A"}, {"from": "human", "value": "a"}]}',
        '{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": ""}]}',
        '{"conversations": [{"from": "human", "value"',
        '{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "A"}]}',
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    flags, template = TokenizerFlags(tokenizer_dir), TemplateFlags("empty")
    report = write_dataset(
        PreprocessConfig(tmp_path / "in.jsonl", tmp_path / "out" / "x", flags, template, handler_name="SharegptStyleInstructionHandler")
    )
    assert report.num_written == 1
    assert sorted(report.skipped_lines()) == [
        "  skipped 1: line is no JSON (record 3 (in.jsonl line 3))",
        "  skipped 1: no token to train (record 2)",
        "  skipped 1: role 'gpt' out of turn (record 1)",
    ]
    assert report.notes["records with an empty answer"] == 1


def test_the_report_says_how_long_records_are(tokenizer_dir: Path, tmp_path: Path) -> None:
    records = [{"instruction": "a", "output": "b" * count} for count in (1, 1, 1, 30, 100)]
    report = write_dataset(config(tokenizer_dir, tmp_path, records))
    assert report.histogram() == [
        "       17 to      32 tokens:          3 ########################################",
        "       33 to      64 tokens:          1 ##############",
        "       65 to     128 tokens:          1 ##############",
    ]
    assert report.counts()["lengths"] == {"32": 3, "64": 1, "128": 1}
    assert any("s of them to start" in line for line in report.lines())
