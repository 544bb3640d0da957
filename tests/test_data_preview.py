"""Records shown as the model will see them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from data_helpers import alpaca_records, tiny_tokenizer, write_json

from mindspeed_lora.arguments.cli import main
from mindspeed_lora.arguments.configs import PreprocessConfig, TemplateFlags, TokenizerFlags
from mindspeed_lora.data.preprocess import preview
from mindspeed_lora.data.preview import preview_lines
from mindspeed_lora.data.tokenizer import load_tokenizer

BLOCK = ["  <think>", "  ", "  </think>", "  "]


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def shown(records: list[Any], count: int, tokenizer_dir: Path, tmp_path: Path, prompt_type: str | None = "qwen3", **more: Any) -> list[str]:
    source = write_json(tmp_path / "in.json", records)
    return list(preview(PreprocessConfig(source, None, TokenizerFlags(tokenizer_dir), TemplateFlags(prompt_type), **more), count))


def test_trained_text_is_marked_and_its_stop_checked(tokenizer_dir: Path, tmp_path: Path) -> None:
    records = [{"instruction": "Hi", "output": "Yo\nyo"}, {"instruction": "a"}, *alpaca_records(9)]
    lines = shown(records, 2, tokenizer_dir, tmp_path)
    assert lines[0].startswith("⟦text⟧ is trained, the rest is only read; ")
    assert lines[1] == "record 1: 26 tokens, 7 trained; ends with the stop token <|im_end|>"
    assert lines[2:-1] == [
        "  <|im_start|>user",
        "  Hi<|im_end|>",
        "  <|im_start|>assistant",
        *BLOCK,
        "  ⟦Yo",
        "  yo<|im_end|>",
        "  ⟧",
    ]
    assert lines[-1] == "record 2: skipped: no answer"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.json"]  # nothing is written


def test_an_answer_without_stop_is_told(tokenizer_dir: Path, tmp_path: Path) -> None:
    lines = shown([{"instruction": "Hi", "output": "Yo"}], 5, tokenizer_dir, tmp_path, "empty")
    assert lines[1:] == [
        "record 1: 4 tokens, 2 trained; DOES NOT END with a stop token, but with 'o': the model would not learn to stop here",
        "  Hi⟦Yo⟧",
    ]


def test_both_answers_of_a_pair(tokenizer_dir: Path, tmp_path: Path) -> None:
    records = [{"instruction": "Hi", "chosen": "Yo", "rejected": "No"}]
    lines = shown(records, 1, tokenizer_dir, tmp_path, "default", handler_name="AlpacaStylePairwiseHandler")
    assert [line for line in lines if line.startswith("record")] == [
        "record 1 (chosen): 12 tokens, 3 trained; ends with the stop token <|im_end|>",
        "record 1 (rejected): 12 tokens, 3 trained; ends with the stop token <|im_end|>",
    ]
    assert "  Assistant:⟦No<|im_end|>⟧" in lines


def test_plain_text_is_trained_whole(tokenizer_dir: Path, tmp_path: Path) -> None:
    assert shown([{"text": "Once"}], 1, tokenizer_dir, tmp_path, None)[1:] == ["record 1 (text): 3 tokens, 3 trained", "  ⟦Once⟧"]


def test_a_long_sample_loses_its_middle_and_a_terminal_gets_color(tokenizer_dir: Path) -> None:
    tokenizer = load_tokenizer(TokenizerFlags(tokenizer_dir))
    ids = tokenizer.encode("0123456789" * 3)
    labels = [-100] * 25 + ids[25:]
    lines = preview_lines("sample", {"input_ids": ids, "labels": labels}, tokenizer, set(), limit=9, color=True)
    assert lines == [
        "sample: 30 tokens, 5 trained",
        "  012345",
        "  [... 21 tokens ...]",
        "  ⟦\x1b[32m789\x1b[0m⟧",
    ]
    whole = preview_lines("sample", {"input_ids": ids, "labels": labels}, tokenizer, set(), color=False)
    assert whole[1] == "  0123456789012345678901234⟦56789⟧"


def test_the_command_line(tokenizer_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_json(tmp_path / "in.json", alpaca_records(3))
    words = ["--input", str(source), "--tokenizer-name-or-path", str(tokenizer_dir), "--prompt-type", "qwen3", "--preview", "2"]
    assert main("preprocess_data.py", words) == 0
    out = capsys.readouterr().out
    assert out.count("ends with the stop token <|im_end|>") == 2 and "record 3" not in out
    assert main("preprocess_data.py", words[:-2]) == 2
    assert "needs --output-prefix" in capsys.readouterr().err
    logging.getLogger("mindspeed_lora").handlers.clear()
