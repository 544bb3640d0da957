"""The handlers of plain text, of old instruction formats and of prompts; the table of handlers and its flag."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from data_helpers import tiny_tokenizer, write_json

from mindspeed_lora.arguments.configs import PreprocessConfig, TemplateFlags, TokenizerFlags
from mindspeed_lora.arguments.flags_tools import OTHER_HANDLERS, TRAINED_HANDLERS
from mindspeed_lora.data.handlers import HANDLERS
from mindspeed_lora.data.indexed_dataset import IndexedDataset
from mindspeed_lora.data.preprocess import PreprocessReport, write_dataset
from mindspeed_lora.data.tokenizer import load_tokenizer
from mindspeed_lora.errors import UsageError

SYSTEM = (
    "\nBelow is an instruction that describes a task, paired with an input that provides further context. Write a response that "
    "appropriately completes the request. Please note that you need to think through your response logically and step by step.\n"
)


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def bos_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that puts <|im_start|> before every text."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    folder = tiny_tokenizer(tmp_path_factory.mktemp("bos_tokenizer"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    bos = tokenizer.convert_tokens_to_ids("<|im_start|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", bos)])
    tokenizer.save_pretrained(folder)
    return folder


def run(records: Any, handler: str | None, tokenizer_dir: Path, tmp_path: Path, prompt_type: str | None = None, **options: Any) -> Any:
    """The report, and the files' datasets by the end of their names."""
    source = records if isinstance(records, Path) else write_json(tmp_path / "in.json", records)
    prefix = tmp_path / "out" / "x"
    flags = TokenizerFlags(tokenizer_dir)
    report = write_dataset(PreprocessConfig(source, prefix, flags, TemplateFlags(prompt_type), handler_name=handler, **options))
    stems = sorted(path.with_suffix("") for path in prefix.parent.glob("*.idx"))
    return report, {stem.name.removeprefix("x_").removesuffix("_document"): IndexedDataset(stem) for stem in stems}


def spoken(datasets: dict[str, IndexedDataset], tokenizer_dir: Path, row: int = 0) -> tuple[str, str]:
    """Whole text of a row of instruction data, and what of it is trained."""
    tokenizer = load_tokenizer(TokenizerFlags(tokenizer_dir))
    ids, labels = datasets["packed_input_ids"][row], datasets["packed_labels"][row]
    assert (labels[labels != -100] == ids[labels != -100]).all()
    return tokenizer.decode(ids), tokenizer.decode(labels[labels != -100])


def text(dataset: IndexedDataset, tokenizer_dir: Path, row: int = 0) -> str:
    return str(load_tokenizer(TokenizerFlags(tokenizer_dir)).decode(dataset[row]))


def test_the_flag_names_the_table() -> None:
    assert sorted(HANDLERS) == sorted([*TRAINED_HANDLERS, *OTHER_HANDLERS])
    trained = [name for name, handler in HANDLERS.items() if handler.form.name in ("instruction", "pairwise")]
    assert sorted(trained) == sorted(TRAINED_HANDLERS)


def test_plain_text_is_the_default(bos_tokenizer_dir: Path, tmp_path: Path) -> None:
    """Empty texts leave nothing; the tokenizer's own bos stands before each text."""
    report, files = run([{"text": "Once"}, {"text": ""}, {"text": "Twice"}, {"text": 5}], None, bos_tokenizer_dir, tmp_path)
    assert list(files) == ["text"]
    assert [text(files["text"], bos_tokenizer_dir, row) for row in range(2)] == ["<|im_start|>Once", "<|im_start|>Twice"]
    assert files["text"].document_boundaries.tolist() == [0, 1, 2]
    assert isinstance(report, PreprocessReport) and report.num_written == 2
    assert report.num_skipped == {"the text is empty": 1, "column text holds a int, not a text": 1}
    assert report.num_trained_tokens == report.num_tokens == files["text"].num_tokens


def test_several_columns_with_eod_and_padding(tokenizer_dir: Path, tmp_path: Path) -> None:
    """The padding is the pad token; MindSpeed-LLM's is the size of the vocabulary, which need not be a token."""
    records = [{"a": "12345", "b": "1234567"}, {"a": "", "b": "123"}, {"a": "x" * 50, "b": "y"}]
    _, files = run(records, None, tokenizer_dir, tmp_path, json_keys=("a", "b"), append_eod=True, pad_to_multiple_of=8, seq_length=20)
    assert sorted(files) == ["a", "b"]
    end = "<|im_end|>"
    pad = "<|endoftext|>"
    assert text(files["a"], tokenizer_dir) == "12345" + 2 * pad + end
    assert [text(files["b"], tokenizer_dir, row) for row in (0, 1)] == ["1234567" + end, "123" + 4 * pad + end]
    assert files["a"].document_boundaries.tolist() == [0, 1, 1]  # the empty text has no document, the long one an empty one
    assert files["b"].document_boundaries.tolist() == [0, 1, 2, 2]


def test_a_multiple_gets_a_whole_padding_as_with_the_peer(tokenizer_dir: Path, tmp_path: Path) -> None:
    _, files = run([{"text": "12345678"}], "GeneralPretrainHandler", tokenizer_dir, tmp_path, pad_to_multiple_of=8)
    assert files["text"].lengths.tolist() == [16]


def test_txt_lines_are_texts(tokenizer_dir: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.txt"
    source.write_text("One line\n\nanother\n")
    _, files = run(source, None, tokenizer_dir, tmp_path)
    assert [text(files["text"], tokenizer_dir, row) for row in range(len(files["text"]))] == ["One line", "another"]


def test_sharegpt_pretrain(tokenizer_dir: Path, tmp_path: Path) -> None:
    records = [
        {"conversations": [{"from": "human", "value": "Hi"}, {"role": "assistant", "content": " there"}]},
        {"conversations": [{"from": "human"}]},
        {"conversations": "Hi"},
    ]
    report, files = run(records, "SharegptPretrainHandler", tokenizer_dir, tmp_path)
    assert text(files["conversations"], tokenizer_dir) == "Hi there"
    assert report.num_skipped == {
        "column conversations: a message has no text in value or content": 1,
        "column conversations is no list of messages": 1,
    }


def test_alpaca_pretrain(tokenizer_dir: Path, tmp_path: Path) -> None:
    """A record without an input has no input section; MindSpeed-LLM writes "###None" there."""
    records = [{"instruction": "Say", "input": "", "output": "A"}, {"instruction": "Say", "input": "it", "output": "A"}]
    _, files = run(records, "AlpacaPretrainHandler", tokenizer_dir, tmp_path)
    first, second = (text(files["text"], tokenizer_dir, row) for row in (0, 1))
    start = "answers to the user's questions.USER: Below is an instruction that describes a task. Write a response that appropriately "
    assert start in first
    assert first.endswith("the request.\n\n### Instruction:\nSay\n\n### Response: ASSISTANT: A")
    assert second.endswith("the request.\n\n### Instruction:\nSay\n\n### Input:\nit\n\n### Response: ASSISTANT: A")


def test_stack_overflow(tokenizer_dir: Path, tmp_path: Path) -> None:
    """MindSpeed-LLM's handler of this name fails at its first record."""
    records = [{"title": "how", "question_body": "Q", "answer_body": "A"}]
    _, files = run(records, "StackOverflowPythonPretrainHandler", tokenizer_dir, tmp_path)
    assert text(files["text"], tokenizer_dir) == "In python, how\n### Question:\nQ\n### Response:\nA\n"


def test_general_instruction(bos_tokenizer_dir: Path, tmp_path: Path) -> None:
    report, files = run([{"instruction": "Say", "input": "", "output": "A"}], "GeneralInstructionHandler", bos_tokenizer_dir, tmp_path)
    assert spoken(files, bos_tokenizer_dir) == (f"<|im_start|>{SYSTEM}### Instruction:\nSay\n\n### Response:\nA\n", "A\n")
    assert report.notes["turns without a stop token at the end"] == 1
    assert sorted(files) == ["packed_attention_mask", "packed_input_ids", "packed_labels"]
    _, files = run(
        [{"instruction": "Say", "input": "", "output": "A"}], "GeneralInstructionHandler", bos_tokenizer_dir, tmp_path, append_eod=True
    )
    assert spoken(files, bos_tokenizer_dir)[1] == "A\n<|im_end|>"


def test_belle(tokenizer_dir: Path, tmp_path: Path) -> None:
    records = [
        {"instruction": "Human: one\nAssistant: 1\nHuman: two\nAssistant:", "output": " 2"},
        {"instruction": "Human: one", "output": "1"},
        {"instruction": "Human: one\nAssistant: 1", "output": "2"},
    ]
    report, files = run(records, "BelleMultiTurnInstructionHandler", tokenizer_dir, tmp_path)
    turns = "### Instruction:\none\n### Response:\n1\n### Instruction:\ntwo\n### Response:\n"
    assert spoken(files, tokenizer_dir) == (f"{SYSTEM}{turns}2\n", "2\n")
    assert report.num_skipped == {"column instruction does not alternate Human: and Assistant: up to an open Assistant:": 2}


MOSS = {
    "chat": {
        "turn_1": {"Human": "<|Human|>: one<eoh>\n", "MOSS": "<|MOSS|>: 1<eom>\n"},
        "turn_2": {"Human": "<|Human|>: two<eoh>\n", "MOSS": "<|MOSS|>: 2<eom>\n"},
        "turn_3": None,
    }
}


def test_moss(tokenizer_dir: Path, tmp_path: Path) -> None:
    report, files = run([MOSS, {"chat": []}, MOSS], "MOSSInstructionHandler", tokenizer_dir, tmp_path)
    first = "### Instruction:\none\n### Response:\n"
    second = "### Instruction:\ntwo\n### Response:\n"
    assert [spoken(files, tokenizer_dir, row) for row in (0, 1)] == [
        (f"{SYSTEM}{first}1\n", "1\n"),
        (f"{SYSTEM}{first}1\n{second}2\n", "2\n"),
    ]
    assert files["packed_labels"].document_boundaries.tolist() == [0, 2, 4]  # a record is a document of two sequences
    assert report.num_written == 2
    assert report.num_skipped == {"column chat is no object of turns with Human and MOSS": 1}


def test_moss_multi_turn(tokenizer_dir: Path, tmp_path: Path) -> None:
    _, files = run([MOSS], "MOSSMultiTurnHandler", tokenizer_dir, tmp_path)
    tokenizer = load_tokenizer(TokenizerFlags(tokenizer_dir))
    one, first, two, second = (tokenizer.encode(said) for said in ("one", "1", "two", "2"))
    eos = tokenizer.eos_token_id
    assert files["packed_input_ids"][0].tolist() == [195, *one, 196, *first, 195, *two, 196, *second, eos]
    hidden = [[-100] * (len(said) + 1) for said in (one, two)]
    assert files["packed_labels"][0].tolist() == [eos, *hidden[0], *first, eos, *hidden[1], *second, eos]


def test_leetcode(tokenizer_dir: Path, tmp_path: Path) -> None:
    records = [{"code_with_problem": "Add. \n```python\nx\n```", "code_only": "a + b", "explanation_only": "adds"}]
    _, files = run(records, "LeetcodePythonInstructionHandler", tokenizer_dir, tmp_path)
    assert spoken(files, tokenizer_dir) == (f"{SYSTEM}### Instruction:\nAdd.\n### Response:\na + b\nadds\n", "a + b\nadds\n")


def test_ppo_keeps_earlier_answers(tokenizer_dir: Path, tmp_path: Path) -> None:
    """A prompt of several turns has its answers; MindSpeed-LLM writes the questions alone."""
    records = [{"instruction": "two", "output": "2", "history": [["one", "1"]]}]
    keys = {"history": "history"}
    _, files = run(records, "PPOAlpacaStyleInstructionHandler", tokenizer_dir, tmp_path, "default", map_keys=keys)
    assert sorted(files) == ["packed_attention_mask", "packed_input_ids"]
    assert text(files["packed_input_ids"], tokenizer_dir) == "Human: one\nAssistant:1<|im_end|>\nHuman: two\nAssistant:"


@pytest.mark.parametrize("style", ["Alpaca", "Sharegpt"])
def test_r1_with_additional_keys(style: str, tokenizer_dir: Path, tmp_path: Path) -> None:
    turn = [{"from": "human", "value": "one"}, {"from": "gpt", "value": "1"}]
    records = [{"instruction": "one", "output": "1", "conversations": turn, "level": "hard"}, {"instruction": "one", "output": "1"}]
    records[1] |= {"conversations": turn, "level": None}
    keys = ("labels", "level")
    report, files = run(records, f"R1{style}StyleInstructionHandler", tokenizer_dir, tmp_path, "default", additional_keys=keys)
    found = {key: text(dataset, tokenizer_dir) for key, dataset in files.items() if key != "packed_attention_mask"}
    assert found == {"packed_input_ids": "Human: one\nAssistant:", "packed_labels": "1", "packed_level": "hard"}
    assert len(files["packed_attention_mask"][0]) == len(files["packed_input_ids"][0])
    assert report.num_skipped == {"column level is empty": 1}


def test_hunyuan(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = tiny_tokenizer(tmp_path / "tokenizer")
    with pytest.raises(
        UsageError, match=r"HunyuanInstructionHandler needs Hunyuan's tokenizer; .* lacks the tokens <\|extra_0\|> and <\|eos"
    ):
        run([{"conversations": []}], "HunyuanInstructionHandler", folder, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|extra_0|>", "<|eos|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}<|extra_0|>{{ m.content }}<|eos|>"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    tokenizer.save_pretrained(folder)
    talk = [("system", "S "), ("human", "a"), ("gpt", "A"), ("human", "b"), ("gpt", "B")]
    records = [{"conversations": [{"from": role, "value": said} for role, said in talk]}]
    _, files = run(records, "HunyuanInstructionHandler", folder, tmp_path, "hunyuan")
    assert spoken(files, folder) == ("S a<|extra_0|>A<|eos|>b<|extra_0|>B<|eos|>", "<|extra_0|>A<|eos|><|extra_0|>B<|eos|>")


@pytest.mark.parametrize(
    ("handler", "options", "message"),
    [
        (None, {}, r"--json-keys: no column 'text' \(for text\) in the input, which has instruction, output; .* where these are conversa"),
        ("GeneralPretrainHandler", {"map_keys": {"prompt": "instruction"}}, r"--map-keys means nothing to plain text; .*--json-keys"),
        ("GeneralPretrainHandler", {"prompt_type": "qwen3"}, r"--prompt-type means nothing to --handler-name GeneralPretrainHandler"),
        ("GeneralInstructionHandler", {"prompt_type": "qwen3"}, r"--prompt-type means nothing to --handler-name GeneralInstructionHandler"),
        (
            "AlpacaPretrainHandler",
            {"pack": True, "seq_length": 64},
            r"--pack packs instruction data, which .* AlpacaPretrainHandler does not",
        ),
        ("GeneralInstructionHandler", {"additional_keys": ("a",)}, r"--dataset-additional-keys go beside prompts, which .* does not make"),
        ("GeneralInstructionHandler", {"pad_to_multiple_of": 8}, r"--pad-to-multiple-of pads plain text; .* training pads by itself"),
        ("MOSSInstructionHandler", {}, r"--map-keys: no column 'chat' \(for chat\) in the input"),
        ("MOSSInstructionHandler", {"map_keys": {"chat": None}}, r"--map-keys leaves no column for chat"),
        ("R1AlpacaStyleInstructionHandler", {"prompt_type": "default", "additional_keys": ("level",)}, r"no column 'level' \(for level\)"),
    ],
)
def test_refusals(handler: str | None, options: dict[str, Any], message: str, tokenizer_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        run([{"instruction": "a", "output": "b"}], handler, tokenizer_dir, tmp_path, **options)
    assert not (tmp_path / "out").exists()
