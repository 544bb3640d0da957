"""Tools in conversations: each format's texts, equality with the models' own chat templates, and what cannot be read."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from helpers import shared_data
from test_data_templates_pinned import text

from mindspeed_lora.data.chat_template import ChatTemplate
from mindspeed_lora.data.rendering import Message
from mindspeed_lora.data.templates import Template, load_template
from mindspeed_lora.data.tools import TOOL_FORMATS, describe_tools, parse_calls, parse_tools, write_calls
from mindspeed_lora.errors import DataError

WEATHER = {
    "name": "get_weather",
    "description": "Get the weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "description": "City name", "enum": ["Paris", "Rome"]}, "days": {"type": "integer"}},
        "required": ["city"],
    },
}
CLOCK = {"name": "时间", "description": "What time is it", "parameters": {"type": "object", "properties": {}}}
TOOLS = json.dumps([WEATHER, CLOCK], ensure_ascii=False)
WRAPPED = [{"type": "function", "function": tool} for tool in (WEATHER, CLOCK)]
JSON_LINE = (
    '{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object", '
    '"properties": {"x": {"type": "array", "items": {"type": "integer"}}}}}}'
)
ONE = json.dumps([json.loads(JSON_LINE)["function"]])
HERMES = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function signatures within "
    f"<tools></tools> XML tags:\n<tools>\n{JSON_LINE}\n</tools>\n\n"
)
HERMES_CALL = (
    "For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:\n"
    '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)
# format: description of the tool above, call of f with {"x": [1], "é": "ü"}
PINNED = {
    "default": (
        "You have access to the following tools:\n> Tool Name: f\nTool Description: d\nTool Args:\n"
        "  - x (array): , where each item should be integer\n\n"
        "Use the following format if using a tool:\n```\nAction: tool name (one of [f]).\n"
        "Action Input: the input to the tool, in a JSON format representing the kwargs "
        '(e.g. ```{"input": "hello world", "num_beams": 5}```).\n```\n',
        'Action: f\nAction Input: {"x": [1], "é": "ü"}',
    ),
    "qwen": (HERMES + HERMES_CALL, '<tool_call>\n{"name": "f", "arguments": {"x": [1], "é": "ü"}}\n</tool_call>'),
    "ling": (
        HERMES + HERMES_CALL + "\ndetailed thinking off",
        '<tool_call>\n{"name": "f", "arguments": {"x": [1], "é": "ü"}}\n</tool_call>',
    ),
    "glm4_moe": (
        HERMES + "For each function call, output the function name and arguments within the following XML format:\n"
        "<tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key>\n<arg_value>{arg-value-1}</arg_value>\n"
        "<arg_key>{arg-key-2}</arg_key>\n<arg_value>{arg-value-2}</arg_value>\n...\n</tool_call>",
        "\n<tool_call>f\n<arg_key>x</arg_key>\n<arg_value>[1]</arg_value>\n<arg_key>é</arg_key>\n<arg_value>ü</arg_value>\n</tool_call>",
    ),
    "glm4": (
        "你是一个名为 ChatGLM 的人工智能助手。你是基于智谱 AI 公司训练的语言模型 GLM-4 模型开发的，"
        "你的任务是针对用户的问题和要求提供适当的答复和支持。\n\n# 可用工具\n\n## f\n\n"
        + json.dumps(json.loads(JSON_LINE)["function"], indent=4)
        + "\n在调用上述函数时，请使用 Json 格式表示调用的参数。",
        'f\n{"x": [1], "é": "ü"}',
    ),
    "llama3": (
        "You have access to the following functions. To call a function, please respond with JSON for a function call."
        'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.'
        "Do not use variables.\n\n" + json.dumps(json.loads(JSON_LINE), indent=4) + "\n\n",
        '{"name": "f", "parameters": {"x": [1], "é": "ü"}}',
    ),
    "mistral": (f"[AVAILABLE_TOOLS] [{JSON_LINE}][/AVAILABLE_TOOLS]", '[{"name": "f", "arguments": {"x": [1], "é": "ü"}}]'),
}


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def observation(content: str) -> Message:
    return {"role": "observation", "content": content}


def calls(*values: Any) -> Message:
    return {"role": "function", "content": json.dumps(values if len(values) > 1 else values[0], ensure_ascii=False)}


PARIS = {"name": "get_weather", "arguments": {"city": "Paris", "days": 1}}
TALKS = {
    "one turn": [user("Hi"), assistant("Hello!")],
    "three turns": [user("Hi"), assistant("Hello!"), user("你好吗？"), assistant("很好。"), user("Bye"), assistant("Bye\n\nnow")],
    "a call": [user("Weather?"), calls(PARIS), observation('{"temp": 20}'), assistant("20.")],
    "two calls, and on": [
        *(user("Weather?"), calls(PARIS, {"name": "时间", "arguments": {}}), observation('{"temp": 20}'), assistant("20.")),
        *(user("And now?"), calls({"name": "时间", "arguments": {"zone": "é"}}), observation("12:00"), assistant("Noon.")),
    ],
}


@pytest.mark.parametrize("name", PINNED)
def test_texts_of_a_format(name: str) -> None:
    description, call = PINNED[name]
    assert describe_tools(name, ONE) == describe_tools(name, json.dumps([json.loads(JSON_LINE)])) == description
    assert write_calls(name, parse_calls('{"name": "f", "arguments": {"x": [1], "é": "ü"}}')) == call
    assert write_calls(name, parse_calls(json.dumps([{"name": "f", "arguments": json.dumps({"x": [1], "é": "ü"})}]))) == call


def test_numbers_to_choose_from() -> None:
    text = describe_tools("default", '[{"name": "f", "parameters": {"properties": {"x": {"enum": [1, 2.5]}}}}]')
    assert "Tool Description: \nTool Args:\n  - x (): , should be one of [1, 2.5]\n\nUse the following" in text


def test_every_format_is_pinned_and_used_by_name() -> None:
    assert sorted(TOOL_FORMATS) == sorted([*PINNED, "qwen3"])
    assert TOOL_FORMATS["qwen3"] is TOOL_FORMATS["qwen"]
    shipped = {name: load_template(name).tool_format for name in ("qwen3", "qwen_lf", "bailing_mini", "chatglm3", "glm4", "glm4_moe")}
    assert list(shipped.values()) == ["qwen", "qwen", "ling", "glm4", "glm4", "glm4_moe"]
    assert {load_template(name).tool_format for name in ("qwen", "llama3", "mistral", "deepseek3")} == {"default"}


def test_several_calls_in_one_turn() -> None:
    two = parse_calls('[{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]')
    assert write_calls("default", two) == "Action: f\nAction Input: {}\nAction: g\nAction Input: {}"
    assert write_calls("qwen", two).count("</tool_call>\n<tool_call>") == 1
    for name in ("glm4", "llama3"):
        with pytest.raises(DataError, match=f"2 function calls in one turn, and the tool format {name} knows one"):
            write_calls(name, two)
    with pytest.raises(DataError, match="2 function calls in one turn, and template chatglm3_system has room for one"):
        load_template("chatglm3_system").render([user("a"), calls({"name": "f", "arguments": {}}, {"name": "g", "arguments": {}})])


def test_system_text_and_description() -> None:
    """They stand in one system text; with hermes formats an empty line between them, with the default format nothing (as the peer)."""
    qwen3, qwen = load_template("qwen3"), load_template("qwen")
    alone = text(qwen3.render(TALKS["one turn"], "", "none", ONE)[0][0])
    assert alone.startswith("<|im_start|>system\n# Tools\n\nYou may")
    assert text(qwen3.render(TALKS["one turn"], "S", "none", ONE)[0][0]).startswith("<|im_start|>system\nS\n\n# Tools\n\nYou may")
    assert text(qwen.render(TALKS["one turn"], "S", "none", ONE)[0][0]).startswith("<|im_start|>system\nSYou have access to")
    for none in ("", "[]", " "):
        assert text(qwen3.render(TALKS["one turn"], "", "none", none)[0][0]).startswith("<|im_start|>user\n")
    llama2 = text(load_template("llama2").render(TALKS["one turn"], "S", "none", ONE)[0][0])
    assert llama2.startswith("⟨bos⟩[INST] <<SYS>>\nSYou have access to") and llama2.endswith("\n<</SYS>>\n\nHi [/INST]")


def test_a_thought_before_a_call() -> None:
    thought = "<think>\nWhere?\n</think>\n\n"
    turn = [user("Weather?"), {"role": "function", "content": thought + json.dumps(PARIS)}]
    call = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 1}}\n</tool_call><|im_end|>\n'
    qwen3 = load_template("qwen3")
    source, target = qwen3.render(turn)[0]
    assert text(source) == "<|im_start|>user\nWeather?<|im_end|>\n<|im_start|>assistant\n"
    assert text(target) == thought + call
    assert text(qwen3.render(turn, thinking="false")[0][1]) == call
    # asked for the answer after the result, the model sees the thought of its call again, but none from before the question
    earlier = [user("Hi"), assistant("<think>\nhm\n</think>\n\nHello!")]
    prompt, _ = qwen3.render_last([*earlier, *turn, observation("20"), assistant("20.")])
    assert thought + call in text(prompt) and "hm" not in text(prompt)


@cache
def tokenizer_of(name: str) -> Any:
    from transformers import AutoTokenizer

    folder = shared_data() / f"{name}-tokenizer"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not tokenizer.chat_template:
        tokenizer.chat_template = next(iter(Path(folder).glob("*.jinja"))).read_text(encoding="utf-8")
    return tokenizer


def theirs(tokenizer: Any, talk: list[Message], system: str, tools: str, **options: Any) -> list[int]:
    """Ids of transformers' own rendering, from messages as its documentation has them."""
    chat: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    for message in talk:
        role = {"observation": "tool", "function": "assistant"}.get(message["role"], message["role"])
        chat.append({"role": role, "content": message["content"]})
        if message["role"] == "function":
            found = json.loads(message["content"])
            chat[-1] |= {"content": "", "tool_calls": [{"function": call} for call in (found if isinstance(found, list) else [found])]}
    options = {"tools": WRAPPED if tools else None, "tokenize": True, "return_dict": True, **options}
    return list(tokenizer.apply_chat_template(chat, **options)["input_ids"])


def joined(pairs: list[tuple[list[int], list[int]]]) -> list[int]:
    return [index for pair in pairs for side in pair for index in side]


@pytest.mark.parametrize("tools", ["", TOOLS], ids=["no tools", "tools"])
@pytest.mark.parametrize("system", ["", "You are kind."], ids=["no system", "system"])
@pytest.mark.parametrize("talk", TALKS)
def test_qwen_templates_equal_the_tokenizers_own(talk: str, system: str, tools: str) -> None:
    """Qwen2.5 (``qwen_lf``): all ids. Qwen3: every prompt; training adds the empty thought to earlier answers too, and only that."""
    tokenizer, template, messages = tokenizer_of("qwen2.5"), load_template("qwen_lf"), TALKS[talk]
    assert joined(template.encode_conversation(tokenizer, messages, system, tools)) == theirs(tokenizer, messages, system, tools)

    tokenizer, template = tokenizer_of("qwen3"), load_template("qwen3")
    for end in range(1, len(messages), 2):
        for mode in (True, False):
            asked = theirs(tokenizer, messages[:end], system, tools, add_generation_prompt=True, enable_thinking=mode)
            assert template.encode_prompt(tokenizer, messages[:end], system, str(mode).lower(), tools) == asked
    pairs = template.encode_conversation(tokenizer, messages, system, tools)
    block = tokenizer.encode(template.empty_thought, add_special_tokens=False)
    assert all(source[-len(block) :] == block for source, _ in pairs)
    plain = [(source[: -len(block)], target) for source, target in pairs[:-1]] + pairs[-1:]
    assert joined(plain) == theirs(tokenizer, messages, system, tools)


LLAMA31_HEADER = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"


@pytest.mark.parametrize("system", ["", "You are kind."], ids=["no system", "system"])
@pytest.mark.parametrize("talk", ["one turn", "three turns"])
def test_llama3_is_llama_3_0_and_lacks_the_dates_of_3_1(talk: str, system: str) -> None:
    """The peer's ``llama3``: no dates, and no system block for an empty text. Calls of tools have the default format."""
    tokenizer, messages = tokenizer_of("llama3"), TALKS[talk]
    ours = tokenizer.decode(joined(load_template("llama3").encode_conversation(tokenizer, messages, system)))
    expected = tokenizer.decode(theirs(tokenizer, messages, system, "")).replace(LLAMA31_HEADER, "")
    assert ours == expected.replace("<|start_header_id|>system<|end_header_id|>\n\n<|eot_id|>", "")
    prompt = tokenizer.decode(load_template("llama3").encode_prompt(tokenizer, TALKS["a call"][:3], system, tools=TOOLS))
    assert "Action: get_weather\nAction Input:" in prompt and "<|start_header_id|>tool<|end_header_id|>" in prompt
    assert ChatTemplate.of(tokenizer).encode_prompt(tokenizer, TALKS["a call"][:3], system, tools=TOOLS) == theirs(
        tokenizer, TALKS["a call"][:3], system, TOOLS, add_generation_prompt=True
    )


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ("[{]", "the tools are no JSON"),
        ("3", "the tools are no list of objects with a name each"),
        ('[{"description": "d"}]', "the tools are no list of objects with a name each"),
        ('[{"name": "f", "parameters": [1]}]', "the parameters of tool f are no JSON schema of an object"),
        ('[{"name": "f", "parameters": {"properties": {"x": "text"}}}]', "the parameters of tool f are no JSON schema"),
    ],
)
def test_tools_that_cannot_be_read(tools: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_template("qwen3").render(TALKS["one turn"], "", "none", tools)
    assert parse_tools('{"name": "f"}') == ({"name": "f"},)  # one tool without a list


@pytest.mark.parametrize("call", ["", "text", "[]", "3", '{"name": "f"}', '{"name": 3, "arguments": {}}', '["f"]', '{"arguments": {}}'])
def test_calls_that_cannot_be_read(call: str) -> None:
    with pytest.raises(DataError, match="a function call is no JSON of"):
        Template("t").render([user("a"), {"role": "function", "content": call}])
