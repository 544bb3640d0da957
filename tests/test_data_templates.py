"""Templates: what is trained, thinking, prompts for inference, stop tokens, the schema of the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from data_helpers import tiny_tokenizer, write_json

from mindspeed_lora.arguments.configs import TokenizerFlags
from mindspeed_lora.data.cutting import cut_turns
from mindspeed_lora.data.templates import Template, load_template
from mindspeed_lora.data.tokenizer import encode_texts, load_tokenizer
from mindspeed_lora.errors import DataError, UsageError

USER = {"role": "user", "content": "Hi"}
BLOCK = "<think>\n\n</think>\n\n"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(TokenizerFlags(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))))


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def texts(template: Template, tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> list[tuple[str, str]]:
    pairs = template.encode_conversation(tokenizer, messages, **options)
    return [(tokenizer.decode(source), tokenizer.decode(target)) for source, target in pairs]


def test_shipped_templates(tokenizer: Any) -> None:
    talk = [USER, assistant("Yo"), USER, assistant("Bye")]
    head = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n" + BLOCK
    assert texts(load_template("qwen3"), tokenizer, talk, system="S") == [
        ("<|im_start|>system\nS<|im_end|>\n" + head, "Yo<|im_end|>\n"),
        (head, "Bye<|im_end|>\n"),
    ]
    assert texts(load_template("default"), tokenizer, talk, system="S") == [
        ("S\nHuman: Hi\nAssistant:", "Yo<|im_end|>"),
        ("\nHuman: Hi\nAssistant:", "Bye<|im_end|>"),
    ]
    assert texts(load_template("llama2"), tokenizer, talk, system="S") == [  # the tiny tokenizer has no bos
        ("[INST] <<SYS>>\nS\n<</SYS>>\n\nHi [/INST]", "Yo<|im_end|>"),
        ("[INST] Hi [/INST]", "Bye<|im_end|>"),
    ]
    assert texts(load_template("empty"), tokenizer, talk) == [("Hi", "Yo"), ("Hi", "Bye")]


@pytest.mark.parametrize(
    ("mode", "answer", "source_end", "target"),
    [
        ("none", "42", BLOCK, "42"),
        ("true", "42", "", BLOCK + "42"),
        ("false", "42", BLOCK, "42"),
        ("none", "<think>\nhm\n</think>\n\n42", "", "<think>\nhm\n</think>\n\n42"),
        ("true", "<think>\nhm\n</think>\n\n42", "", "<think>\nhm\n</think>\n\n42"),
        ("false", "<think>\nhm\n</think>\n\n42", BLOCK, "42"),
        ("false", "<think>hm</think>42", BLOCK, "42"),
    ],
)
def test_thinking_in_training(tokenizer: Any, mode: str, answer: str, source_end: str, target: str) -> None:
    ((source, trained),) = texts(load_template("qwen3"), tokenizer, [USER, assistant(answer)], thinking=mode)
    assert source == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n" + source_end
    assert trained == target + "<|im_end|>\n"


@pytest.mark.parametrize(("mode", "end"), [("none", BLOCK), ("false", BLOCK), ("true", "")])
def test_prompt_for_inference(tokenizer: Any, mode: str, end: str) -> None:
    messages = [{"role": "system", "content": "S"}, USER, assistant("<think>\nhm\n</think>\n\nYo"), {"role": "user", "content": "And?"}]
    prompt = load_template("qwen3").encode_prompt(tokenizer, messages, "not this", mode)
    assert tokenizer.decode(prompt) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>\n"
        "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n" + end
    )


@pytest.mark.parametrize("name", ["qwen3", "llama2", "default", "empty"])
def test_prompt_is_what_training_saw(tokenizer: Any, name: str) -> None:
    template = load_template(name)
    ((source, _),) = template.encode_conversation(tokenizer, [USER, assistant("Yo")], "S")
    assert template.encode_prompt(tokenizer, [USER], "S") == source


def test_elements_are_encoded_separately(tokenizer: Any) -> None:
    template = Template("t", user=("{{content}}", "the answer"), assistant=("{{content}}",))
    ((source, _),) = template.encode_conversation(tokenizer, [{"role": "user", "content": "is in "}, assistant("x")])
    first, second, whole = encode_texts(tokenizer, ["is in ", "the answer", "is in the answer"])
    assert source == first + second != whole


def test_placeholders_are_replaced_once(tokenizer: Any) -> None:
    message = {"role": "user", "content": "{{content}} and {{idx}}"}
    ((source, target),) = texts(load_template("empty"), tokenizer, [message, assistant("{{content}}")])
    assert (source, target) == ("{{content}} and 0", "{{content}}")
    twice = Template("t", user=("{{content}}|{{content}}",))
    assert texts(twice, tokenizer, [USER, assistant("x")])[0][0] == "Hi|{{content}}"  # as the peer


def test_stop_tokens(tokenizer: Any) -> None:
    end, text_end = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert load_template("qwen3").stop_token_ids(tokenizer) == [end]
    assert Template("t", stop_words=("<|endoftext|>", "no token")).stop_token_ids(tokenizer) == sorted([end, text_end])
    assert [load_template(name).has_stop for name in ("qwen3", "llama2", "default", "empty")] == [True, True, True, False]


def test_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    shipped = load_template("qwen3")
    entry: dict[str, Any] = {
        "name": "mine",
        "format_user": {"slots": ["<|im_start|>user\n{{content}}<|im_end|>\n<|im_start|>assistant\n"]},
        "format_assistant": {"slots": ["{{content}}<|im_end|>\n"]},
        "format_system": {"slots": ["<|im_start|>system\n{{content}}<|im_end|>\n"]},
        "format_observation": {"slots": list(shipped.observation)},
        "format_function": {"slots": ["{{content}}<|im_end|>\n"], "tool_format": "qwen"},
        "format_tools": {"tool_format": "qwen"},
        "thought_words": ["<think>\n", "\n</think>\n\n"],
        "stop_words": ["<|im_end|>"],
        "template_class": "ReasoningTemplate",
    }
    assert load_template("mine", write_json(tmp_path / "t.json", [entry])).fingerprint() == shipped.fingerprint()
    entry["default_system"] = ["You are ", "kind."]
    changed = load_template("mine", write_json(tmp_path / "t.json", [entry]))
    assert changed.default_system == "You are kind."
    assert changed.fingerprint() != shipped.fingerprint()


def test_tokens_specials_and_efficient_eos_in_a_users_file(tmp_path: Path, tokenizer: Any) -> None:
    entry = {
        "name": "mine",
        "format_prefix": {"slots": [["bos_token"], ["eos_token"]]},
        "format_user": {"slots": [{"token": "<|im_start|>"}, "[{{idx}}] {{content}}"]},
        "efficient_eos": True,
    }
    template = load_template("mine", write_json(tmp_path / "t.json", [entry]))
    talk = [USER, assistant("Yo"), USER, assistant("Bye")]
    assert texts(template, tokenizer, talk) == [("<|im_end|><|im_start|>[0] Hi", "Yo"), ("<|im_start|>[1] Hi", "Bye")]


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (None, "qwen3", "no such file"),
        ("{", "qwen3", "not a JSON list of templates"),
        ('[{"no": "name"}]', "qwen3", "not a JSON list of templates"),
        ('[{"name": "a"}, {"name": "b"}]', "qwen3", "--prompt-type qwen3: .* has the templates a, b"),
        ('[{"name": "a"}]', None, "--prompt-type is missing"),
        ('[{"name": "a", "template_class": "Other"}]', "a", "template_class 'Other'; known are Template"),
        ('[{"name": "a", "format_user": {"slots": [["pad_token"]]}}]', "a", "format_user has the slot"),
        ('[{"name": "a", "thought_words": ["<think>"]}]', "a", "thought_words must be two texts"),
    ],
)
def test_bad_template_files(tmp_path: Path, content: str | None, name: str | None, message: str) -> None:
    path = tmp_path / "t.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UsageError, match=message):
        load_template(name, path)


def test_bad_conversations_and_modes(tokenizer: Any) -> None:
    qwen3 = load_template("qwen3")
    with pytest.raises(UsageError, match="--enable-thinking true: template 'llama2' has no thinking"):
        load_template("llama2").encode_conversation(tokenizer, [USER, assistant("x")], thinking="true")
    with pytest.raises(UsageError, match="--enable-thinking maybe"):
        qwen3.encode_prompt(tokenizer, [USER], thinking="maybe")
    with pytest.raises(DataError, match="must end with a user's message"):
        qwen3.encode_prompt(tokenizer, [USER, assistant("x")])
    with pytest.raises(DataError, match="role 'user' where assistant or function must stand"):
        qwen3.encode_conversation(tokenizer, [USER, USER])
    with pytest.raises(DataError, match="pairs of user and assistant"):
        qwen3.encode_conversation(tokenizer, [USER])
    with pytest.raises(DataError, match="the tools are no JSON"):
        qwen3.encode_conversation(tokenizer, [USER, assistant("x")], tools="[...]")
    with pytest.raises(UsageError, match="needs the token <gone>"):
        from mindspeed_lora.data.templates import Token

        Template("t", prefix=(Token("<gone>"),)).encode_prompt(tokenizer, [USER])


@pytest.mark.parametrize(
    ("lengths", "cutoff", "rule", "expected"),
    [
        ([(10, 10)], 100, "proportional", [(10, 10)]),
        ([(30, 10)], 20, "proportional", [(15, 5)]),
        ([(1000, 1)], 10, "proportional", [(9, 1)]),  # one target token at least
        ([(10, 10), (5, 5)], 20, "proportional", [(10, 10)]),  # nothing left for turn two
        ([(30, 4)], 21, "halves", [(16, 4)]),  # 20 to share; the short target is whole
        ([(4, 30)], 21, "halves", [(4, 16)]),
        ([(30, 30)], 21, "halves", [(10, 10)]),
        ([(10, 10), (30, 4)], 41, "halves", [(10, 10), (16, 4)]),
    ],
)
def test_cutting(lengths: list[tuple[int, int]], cutoff: int, rule: Any, expected: list[tuple[int, int]]) -> None:
    pairs = [([1] * source, [2] * target) for source, target in lengths]
    assert [(len(source), len(target)) for source, target in cut_turns(pairs, cutoff, rule)] == expected
