"""preprocess_data: each of its nouns, and each input it refuses."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import alpaca_records, tiny_tokenizer, write_json

from mindspeed_lora.arguments.configs import PreprocessConfig, TemplateFlags, TokenizerFlags
from mindspeed_lora.data.indexed_dataset import IndexedDataset
from mindspeed_lora.data.preprocess import preprocess, write_dataset
from mindspeed_lora.data.sft_dataset import KEYS, SFTDataset, check_data_manifest, key_stem, open_sft_dataset
from mindspeed_lora.data.tokenizer import load_tokenizer
from mindspeed_lora.errors import DataError, UsageError
from mindspeed_lora.manifest import verify_parts

BLOCK = "<think>\n\n</think>\n\n"


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def config(source: Path, tokenizer_dir: Path, prefix: Path, **overrides: Any) -> PreprocessConfig:
    mode = overrides.pop("thinking", None)
    template = TemplateFlags(overrides.pop("prompt_type", "qwen3"), overrides.pop("path", None), mode)
    return PreprocessConfig(source, prefix, TokenizerFlags(tokenizer_dir), template, **overrides)


def run(records: Any, tokenizer_dir: Path, tmp_path: Path, **overrides: Any) -> tuple[Any, SFTDataset]:
    source = records if isinstance(records, Path) else write_json(tmp_path / "in.json", records)
    prefix = tmp_path / "new" / "folder" / "out"
    report = write_dataset(config(source, tokenizer_dir, prefix, **overrides))
    return report, open_sft_dataset(prefix)


def content(prefix: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in prefix.parent.iterdir() if path.suffix in (".bin", ".idx")}


def spoken(dataset: SFTDataset, tokenizer_dir: Path, index: int = 0) -> tuple[str, str]:
    """Whole text of a sample and the part of it that is trained."""
    tokenizer = load_tokenizer(TokenizerFlags(tokenizer_dir))
    ids, labels = dataset[index]
    assert (labels[labels != -100] == ids[labels != -100]).all()
    return tokenizer.decode(ids), tokenizer.decode(labels[labels != -100])


def test_ids_labels_mask_and_manifest(tokenizer_dir: Path, tmp_path: Path) -> None:
    report, dataset = run([{"instruction": "Hi", "input": "there", "output": "Yo"}], tokenizer_dir, tmp_path)
    assert spoken(dataset, tokenizer_dir) == (
        "<|im_start|>user\nHi\nthere<|im_end|>\n<|im_start|>assistant\n" + BLOCK + "Yo<|im_end|>\n",
        "Yo<|im_end|>\n",
    )
    mask = IndexedDataset(key_stem(dataset.prefix, "attention_mask"))
    assert mask.dtype == np.int32
    assert (mask[0] == 1).all() and len(mask[0]) == len(dataset[0][0])
    manifest = dataset.manifest
    assert manifest is not None and manifest.kind == "data"
    assert manifest.template is not None and manifest.template["name"] == "qwen3" and manifest.template["enable_thinking"] == "none"
    assert manifest.data == {
        "form": "instruction",
        "input": [str(tmp_path / "in.json")],
        "handler": "AlpacaStyleInstructionHandler",
        "map_keys": None,
        "seq_length": None,
        "append_eod": False,
        "packing": None,
    }
    assert manifest.counts["tokens"] == report.num_tokens == len(dataset[0][0])
    assert len(manifest.parts) == 6
    verify_parts(dataset.prefix.parent, manifest)
    check_data_manifest(manifest, load_tokenizer(TokenizerFlags(tokenizer_dir)), TemplateFlags("qwen3", None, "none"))
    assert sorted(path.name for path in dataset.prefix.parent.iterdir()) == sorted(
        ["out_mindspeed_lora.json"] + [f"out_packed_{key}_document.{end}" for key in KEYS for end in ("bin", "idx")]
    )


def test_all_formats_and_a_folder_give_the_same(tokenizer_dir: Path, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    records = [*alpaca_records(), {"instruction": 'quote " and\nnewline', "input": "é, ü", "output": "123"}]
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "README.md").write_text("not data")
    sources = [write_json(tmp_path / "a.json", records), tmp_path / "b.jsonl", tmp_path / "c.csv", tmp_path / "d.parquet", folder]
    lines = [json.dumps(record) + "\n" for record in records]
    sources[1].write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    (folder / "1.jsonl").write_text("".join(lines[:5]))
    (folder / "2.jsonl").write_text("".join(lines[5:]))
    (tmp_path / "e.json").write_text("".join(lines))  # lines in a .json
    with sources[2].open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, records[0])
        writer.writeheader()
        writer.writerows(records)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), sources[3])
    written = []
    for number, source in enumerate([*sources, tmp_path / "e.json"]):
        prefix = tmp_path / f"out{number}" / "x"
        assert write_dataset(config(source, tokenizer_dir, prefix)).num_written == len(records)
        written.append(content(prefix))
    assert all(files == written[0] for files in written)


def test_workers_change_nothing(tokenizer_dir: Path, tmp_path: Path) -> None:
    records = alpaca_records(40)
    records[7]["output"] = None
    records[30]["output"] = "long " * 99
    source = write_json(tmp_path / "in.json", records)
    first = write_dataset(config(source, tokenizer_dir, tmp_path / "a" / "x", seq_length=128, prompt_type="llama2"))
    second = write_dataset(config(source, tokenizer_dir, tmp_path / "b" / "x", seq_length=128, prompt_type="llama2", workers=2))
    assert content(tmp_path / "a" / "x") == content(tmp_path / "b" / "x")
    assert first.counts() == second.counts()
    assert first.lines()[:3] == second.lines()[:3]


def test_progress_bar(tokenizer_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run([*alpaca_records(12)], tokenizer_dir, tmp_path, log_interval=1)
    assert "preprocess: 12" in capfd.readouterr().err.replace("12record", "12 record")


def test_report(tokenizer_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    records: list[Any] = [*alpaca_records(30), "no object", {"instruction": 5, "output": "x"}]
    for index in range(12):
        records[2 * index]["output"] = None
    records[1]["output"] = ""
    source = write_json(tmp_path / "in.json", records)
    logging.getLogger("mindspeed_lora").propagate = True
    with caplog.at_level(logging.INFO, logger="mindspeed_lora"):
        assert preprocess(config(source, tokenizer_dir, tmp_path / "out")) == 0
    text = caplog.text
    assert "32 records read, 18 written, 14 skipped" in text
    assert "skipped 12: no answer (record 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, ...)" in text
    assert "skipped 1: a JSON str instead of an object (record 31)" in text
    assert "skipped 1: column instruction holds a int, not a text (record 32)" in text
    assert "1 records with an empty answer" in text
    assert "% of them trained" in text and "records/s" in text
    assert f"--data-path {tmp_path / 'out'}" in text


def test_map_keys_history_and_system(tokenizer_dir: Path, tmp_path: Path) -> None:
    records = [
        {"q": "Now?", "extra": "please", "a": "Yes", "past": [["One", "1"], ["Two", "2"]], "sys": "Be kind", "instruction": "not this"}
    ]
    keys = {"prompt": "q", "query": "extra", "response": "a", "history": "past", "system": "sys"}
    _, dataset = run(records, tokenizer_dir, tmp_path, map_keys=keys, prompt_type="default")
    assert spoken(dataset, tokenizer_dir) == (
        "Be kind\nHuman: One\nAssistant:1<|im_end|>\nHuman: Two\nAssistant:2<|im_end|>\nHuman: Now?\nplease\nAssistant:Yes<|im_end|>",
        "1<|im_end|>2<|im_end|>Yes<|im_end|>",
    )
    _, dataset = run(records, tokenizer_dir, tmp_path, map_keys={"prompt": "q", "query": None, "response": "a"}, prompt_type="default")
    assert spoken(dataset, tokenizer_dir)[0] == "Human: Now?\nAssistant:Yes<|im_end|>"  # history and system only when mapped


def test_history_in_csv_is_json(tokenizer_dir: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.csv"
    source.write_text('instruction,output,history\nNow?,Yes,"[[""One"", ""1""]]"\nNow?,Yes,\nNow?,Yes,[oops\n')
    report, dataset = run(source, tokenizer_dir, tmp_path, map_keys={"history": "history"}, prompt_type="default")
    assert spoken(dataset, tokenizer_dir)[0] == "Human: One\nAssistant:1<|im_end|>\nHuman: Now?\nAssistant:Yes<|im_end|>"
    assert report.num_skipped == {"column history is no JSON list": 1}


@pytest.mark.parametrize(("mode", "trained"), [("true", BLOCK + "Yo<|im_end|>\n"), ("false", "Yo<|im_end|>\n"), (None, "Yo<|im_end|>\n")])
def test_enable_thinking(tokenizer_dir: Path, tmp_path: Path, mode: str | None, trained: str) -> None:
    _, dataset = run([{"instruction": "Hi", "output": "Yo"}], tokenizer_dir, tmp_path, thinking=mode)
    assert spoken(dataset, tokenizer_dir)[1] == trained
    assert dataset.manifest is not None and dataset.manifest.template is not None
    assert dataset.manifest.template["enable_thinking"] == (mode or "none")


def test_long_records_are_cut_and_kept(tokenizer_dir: Path, tmp_path: Path) -> None:
    records = [{"instruction": "a", "output": "b"}, {"instruction": "x " * 80, "output": "y " * 80}, {"instruction": "c", "output": "d"}]
    report, dataset = run(records, tokenizer_dir, tmp_path, seq_length=64)
    assert dataset.lengths.tolist()[1] == 63  # the newer rule keeps one token free
    assert report.notes["records cut to --seq-length"] == 1
    assert report.notes["turns without a stop token at the end"] == 1
    report, dataset = run(records, tokenizer_dir, tmp_path, seq_length=64, prompt_type="llama2")
    assert dataset.lengths.tolist()[1] == 63  # the older rule fills 64, which the peer then drops
    report, dataset = run(records, tokenizer_dir, tmp_path, seq_length=64, append_eod=True)
    assert dataset.lengths.tolist()[1] == 63  # and so it does here, with the eod that comes after the cut
    assert dataset[1][1][-1] == load_tokenizer(TokenizerFlags(tokenizer_dir)).eos_token_id


def test_append_eod(tokenizer_dir: Path, tmp_path: Path) -> None:
    _, dataset = run([{"instruction": "Hi", "output": "Yo"}], tokenizer_dir, tmp_path, append_eod=True, prompt_type="empty")
    assert spoken(dataset, tokenizer_dir) == ("HiYo<|im_end|>", "Yo<|im_end|>")


def test_efficient_eos_labels_the_next_turn(tokenizer_dir: Path, tmp_path: Path) -> None:
    path = write_json(tmp_path / "t.json", [{"name": "e", "format_user": {"slots": ["[{{content}}]"]}, "efficient_eos": True}])
    records = [{"instruction": "b", "output": "B", "history": [["a", "A"]]}]
    _, dataset = run(records, tokenizer_dir, tmp_path, map_keys={"history": "history"}, path=path, prompt_type="e")
    eos = load_tokenizer(TokenizerFlags(tokenizer_dir)).eos_token_id
    ids, labels = dataset[0]
    assert len(ids) == 9 and ids[-1] == eos and eos not in ids[:-1]  # [a] A [b] B eos
    assert [position for position in range(9) if labels[position] == eos] == [4, 8]


def test_templates_without_stop_are_reported(tokenizer_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("mindspeed_lora").propagate = True
    report, _ = run(alpaca_records(3), tokenizer_dir, tmp_path, prompt_type="empty")
    assert report.notes["turns without a stop token at the end"] == 3
    assert "template 'empty' ends no answer with a stop token" in caplog.text
    report, _ = run(alpaca_records(3), tokenizer_dir, tmp_path)
    assert report.notes["turns without a stop token at the end"] == 0


def test_running_again_replaces_and_says_so(tokenizer_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("mindspeed_lora").propagate = True
    run(alpaca_records(5), tokenizer_dir, tmp_path)
    with caplog.at_level(logging.INFO, logger="mindspeed_lora"):
        _, dataset = run(alpaca_records(3), tokenizer_dir, tmp_path)
    assert len(dataset) == 3
    assert "replacing" in caplog.text and "of an earlier run" in caplog.text


BAD: list[tuple[dict[str, Any], Any, type[Exception], str]] = [
    ({}, "missing path", UsageError, r"--input .*nothing.json: no such file or folder"),
    ({}, "other extension", UsageError, r"unknown extension '.xlsx'; known are arrow, csv, json, jsonl, parquet, txt"),
    ({}, "empty folder", UsageError, r"the folder holds no arrow, csv, json, jsonl, parquet, txt file"),
    ({}, [], DataError, r"--input .*in.json: no records in it"),
    ({}, "empty file", DataError, r"--input .*in.jsonl: no records in it"),
    ({}, "truncated json", DataError, r"in.json: not valid JSON: .*line 1 column"),
    ({}, "truncated parquet", DataError, r"in.parquet: not a readable parquet file"),
    ({}, "not utf-8", DataError, r"in.jsonl: not UTF-8 text"),
    (
        {},
        [{"instruction": "a", "output": None}],
        DataError,
        r"none of 1 records could be used, nothing is written\n.*no answer \(record 1\)",
    ),
    ({"seq_length": 2, "prompt_type": "llama2"}, None, DataError, r"none of 12 records .*\n.*12: no token to train"),
    ({"map_keys": {"propmt": "instruction"}}, None, UsageError, r"--map-keys: unknown key 'propmt'; known are prompt, query, response"),
    ({"map_keys": {"prompt": 3}}, None, UsageError, r"--map-keys: prompt is 3; give the name of a column"),
    (
        {"map_keys": {"query": "inptu"}},
        None,
        UsageError,
        r"no column 'inptu' \(for query\) in the input, which has input, instruction, output",
    ),
    ({"map_keys": {"response": None}}, None, UsageError, r"--map-keys leaves no column for response; give the names of columns"),
    ({}, [{"question": "a", "answer": "b"}], UsageError, r"no column 'instruction' \(for prompt\).*has answer, question.*--map-keys"),
    ({"map_keys": {"prompt": None, "query": None}}, None, UsageError, r"--map-keys leaves no column for prompt"),
    (
        {"handler_name": "AlpacaInstructionHandler"},
        None,
        UsageError,
        r"--handler-name AlpacaInstructionHandler: there is no such handler; did you mean AlpacaStyleInstructionHandler or .*known are",
    ),
    ({"prompt_type": None}, None, UsageError, r"--json-keys: no column 'text'.* say --handler-name .*--prompt-type"),
    (
        {"prompt_type": None, "handler_name": "AlpacaStyleInstructionHandler"},
        None,
        UsageError,
        r"--prompt-type is missing: .* default, empty, .* qwen3",
    ),
    ({"prompt_type": "qwne3"}, None, UsageError, r"--prompt-type qwne3: did you mean qwen3.*\? .* has the templates alpaca, .* qwen3"),
    ({"prompt_type": "llama2", "thinking": "true"}, None, UsageError, r"--enable-thinking true: template 'llama2' has no thinking"),
    ({"thinking": "yes"}, None, UsageError, r"--enable-thinking yes: give one of true, false, none"),
    ({"workers": 0}, None, UsageError, r"--workers 0: give the number of processes"),
    ({"seq_length": 1}, None, UsageError, r"--seq-length 1: give a number of tokens"),
]


@pytest.mark.parametrize(("overrides", "source", "kind", "message"), BAD)
def test_refusals_leave_nothing(
    overrides: dict[str, Any], source: Any, kind: type[Exception], message: str, tokenizer_dir: Path, tmp_path: Path
) -> None:
    path = tmp_path / "in.json"
    if source == "missing path":
        path = tmp_path / "nothing.json"
    elif source == "empty folder":
        path = tmp_path / "in"
        path.mkdir()
    elif isinstance(source, str):
        path, data = {
            "other extension": (tmp_path / "in.xlsx", b"x"),
            "empty file": (tmp_path / "in.jsonl", b""),
            "truncated json": (path, b'[{"instruction": "a", "out'),
            "truncated parquet": (tmp_path / "in.parquet", b"PAR1abc"),
            "not utf-8": (tmp_path / "in.jsonl", b'{"instruction": "\xff\xfe"}'),
        }[source]
        path.write_bytes(data)
    else:
        write_json(path, alpaca_records() if source is None else source)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(kind, match=message) as error:
        write_dataset(config(path, tokenizer_dir, tmp_path / "made" / "here" / "out", **overrides))
    assert error.value.exit_code == (2 if kind is UsageError else 1)  # type: ignore[attr-defined]
    assert sorted(tmp_path.rglob("*")) == before


def test_failure_keeps_the_earlier_files(tokenizer_dir: Path, tmp_path: Path) -> None:
    _, dataset = run(alpaca_records(5), tokenizer_dir, tmp_path)
    before = {path: path.read_bytes() for path in dataset.prefix.parent.iterdir()}
    source = tmp_path / "bad.jsonl"
    source.write_bytes(b'{"instruction": "a", "input": "", "output": "b"}\n' * 2000 + b"\xff")
    with pytest.raises(DataError, match="not UTF-8"):
        write_dataset(config(source, tokenizer_dir, dataset.prefix))
    assert {path: path.read_bytes() for path in dataset.prefix.parent.iterdir()} == before


def test_unwritable_place_is_named(tokenizer_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    source = write_json(tmp_path / "in.json", alpaca_records())
    with pytest.raises(DataError, match=r"--output-prefix .*file/out: cannot write there"):
        write_dataset(config(source, tokenizer_dir, tmp_path / "file" / "out"))


def test_sharegpt(tokenizer_dir: Path, tmp_path: Path) -> None:
    def talk(*messages: tuple[str, str]) -> list[dict[str, str]]:
        return [{"from": role, "value": text} for role, text in messages]

    records = [
        {"conversations": talk(("system", "inner"), ("human", "a"), ("gpt", "A"), ("human", "b"), ("gpt", "B")), "system": "outer"},
        {"conversations": talk(("gpt", "A"), ("human", "a"))},
        {"conversations": talk(("human", "a"))},
        {"conversations": talk(("human", "a"), ("function_call", "{}"))},
        {"conversations": "text"},
    ]
    options: dict[str, Any] = {
        "handler_name": "SharegptStyleInstructionHandler",
        "prompt_type": "default",
        "map_keys": {"system": "system"},
    }
    report, dataset = run(records, tokenizer_dir, tmp_path, **options)
    assert spoken(dataset, tokenizer_dir)[0] == "inner\nHuman: a\nAssistant:A<|im_end|>\nHuman: b\nAssistant:B<|im_end|>"
    assert report.num_skipped == {
        "role 'gpt' out of turn": 1,
        "1 messages instead of an even number": 1,
        'a function call is no JSON of {"name": ..., "arguments": ...}, nor a list of them': 1,
        "column conversations is no list of messages": 1,
    }
    with pytest.raises(UsageError, match=r"--map-keys tags: unknown key 'role'"):
        run(records, tokenizer_dir, tmp_path, **{**options, "map_keys": {"tags": {"role": "from"}}})


def test_texts_longer_than_a_tokenizer_says_give_no_warning_of_the_library(tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is too long for the model is for our own checks to say, with the numbers."""
    from transformers import tokenization_utils_base

    said: list[str] = []
    monkeypatch.setattr(tokenization_utils_base.logger, "warning", said.append)
    tokenizer = load_tokenizer(TokenizerFlags(tokenizer_dir))
    tokenizer.model_max_length = 3
    assert len(tokenizer("some text of more tokens than that")["input_ids"]) > 3 and said == []
    del tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"]
    assert tokenizer("some text of more tokens than that") and len(said) == 1, "the library no longer warns"
