"""Tools: how a template describes them to the model, and how it writes a call of one.

A record brings the tools as JSON (``[{"name", "description", "parameters": {JSON schema}}, ...]``, each also in OpenAI's
``{"type": "function", "function": ...}``) and a call as JSON (``{"name", "arguments"}`` or a list of them). A *tool format*
makes text of both; the description stands at the end of the system text.

Source of the texts: the chat templates of the models (qwen: Qwen2.5 and Qwen3, hermes; ling: Ling 2; llama3: Llama 3.1 with
its tools in the system text; mistral: Mistral 7B v0.3; glm4: GLM-4; glm4_moe: GLM-4.5), and for ``default`` MindSpeed-LLM.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from mindspeed_lora.errors import DataError

Tool = Mapping[str, Any]  # name, description, parameters

_SIGNATURES = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>{tools}\n</tools>\n\n"
)
_HERMES = _SIGNATURES + (
    "For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:\n"
    '<tool_call>\n{{"name": <function-name>, "arguments": <args-json-object>}}\n</tool_call>'
)
_GLM4_MOE = _SIGNATURES + (
    "For each function call, output the function name and arguments within the following XML format:\n"
    "<tool_call>{{function-name}}\n<arg_key>{{arg-key-1}}</arg_key>\n<arg_value>{{arg-value-1}}</arg_value>\n"
    "<arg_key>{{arg-key-2}}</arg_key>\n<arg_value>{{arg-value-2}}</arg_value>\n...\n</tool_call>"
)
_GLM4 = (
    "你是一个名为 ChatGLM 的人工智能助手。你是基于智谱 AI 公司训练的语言模型 GLM-4 模型开发的，"
    "你的任务是针对用户的问题和要求提供适当的答复和支持。\n\n# 可用工具"
)
_LLAMA3 = (
    "You have access to the following functions. To call a function, please respond with JSON for a function call."
    'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.'
    "Do not use variables.\n\n"
)
_DEFAULT_USE = (
    "Use the following format if using a tool:\n```\nAction: tool name (one of [{names}]).\nAction Input: the input to the tool, "
    'in a JSON format representing the kwargs (e.g. ```{{"input": "hello world", "num_beams": 5}}```).\n```\n'
)


@dataclass(frozen=True)
class Call:
    """One call of a tool."""

    name: str
    arguments: Any  # of JSON, usually an object


@dataclass(frozen=True)
class ToolFormat:
    """``describe`` and ``write`` make the texts; ``gap`` stands between a system text and the description."""

    describe: Callable[[Sequence[Tool]], str]
    write: Callable[[Sequence[Call]], str]
    gap: str = ""
    single: bool = False  # one call a turn


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _wrapped(tool: Tool) -> dict[str, Any]:
    return {"type": "function", "function": tool}


def _lines(form: str) -> Callable[[Sequence[Tool]], str]:
    return lambda tools: form.format(tools="".join("\n" + _json(_wrapped(tool)) for tool in tools))


def _describe_default(tools: Sequence[Tool]) -> str:
    text = "You have access to the following tools:\n"
    for tool in tools:
        schema = tool.get("parameters") or {}
        text += f"> Tool Name: {tool['name']}\nTool Description: {tool.get('description', '')}\nTool Args:\n"
        for name, value in (schema.get("properties") or {}).items():
            required = ", required" if name in (schema.get("required") or ()) else ""
            choices = f", should be one of [{', '.join(map(str, value['enum']))}]" if value.get("enum") else ""
            items = f", where each item should be {value['items'].get('type', '')}" if value.get("items") else ""
            text += f"  - {name} ({value.get('type', '')}{required}): {value.get('description', '')}{choices}{items}\n"
        text += "\n"
    return text + _DEFAULT_USE.format(names=", ".join(tool["name"] for tool in tools))


def _describe_glm4(tools: Sequence[Tool]) -> str:
    use = "在调用上述函数时，请使用 Json 格式表示调用的参数。"
    return _GLM4 + "".join(f"\n\n## {tool['name']}\n\n{_json(tool, 4)}\n{use}" for tool in tools)


def _write_glm4_moe(calls: Sequence[Call]) -> str:
    text = ""
    for call in calls:
        pairs = call.arguments.items() if isinstance(call.arguments, Mapping) else ()
        values = ((key, value if isinstance(value, str) else _json(value)) for key, value in pairs)
        text += f"\n<tool_call>{call.name}\n"
        text += "".join(f"<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n" for key, value in values) + "</tool_call>"
    return text


def _objects(calls: Sequence[Call], key: str = "arguments") -> list[str]:
    return [_json({"name": call.name, key: call.arguments}) for call in calls]


def _write_hermes(calls: Sequence[Call]) -> str:
    return "\n".join(f"<tool_call>\n{text}\n</tool_call>" for text in _objects(calls))


def _write_actions(calls: Sequence[Call]) -> str:
    return "\n".join(f"Action: {call.name}\nAction Input: {_json(call.arguments)}" for call in calls)


_QWEN = ToolFormat(_lines(_HERMES), _write_hermes, gap="\n\n")
TOOL_FORMATS: Mapping[str, ToolFormat] = {
    "default": ToolFormat(_describe_default, _write_actions),
    "qwen": _QWEN,
    "qwen3": _QWEN,
    "ling": ToolFormat(lambda tools: _lines(_HERMES)(tools) + "\ndetailed thinking off", _write_hermes, gap="\n\n"),
    "llama3": ToolFormat(
        lambda tools: _LLAMA3 + "".join(_json(_wrapped(tool), 4) + "\n\n" for tool in tools),
        lambda calls: _objects(calls, "parameters")[0],
        gap="\n\n",
        single=True,
    ),
    "mistral": ToolFormat(
        lambda tools: f"[AVAILABLE_TOOLS] {_json([_wrapped(tool) for tool in tools])}[/AVAILABLE_TOOLS]",
        lambda calls: f"[{', '.join(_objects(calls))}]",  # [TOOL_CALLS] is the template's
    ),
    "glm4": ToolFormat(_describe_glm4, lambda calls: f"{calls[0].name}\n{_json(calls[0].arguments)}", gap="\n\n", single=True),
    "glm4_moe": ToolFormat(_lines(_GLM4_MOE), _write_glm4_moe, gap="\n\n"),
}


@lru_cache(maxsize=1024)  # records of one file share few lists of tools
def parse_tools(text: str) -> tuple[Tool, ...]:
    """The tools of a record, unwrapped; none for an empty text or list.

    Raises:
        DataError: no JSON list of objects with a name each, or parameters that are no JSON schema of an object.
    """
    if not text.strip():
        return ()
    try:
        value = json.loads(text)
    except ValueError as error:
        raise DataError("the tools are no JSON") from error
    tools = value if isinstance(value, list) else [value]
    tools = [tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else tool for tool in tools]
    if not all(isinstance(tool, dict) and isinstance(tool.get("name"), str) for tool in tools):
        raise DataError("the tools are no list of objects with a name each")
    for tool in tools:
        schema = tool.get("parameters") or {}
        properties = (schema.get("properties") or {}) if isinstance(schema, dict) else None
        if not isinstance(properties, dict) or not all(isinstance(value, dict) for value in properties.values()):
            raise DataError(f"the parameters of tool {tool['name']} are no JSON schema of an object")
    return tuple(tools)


@lru_cache(maxsize=1024)
def describe_tools(tool_format: str, text: str) -> str:
    """The text that tells the model of the tools in the JSON ``text``; empty where there are none.

    Raises:
        DataError: as :func:`parse_tools`.
    """
    tools = parse_tools(text)
    return TOOL_FORMATS[tool_format].describe(tools) if tools else ""


def parse_calls(text: str) -> list[Call]:
    """The calls of an answer that is JSON; ``arguments`` may be an object or JSON text of one (as OpenAI has it).

    Raises:
        DataError: no JSON object with name and arguments, and no list of them.
    """
    try:
        value = json.loads(text)
        return [_call(call) for call in (value if isinstance(value, list) and value else [value])]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError('a function call is no JSON of {"name": ..., "arguments": ...}, nor a list of them') from error


def _call(value: Mapping[str, Any]) -> Call:
    value = value["function"] if value.get("type") == "function" and "function" in value else value
    arguments = value["arguments"]
    if not isinstance(value["name"], str):
        raise TypeError
    return Call(value["name"], json.loads(arguments) if isinstance(arguments, str) else arguments)


def write_calls(tool_format: str, calls: Sequence[Call]) -> str:
    """The text by which the model calls tools.

    Raises:
        DataError: several calls where the format has one a turn.
    """
    chosen = TOOL_FORMATS[tool_format]
    if chosen.single and len(calls) > 1:
        raise DataError(f"{len(calls)} function calls in one turn, and the tool format {tool_format} knows one")
    return chosen.write(calls)
