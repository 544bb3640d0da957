"""``--hf-chat-template``: records through the tokenizer's own template, what of it is trained, and what is recorded."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from data_helpers import alpaca_records, tiny_tokenizer, write_json
from test_data_tools import TALKS, TOOLS, assistant, joined, theirs, tokenizer_of, user

from mindspeed_lora.arguments.configs import PreprocessConfig, TemplateFlags, TokenizerFlags
from mindspeed_lora.data.chat_template import HF_CHAT_TEMPLATE, ChatTemplate, open_template, template_words
from mindspeed_lora.data.preprocess import write_dataset
from mindspeed_lora.data.rendering import Message
from mindspeed_lora.data.sft_dataset import check_data_manifest, open_sft_dataset
from mindspeed_lora.data.templates import load_template
from mindspeed_lora.data.tokenizer import load_tokenizer
from mindspeed_lora.errors import CheckpointError, DataError, UsageError
from mindspeed_lora.inference.prompts import resolve_prompt_format

TWO_TURNS = [user("Hi"), assistant("Yo"), user("And?"), assistant("Bye")]
HEAD = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
MARKED = (
    HEAD + "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}" + ASK
)
ELSEWHERE = HEAD + "[{{ m['content'] }}]<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
REFUSING = (
    "{% if messages | length > 2 %}{{ raise_exception('too many turns') }}{% endif %}" + HEAD + "{{ m['content'] }}<|im_end|>{% endfor %}"
)


def with_template(folder: Path, template: str) -> Any:
    """The tiny tokenizer with another chat template."""
    tokenizer = load_tokenizer(TokenizerFlags(folder))
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def spoken(tokenizer: Any, messages: list[Message], **options: Any) -> list[tuple[str, str]]:
    pairs = ChatTemplate.of(tokenizer).encode_conversation(tokenizer, messages, **options)
    return [(tokenizer.decode(source), tokenizer.decode(target)) for source, target in pairs]


@pytest.mark.parametrize("tools", ["", TOOLS], ids=["no tools", "tools"])
@pytest.mark.parametrize("system", ["", "You are kind."], ids=["no system", "system"])
@pytest.mark.parametrize("talk", [*TALKS])
@pytest.mark.parametrize(("name", "modes"), [("qwen2.5", ["none"]), ("llama3", ["none"]), ("qwen3", ["none", "true", "false"])])
def test_ids_are_those_of_apply_chat_template(name: str, modes: list[str], talk: str, system: str, tools: str) -> None:
    tokenizer, messages = tokenizer_of(name), TALKS[talk]
    template = ChatTemplate.of(tokenizer)
    if name == "llama3" and talk == "two calls, and on":
        with pytest.raises(DataError, match=r"the chat template refuses the conversation: .*single tool-calls"):
            template.encode_conversation(tokenizer, messages, system, tools)
        return
    for mode in modes:
        options = {} if mode == "none" else {"enable_thinking": mode == "true"}
        pairs = template.encode_conversation(tokenizer, messages, system, tools, mode)
        assert joined(pairs) == theirs(tokenizer, messages, system, tools, **options)
        asked = theirs(tokenizer, messages[:-1], system, tools, add_generation_prompt=True, **options)
        assert template.encode_prompt(tokenizer, messages[:-1], system, mode, tools) == asked
        # Qwen3's own template writes an answer without a thought block once a turn follows: only the last is trained
        assert len(pairs) == (1 if name == "qwen3" else len(messages) // 2)
        assert joined(pairs[-1:])[-len(pairs[-1][1]) :] == pairs[-1][1] and joined(pairs)[: len(asked)] == asked


def test_every_answer_is_trained_by_prefixes(folder: Path) -> None:
    tokenizer = load_tokenizer(TokenizerFlags(folder))
    assert spoken(tokenizer, TWO_TURNS, system="S") == [
        ("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "Yo<|im_end|>\n"),
        ("<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n", "Bye<|im_end|>\n"),
    ]


def test_every_answer_is_trained_by_generation_marks(folder: Path) -> None:
    """Ids and mask are transformers' own; what follows the last mark stands in the text and is not trained."""
    tokenizer = with_template(folder, MARKED)
    assert spoken(tokenizer, TWO_TURNS) == [
        ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "Yo<|im_end|>"),
        ("\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n", "Bye<|im_end|>"),
        ("\n", ""),
    ]
    expected = tokenizer.apply_chat_template(TWO_TURNS, return_dict=True, return_assistant_tokens_mask=True)
    pairs = ChatTemplate.of(tokenizer).encode_conversation(tokenizer, TWO_TURNS)
    assert joined(pairs) == expected["input_ids"]
    assert [flag for source, target in pairs for flag in [0] * len(source) + [1] * len(target)] == expected["assistant_masks"]


def test_templates_that_cannot_be_trained_with(folder: Path) -> None:
    with pytest.raises(UsageError, match="cannot be trained with: the chat template writes the last answer in another place than where"):
        open_template(TemplateFlags(hf_chat_template=True), with_template(folder, ELSEWHERE))
    with pytest.raises(DataError, match="the chat template writes the last answer in another place than where"):
        ChatTemplate.of(with_template(folder, ELSEWHERE)).render_last(TWO_TURNS)
    unmarked = MARKED.replace("m['role'] == 'assistant'", "m['role'] == 'nobody'")
    with pytest.raises(UsageError, match=r"has \{% generation %\}, and marks no answer of this conversation with it"):
        open_template(TemplateFlags(hf_chat_template=True), with_template(folder, unmarked))
    with pytest.raises(DataError, match="the chat template refuses the conversation: too many turns"):
        ChatTemplate.of(with_template(folder, REFUSING)).render(TWO_TURNS)
    with pytest.raises(UsageError, match=r"--hf-chat-template: the tokenizer at .* has no chat template; use --prompt-type"):
        open_template(TemplateFlags(hf_chat_template=True), with_template(folder, ""))
    with pytest.raises(UsageError, match=f"--enable-thinking true: template '{HF_CHAT_TEMPLATE}' has no thinking"):
        ChatTemplate.of(load_tokenizer(TokenizerFlags(folder))).check_thinking("true")


def preprocessed(folder: Path, tmp_path: Path, records: list[dict[str, Any]], **options: Any) -> tuple[Any, Any]:
    source = write_json(tmp_path / "in.json", records)
    template = TemplateFlags(hf_chat_template=True)
    report = write_dataset(PreprocessConfig(source, tmp_path / "out", TokenizerFlags(folder), template, **options))
    return report, open_sft_dataset(tmp_path / "out")


def test_preprocessing_records_the_template(folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(TokenizerFlags(folder))
    report, dataset = preprocessed(folder, tmp_path, alpaca_records(7), workers=2)
    assert report.num_written == 7 and not any(report.notes.values())
    ids, labels = dataset[1]
    assert tokenizer.decode(ids) == "<|im_start|>user\nSay number 1 again <|im_end|>\n<|im_start|>assistant\nword word 1<|im_end|>\n"
    assert tokenizer.decode(labels[labels != -100]) == "word word 1<|im_end|>\n"
    manifest = dataset.manifest
    assert manifest.template == {
        "name": HF_CHAT_TEMPLATE,
        "fingerprint": ChatTemplate.of(tokenizer).fingerprint(),
        "enable_thinking": "none",
    }
    check_data_manifest(manifest, tokenizer, TemplateFlags(hf_chat_template=True))
    check_data_manifest(manifest, tokenizer, TemplateFlags())
    assert template_words(manifest.template) == ["--hf-chat-template"] and template_words({}) == []
    assert template_words({"name": "qwen3"}) == ["--prompt-type", "qwen3"]
    with pytest.raises(UsageError, match=f"--prompt-type qwen3 is not what the data was made with: {HF_CHAT_TEMPLATE}"):
        check_data_manifest(manifest, tokenizer, TemplateFlags("qwen3"))
    with pytest.raises(UsageError, match="--hf-chat-template is not what the data was made with"):
        check_data_manifest(manifest, with_template(folder, MARKED), TemplateFlags(hf_chat_template=True))

    found = resolve_prompt_format(TemplateFlags(), manifest.template, "ADAPTER")
    assert (found.use_chat_template, found.source) == (True, "ADAPTER")
    found.check_tokenizer(tokenizer, manifest.template, "ADAPTER")
    with pytest.raises(CheckpointError, match="ADAPTER: the adapter was trained with another chat template than that of the tokenizer at"):
        found.check_tokenizer(with_template(folder, MARKED), manifest.template, "ADAPTER")
    with pytest.raises(UsageError, match=f"--prompt-type qwen3 contradicts ADAPTER, .* template {HF_CHAT_TEMPLATE}"):
        resolve_prompt_format(TemplateFlags("qwen3"), manifest.template, "ADAPTER")
    with pytest.raises(UsageError, match="--enable-thinking true contradicts ADAPTER"):
        resolve_prompt_format(TemplateFlags(enable_thinking="true"), manifest.template, "ADAPTER")


def test_answers_that_are_not_trained_are_counted(folder: Path, tmp_path: Path) -> None:
    """Like Qwen3's: the last answer has a mark that it loses once a turn follows."""
    rewriting = HEAD + "{% if loop.last and m['role'] == 'assistant' %}[last]{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}" + ASK
    altered = tmp_path / "tokenizer"
    shutil.copytree(folder, altered)
    with_template(folder, rewriting).save_pretrained(altered)
    records = [{"instruction": "c", "output": "C", "history": [["a", "A"], ["b", "B"]]}, {"instruction": "a", "output": "A"}]
    report, dataset = preprocessed(altered, tmp_path, records, map_keys={"history": "history"})
    assert report.notes["answers not trained, for the chat template writes them in another way once a turn follows"] == 2
    _, labels = dataset[0]
    assert load_tokenizer(TokenizerFlags(folder)).decode(labels[labels != -100]) == "[last]C<|im_end|>\n"


@pytest.mark.parametrize("name", ["qwen3", "llama3", "gemma", "glm4", "baichuan2", "deepseek3"])
def test_a_tokenizer_without_the_templates_tokens(name: str, folder: Path) -> None:
    tokenizer = load_tokenizer(TokenizerFlags(folder))
    template = load_template(name)
    if name == "qwen3":
        return template.check_tokenizer(tokenizer)
    token = {
        "llama3": "<|eot_id|>",
        "gemma": "<start_of_turn>",
        "glm4": "<|user|>",
        "baichuan2": "<reserved_106>",
        "deepseek3": "<｜User｜>",
    }
    with pytest.raises(UsageError, match=f"--prompt-type {name} needs the tokens .*which the tokenizer at .* lacks") as caught:
        open_template(TemplateFlags(name), tokenizer)
    assert token[name] in str(caught.value)


def test_another_eos_than_the_chat_models_is_told(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A base model's tokenizer: its eos is not what ends a turn of the chat model."""
    logging.getLogger("mindspeed_lora").propagate = True
    base = load_tokenizer(TokenizerFlags(folder))
    base.eos_token = "<|endoftext|>"
    base.save_pretrained(tmp_path / "base")
    source = write_json(tmp_path / "in.json", alpaca_records(2))
    for name, told in (("qwen", True), ("qwen3", False), ("default", False)):
        caplog.clear()
        write_dataset(PreprocessConfig(source, tmp_path / name, TokenizerFlags(tmp_path / "base"), TemplateFlags(name)))
        assert ("end an answer with <|im_end|>, but the tokenizer at" in caplog.text) == told


def test_a_tokenizer_without_eos(folder: Path) -> None:
    tokenizer = load_tokenizer(TokenizerFlags(folder))
    tokenizer.eos_token = None
    with pytest.raises(UsageError, match=r"--prompt-type default ends an answer with the eos token, and the tokenizer at .* has none"):
        open_template(TemplateFlags("default"), tokenizer)
    load_template("qwen3").check_tokenizer(tokenizer)
