"""Pairwise data: a chosen and a rejected answer to one prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from data_helpers import tiny_tokenizer, write_json

from mindspeed_lora.arguments.configs import PreprocessConfig, TemplateFlags, TokenizerFlags
from mindspeed_lora.data.forms import PairwiseForm
from mindspeed_lora.data.indexed_dataset import IndexedDataset
from mindspeed_lora.data.preprocess import PreprocessReport, write_dataset
from mindspeed_lora.data.sft_dataset import key_stem, manifest_name
from mindspeed_lora.data.tokenizer import load_tokenizer
from mindspeed_lora.errors import UsageError
from mindspeed_lora.manifest import read_manifest

ALPACA, SHAREGPT = "AlpacaStylePairwiseHandler", "SharegptStylePairwiseHandler"
BLOCK = "<think>\n\n</think>\n\n"


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def run(
    records: Any, tokenizer_dir: Path, tmp_path: Path, handler: str = ALPACA, prompt_type: str = "default", **overrides: Any
) -> tuple[PreprocessReport, list[tuple[str, str, str, str]]]:
    """The report, and of each pair: chosen text and its trained part, rejected text and its trained part."""
    template = TemplateFlags(prompt_type, overrides.pop("path", None), overrides.pop("thinking", None))
    source = write_json(tmp_path / "in.json", records)
    config = PreprocessConfig(source, tmp_path / "out" / "x", TokenizerFlags(tokenizer_dir), template, handler_name=handler, **overrides)
    report = write_dataset(config)
    tokenizer = load_tokenizer(TokenizerFlags(tokenizer_dir))
    datasets = [IndexedDataset(key_stem(config.output_prefix, key)) for key in PairwiseForm.values]
    texts = [
        tuple(tokenizer.decode([int(index) for index in dataset[row] if index != -100]) for dataset in datasets)
        for row in range(len(datasets[0]))
    ]
    return report, texts  # type: ignore[return-value]


def test_alpaca_with_history_and_system(tokenizer_dir: Path, tmp_path: Path) -> None:
    record = {"instruction": "Now?", "input": "", "chosen": "Yes", "rejected": "No", "past": [["One", "1"]], "sys": "Be kind"}
    report, texts = run([record], tokenizer_dir, tmp_path, map_keys={"history": "past", "system": "sys"})
    prompt = "Be kind\nHuman: One\nAssistant:1<|im_end|>\nHuman: Now?\nAssistant:"
    assert texts == [(prompt + "Yes<|im_end|>", "Yes<|im_end|>", prompt + "No<|im_end|>", "No<|im_end|>")]
    manifest = read_manifest(tmp_path / "out", manifest_name(tmp_path / "out" / "x"))
    assert manifest is not None and manifest.data is not None and manifest.data["form"] == "pairwise"
    assert len(manifest.parts) == 8 and report.num_written == 1
    tokens = IndexedDataset(key_stem(tmp_path / "out" / "x", "chosen_input_ids")).num_tokens
    assert report.num_tokens == tokens + IndexedDataset(key_stem(tmp_path / "out" / "x", "rejected_input_ids")).num_tokens


def test_a_list_of_answers(tokenizer_dir: Path, tmp_path: Path) -> None:
    """MindSpeed-LLM takes entry 1 of a list in ``rejected``, whatever column it is; here it depends on whether the column holds both."""
    separate = [{"instruction": "a", "chosen": ["good", "x"], "rejected": ["bad", "y"]}]
    _, texts = run(separate, tokenizer_dir, tmp_path)
    assert [(chosen, rejected) for _, chosen, _, rejected in texts] == [("good<|im_end|>", "bad<|im_end|>")]
    both = [{"instruction": "a", "output": ["good", "bad"]}, {"instruction": "a", "output": "good"}, {"instruction": "a", "output": ["x"]}]
    report, texts = run(both, tokenizer_dir, tmp_path, map_keys={"chosen": "output", "rejected": "output"})
    assert [(chosen, rejected) for _, chosen, _, rejected in texts] == [("good<|im_end|>", "bad<|im_end|>")]
    assert report.num_skipped == {
        "column output, named for chosen and rejected, holds a str, not a list of the two": 1,
        "no answer": 1,
    }


def test_sharegpt(tokenizer_dir: Path, tmp_path: Path) -> None:
    def talk(*messages: tuple[str, str]) -> list[dict[str, str]]:
        return [{"from": role, "value": text} for role, text in messages]

    answers = {"chosen": {"from": "gpt", "value": "Yes"}, "rejected": {"from": "gpt", "value": "No"}}
    records = [
        {"conversations": talk(("system", "S"), ("human", "a"), ("gpt", "A"), ("human", "b")), **answers},
        {"conversations": talk(("human", "a")), "chosen": "Yes", "rejected": [{"from": "gpt", "value": "No"}]},
        {"conversations": talk(("human", "a"), ("gpt", "A")), **answers},
        {"conversations": talk(("human", "a")), "chosen": {"from": "human", "value": "Yes"}, "rejected": answers["rejected"]},
        {"conversations": talk(("human", "a")), "chosen": answers["chosen"], "rejected": None},
    ]
    report, texts = run(records, tokenizer_dir, tmp_path, SHAREGPT)
    prompt = "S\nHuman: a\nAssistant:A<|im_end|>\nHuman: b\nAssistant:"
    assert texts == [
        (prompt + "Yes<|im_end|>", "Yes<|im_end|>", prompt + "No<|im_end|>", "No<|im_end|>"),
        ("Human: a\nAssistant:Yes<|im_end|>", "Yes<|im_end|>", "Human: a\nAssistant:No<|im_end|>", "No<|im_end|>"),
    ]
    assert report.num_skipped == {
        "2 messages before the answers instead of an odd number": 1,
        "role 'human' out of turn": 1,
        "column rejected is no message": 1,
    }


@pytest.mark.parametrize(
    ("mode", "in_prompt", "in_answer", "chosen"), [("none", BLOCK, "", "Yes"), ("true", "", BLOCK, "Yes"), ("false", BLOCK, "", "Yes")]
)
def test_thinking(mode: str, in_prompt: str, in_answer: str, chosen: str, tokenizer_dir: Path, tmp_path: Path) -> None:
    """Thoughts of earlier answers go; the empty thought is the last answer's alone."""
    record = {"instruction": "b", "chosen": "Yes", "rejected": "No", "history": [["a", "<think>\nhm\n</think>\n\nA"], ["c", "C"]]}
    _, texts = run([record], tokenizer_dir, tmp_path, prompt_type="qwen3", thinking=mode, map_keys={"history": "history"})
    turns = [("a", "A"), ("c", "C")]
    prompt = "".join(f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n" for user, answer in turns)
    prompt += "<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n" + in_prompt
    chosen, rejected = f"{in_answer}Yes<|im_end|>\n", f"{in_answer}No<|im_end|>\n"
    assert texts == [(prompt + chosen, chosen, prompt + rejected, rejected)]


def test_the_prompt_is_the_chosen_answers(tokenizer_dir: Path, tmp_path: Path) -> None:
    record = {"instruction": "b", "chosen": "<think>\nhm\n</think>\n\nYes", "rejected": "No"}
    _, texts = run([record], tokenizer_dir, tmp_path, prompt_type="qwen3")
    prompt = "<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n"
    assert texts[0][0] == prompt + "<think>\nhm\n</think>\n\nYes<|im_end|>\n"
    assert texts[0][2] == prompt + "No<|im_end|>\n"


def test_a_pair_with_one_long_answer_is_dropped_whole(tokenizer_dir: Path, tmp_path: Path) -> None:
    records = [
        {"instruction": "a", "chosen": "long " * 50, "rejected": "No"},
        {"instruction": "a", "chosen": "same", "rejected": "same"},
        {"instruction": "a", "chosen": "", "rejected": "No"},
    ]
    report, texts = run(records, tokenizer_dir, tmp_path, seq_length=64)
    assert [trained for _, trained, _, _ in texts] == ["same<|im_end|>", "<|im_end|>"]
    assert report.num_skipped == {"64 tokens or more (--seq-length)": 1}
    assert report.notes["records whose answers are equal"] == 1
    for key in PairwiseForm.values:
        assert IndexedDataset(key_stem(tmp_path / "out" / "x", key)).document_boundaries.tolist() == [0, 0, 1, 2]


def test_efficient_eos_ends_both_answers(tokenizer_dir: Path, tmp_path: Path) -> None:
    path = write_json(tmp_path / "t.json", [{"name": "e", "format_user": {"slots": ["[{{content}}]"]}, "efficient_eos": True}])
    _, texts = run([{"instruction": "a", "chosen": "Y", "rejected": "N"}], tokenizer_dir, tmp_path, prompt_type="e", path=path)
    assert texts == [("[a]Y<|im_end|>", "Y<|im_end|>", "[a]N<|im_end|>", "N<|im_end|>")]


def test_answers_without_a_stop_are_counted(tokenizer_dir: Path, tmp_path: Path) -> None:
    report, _ = run([{"instruction": "a", "chosen": "Y", "rejected": "N"}], tokenizer_dir, tmp_path, prompt_type="empty")
    assert report.notes["answers without a stop token at the end"] == 2


def test_refusals(tokenizer_dir: Path, tmp_path: Path) -> None:
    record = {"instruction": "a", "chosen": "Y", "rejected": "N"}
    with pytest.raises(UsageError, match=r"--pack packs instruction data, which --handler-name AlpacaStylePairwiseHandler does not make"):
        run([record], tokenizer_dir, tmp_path, pack=True, seq_length=64)
    with pytest.raises(UsageError, match=r"no column 'rejected' \(for rejected\) in the input, which has chosen, instruction"):
        run([{"instruction": "a", "chosen": "Y"}], tokenizer_dir, tmp_path)
    with pytest.raises(UsageError, match=r"--map-keys leaves no column for chosen and rejected"):
        run([record], tokenizer_dir, tmp_path, map_keys={"chosen": None, "rejected": None})
