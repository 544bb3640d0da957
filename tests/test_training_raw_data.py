"""Raw data given to training: preprocessed once, found again, and waited for without a process group."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from data_helpers import alpaca_records, tiny_tokenizer, write_json
from helpers import ROOT, tiny_qwen3
from pool import ProcessPool
from training_helpers import make_config

from mindspeed_lora.arguments.configs import DataFlags, PreferenceFlags, PreprocessConfig, TemplateFlags, TokenizerFlags, TrainConfig
from mindspeed_lora.data import raw
from mindspeed_lora.data.pairs import PairDataset
from mindspeed_lora.data.preprocess import write_dataset
from mindspeed_lora.data.raw import Board, cache_root, is_raw_data
from mindspeed_lora.data.sft_dataset import KEYS, open_sft_dataset
from mindspeed_lora.errors import DataError, UsageError
from mindspeed_lora.training.preflight import TrainingPlan, plan_training

HANDLER = "AlpacaStyleInstructionHandler"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    tiny_qwen3(folder / "model", num_hidden_layers=2)
    tiny_tokenizer(folder / "model")
    write_json(folder / "alpaca.json", alpaca_records(20))
    return folder


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("mindspeed_lora"), "propagate", True)
    caplog.set_level(logging.INFO, "mindspeed_lora")
    return caplog


def config(workspace: Path, cache: Path, **changes: Any) -> TrainConfig:
    values = {
        "data__data_path": str(workspace / "alpaca.json"),
        "data__handler_name": HANDLER,
        "data__cache_dir": cache,
        "data__seq_length": 128,
        "template": TemplateFlags("qwen3"),
        "micro_batch_size": 1,
        "global_batch_size": 2,
        **changes,
    }
    return make_config(workspace, **values)


def plan(workspace: Path, cache: Path, **changes: Any) -> TrainingPlan:
    return plan_training(config(workspace, cache, **changes), 1)


PACKED = {"data__pack": True, "data__neat_pack": True, "data__reset_attention_mask": True}


def test_the_cache_holds_what_preprocess_data_writes_and_is_used_again(
    workspace: Path, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    first = plan(workspace, tmp_path / "cache", **PACKED)
    prefix = first.dataset.prefix
    assert prefix.parent.parent == tmp_path / "cache" and "raw data, preprocessing it into" in log.text and "20 records read" in log.text
    assert first.documents is not None and first.documents.by_segments
    direct = PreprocessConfig(
        workspace / "alpaca.json",
        tmp_path / "direct" / "data",
        TokenizerFlags(workspace / "model"),
        TemplateFlags("qwen3"),
        seq_length=128,
        pack=True,
        neat_pack=True,
    )
    write_dataset(direct)
    for key in KEYS:
        name = f"data_packed_{key}_document.bin"
        assert (prefix.parent / name).read_bytes() == (tmp_path / "direct" / name).read_bytes()
    log.clear()
    written = (prefix.parent / "data_packed_labels_document.bin").stat().st_mtime_ns
    assert plan(workspace, tmp_path / "cache", **PACKED, data__workers=2).dataset.prefix == prefix
    assert "preprocessed before" in log.text and "20 of 20 records" in log.text and "preprocessing it" not in log.text
    assert (prefix.parent / "data_packed_labels_document.bin").stat().st_mtime_ns == written
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [prefix.parent.name]  # nothing temporary is left


def test_what_decides_the_result_decides_the_folder(workspace: Path, tmp_path: Path) -> None:
    variants: list[dict[str, Any]] = [
        {},
        PACKED,
        {"data__pack": True},
        {"data__seq_length": 64},
        {"template": TemplateFlags("empty")},
        {"template": TemplateFlags("qwen3", enable_thinking="true")},
        {"data__map_keys": {"query": ""}},
    ]
    folders = {plan(workspace, tmp_path, **changes).dataset.prefix.parent for changes in variants}
    other = tmp_path / "other"
    other.mkdir()
    source = write_json(other / "alpaca.json", alpaca_records(19))
    folders.add(plan(workspace, tmp_path, data__data_path=str(source)).dataset.prefix.parent)
    write_json(source, alpaca_records(20))  # the same content as the first, at another place
    folders.add(plan(workspace, tmp_path, data__data_path=str(source)).dataset.prefix.parent)
    assert len(folders) == len(variants) + 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__handler_name": None}, r"--data-path .*alpaca.json is raw data.* --handler-name .*preprocess_data.py .*--output-prefix"),
        ({"template": TemplateFlags()}, r"--prompt-type is missing"),
        ({"data__map_keys": {"prompt": "question"}}, r"no column 'question'"),
        ({"data__neat_pack": True, "data__reset_attention_mask": True}, r"--neat-pack .* needs --pack"),
    ],
)
def test_raw_data_that_is_refused_leaves_nothing(workspace: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan(workspace, tmp_path / "cache", **changes)
    assert not list(tmp_path.rglob("*.bin")) and not list(tmp_path.rglob("*.tmp"))


def test_messages_name_data_path(workspace: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--data-path .*: no records in it"):
        plan(workspace, tmp_path, data__data_path=str(write_json(tmp_path / "none.json", [])))
    (tmp_path / "notes.xlsx").write_text("text")
    with pytest.raises(UsageError, match=r"--data-path .*notes.xlsx: unknown extension"):
        plan(workspace, tmp_path, data__data_path=str(tmp_path / "notes.xlsx"))


def test_prepared_data_with_a_handler_is_a_note(workspace: Path, tmp_path: Path) -> None:
    prefix = plan(workspace, tmp_path).dataset.prefix
    notes = plan(workspace, tmp_path, data__data_path=str(prefix)).notes
    assert any(note.startswith("--handler-name --cache-dir: --data-path is preprocessed already") for note in notes)


def test_what_is_raw_and_where_the_cache_lies(workspace: Path, tmp_path: Path) -> None:
    prefix = plan(workspace, tmp_path / "cache").dataset.prefix
    assert is_raw_data(workspace / "alpaca.json") and is_raw_data(workspace)
    assert not is_raw_data(prefix) and not is_raw_data(f"{prefix}_packed_labels_document.bin") and not is_raw_data(prefix.parent / "no")
    assert not is_raw_data("") and not is_raw_data(tmp_path)
    assert cache_root(DataFlags(), tmp_path / "ckpt" / "lora") == tmp_path / "ckpt" / "data_cache"
    assert cache_root(DataFlags(), None) == Path("~/.cache/mindspeed_lora/data").expanduser()


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", str(rank))


@pytest.mark.parametrize("good", [True, False])
def test_a_waiting_process_gets_the_folder_or_the_error(
    good: bool, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(raw, "_POLL_S", 0.01)
    changes: dict[str, Any] = {} if good else {"data__map_keys": {"prompt": "question"}}
    outcome: list[Any] = []

    def waits() -> None:
        try:
            outcome.append(plan(workspace, tmp_path / "cache", **changes).dataset.prefix)
        except UsageError as error:
            outcome.append(str(error))

    as_rank(monkeypatch, 1)
    waiting = threading.Thread(target=waits, daemon=True)
    waiting.start()
    waiting.join(0.5)
    assert waiting.is_alive() and not outcome
    as_rank(monkeypatch, 0)
    expected: Any
    if good:
        expected = plan(workspace, tmp_path / "cache", **changes).dataset.prefix
    else:
        with pytest.raises(UsageError) as caught:
            plan(workspace, tmp_path / "cache", **changes)
        expected = str(caught.value)
    waiting.join(30)
    assert outcome == [expected]


def test_a_dead_worker_ends_the_waiting(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    board = Board(write_json(tmp_path / "board.json", {"status": "working", "pid": ended.pid}))
    with pytest.raises(DataError, match=f"process {ended.pid}, .* died without a result"):
        board.wait(Path("alpaca.json"))


def test_torchrun_preprocesses_once(workspace: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    command += [str(ROOT / "posttrain_gpt.py"), "--device", "cpu", "--load", str(workspace / "model"), "--save", str(tmp_path / "save")]
    command += ["--data-path", str(workspace / "alpaca.json"), "--handler-name", HANDLER, "--prompt-type", "qwen3", "--split", "100,0,0"]
    command += ["--pack", "--neat-pack", "--reset-attention-mask", "--seq-length", "128", "--train-iters", "1"]
    command += ["--pipeline-model-parallel-size", "2", "--micro-batch-size", "1", "--global-batch-size", "2"]
    environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TMPDIR": str(tmp_path), "HOME": str(tmp_path)}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("raw data, preprocessing it into") == 1 and "packed into" in result.stdout
    (folder,) = (tmp_path / "data_cache").iterdir()
    (board,) = (tmp_path / f"mindspeed_lora-{os.getuid()}").iterdir()
    assert json.loads(board.read_text())["prefix"] == str(folder / "data")


def test_the_log_begins_with_a_sample_as_the_model_sees_it(
    workspace: Path, tmp_path: Path, log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan(workspace, tmp_path)
    lines = [record.getMessage() for record in log.records]
    start = next(number for number, line in enumerate(lines) if line.startswith("first sample of"))
    assert lines[start + 1].startswith("sample 0: ") and lines[start + 1].endswith("ends with the stop token <|im_end|>")
    assert lines[start + 2] == "  <|im_start|>user" and any(line.startswith("  ⟦word") for line in lines[start:])
    log.clear()
    logging.getLogger("mindspeed_lora").setLevel(logging.WARNING)  # as on another rank
    plan(workspace, tmp_path)
    assert not log.records


PAIRWISE = "AlpacaStylePairwiseHandler"


def pair_config(workspace: Path, cache: Path, **changes: Any) -> TrainConfig:
    records = [{**record, "chosen": record["output"], "rejected": "no " + record["output"] * 3} for record in alpaca_records(6)]
    write_json(workspace / "pairs.json", records)
    values = {"data__data_path": str(workspace / "pairs.json"), "data__handler_name": PAIRWISE, "data__seq_length": 48}
    return config(workspace, cache, **{**values, "stage": "dpo", "preference": PreferenceFlags(), **changes})


def test_raw_pairs_become_a_pair_dataset(workspace: Path, tmp_path: Path) -> None:
    found = plan_training(pair_config(workspace, tmp_path), 1)
    assert isinstance(found.dataset, PairDataset) and len(found.dataset) == 6, "long pairs are kept"
    assert found.dataset.num_cut and int(found.dataset.rows.lengths.max()) <= 48
    assert any("pairs longer than --seq-length" in note for note in found.notes)


def test_handlers_of_the_other_stage_are_refused_before_the_work(workspace: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"--handler-name {HANDLER} makes single records, which --stage dpo .* AlpacaStylePairwiseHandler"):
        plan_training(pair_config(workspace, tmp_path, data__handler_name=HANDLER), 1)
    with pytest.raises(UsageError, match=f"--handler-name {PAIRWISE} makes pairs, which --stage sft does not train on; use --stage dpo"):
        plan_training(pair_config(workspace, tmp_path, stage="sft", preference=None), 1)
    assert not list(tmp_path.iterdir())


def raced(settings: TrainConfig) -> tuple[str, bool]:
    """As the first process of a machine of its own, whose work ends at the same moment as the other machine's."""
    from torch import distributed

    worked = []

    def write_and_wait(*arguments: Any, **keywords: Any) -> Any:
        report = write_dataset(*arguments, **keywords)
        worked.append(True)
        distributed.barrier()
        return report

    original, raw.write_dataset = raw.write_dataset, write_and_wait
    try:
        data = settings.data
        tokenizer = dataclasses.replace(settings.tokenizer, name_or_path=settings.load.load)
        os.environ["LOCAL_WORLD_SIZE"] = "1"
        prefix = raw.prepare_raw_data(data, tokenizer, settings.template, cache_root(data, None))
    finally:
        raw.write_dataset = original
        os.environ.pop("LOCAL_WORLD_SIZE", None)
    return str(prefix), bool(worked)


def test_two_machines_that_race_for_one_cache_get_the_same_folder(pool: ProcessPool, workspace: Path, tmp_path: Path) -> None:
    (one, worked), (other, also) = pool.run(raced, 2, config(workspace, tmp_path))
    assert worked and also and one == other
    assert [path.name for path in tmp_path.iterdir()] == [Path(one).parent.name], "no temporary folder is left"
    assert len(open_sft_dataset(one)) == 20
