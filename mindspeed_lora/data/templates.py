"""Chat templates by name: how a conversation becomes pieces of text, and which of them are trained.

A template is data (``templates.json`` beside this file, ``configs/finetune/templates.json`` in a checkout, in the peer's
schema; ``--prompt-type-path`` names another file). rendering.py says what the pieces are, tools.py how tools are written.

Source: formats.md 3.3 and 3.4 (MindSpeed-LLM v26.0.0, itself after LLaMA-Factory 0.8.2 and 0.9.4).
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindspeed_lora.data.cutting import CutRule
from mindspeed_lora.data.rendering import (
    ConversationTemplate,
    Element,
    ElementEncoder,
    Message,
    Special,
    Token,
    Turn,
    check_alternation,
    missing_tokens,
    split_system,
)
from mindspeed_lora.data.tools import TOOL_FORMATS, describe_tools, parse_calls, write_calls
from mindspeed_lora.errors import DataError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ElementEncoder", "Message", "Template", "Token", "Turn", "load_template", "split_system", "template_from_entry"]

TEMPLATES_PATH = Path(__file__).with_name("templates.json")
DEFAULT_THOUGHT_WORDS = ("<think>\n", "\n</think>\n\n")
TEMPLATE_CLASSES = ("Template", "Llama2Template", "LFDefaultTemplate", "ReasoningTemplate")

_CONTENT: tuple[Element, ...] = ("{{content}}",)
_EOS = Special("eos_token")
_MARKER = re.compile(r"<[|｜][^<>|｜\s]+[|｜]>|<(?:start|end)_of_turn>|<reserved_\d+>|\[gMASK\]|<sop>")


@dataclass(frozen=True)
class Template(ConversationTemplate):
    """One entry of a templates file; see the module for what the parts mean.

    ``template_class``: Llama2Template puts the system text inside the first user text; ReasoningTemplate knows thinking;
    the last two of TEMPLATE_CLASSES cut long records by the newer rule. ``efficient_eos``: one eos at the end of the
    conversation instead of one a turn. ``call_format``, ``tool_format``: names in TOOL_FORMATS, for calls and descriptions.
    """

    name: str
    user: tuple[Element, ...] = _CONTENT
    assistant: tuple[Element, ...] = (*_CONTENT, _EOS)
    system: tuple[Element, ...] = _CONTENT
    function: tuple[Element, ...] = (*_CONTENT, _EOS)  # of {{content}}, or of {{name}} and {{arguments}} of a single call
    observation: tuple[Element, ...] = _CONTENT
    separator: tuple[Element, ...] = ()
    prefix: tuple[Element, ...] = ()
    default_system: str = ""
    stop_words: tuple[str, ...] = ()
    thought_words: tuple[str, str] = DEFAULT_THOUGHT_WORDS
    efficient_eos: bool = False
    replace_eos: bool = False  # the first stop word is what the family's chat models end an answer with
    call_format: str = "default"
    tool_format: str = "default"
    template_class: str = "Template"

    @property
    def has_thinking(self) -> bool:
        """Whether ``--enable-thinking true|false`` means anything here."""
        return self.template_class == "ReasoningTemplate"

    @property
    def cut_rule(self) -> CutRule:
        """How records longer than ``--seq-length`` are cut."""
        return "halves" if self.template_class in ("LFDefaultTemplate", "ReasoningTemplate") else "proportional"

    @property
    def has_stop(self) -> bool:
        """Whether an answer ends in a stop token by this template's own form."""
        tail = "".join(element for element in self.assistant if isinstance(element, str)).split("{{content}}")[-1]
        return self.efficient_eos or _EOS in self.assistant or any(word in tail for word in self.stop_words)

    @property
    def eos_stands_for(self) -> str | None:
        """What the family's chat models end an answer with, where this template writes the tokenizer's eos for it."""
        return self.stop_words[0] if self.replace_eos and self.stop_words and _EOS in self.assistant else None

    def fingerprint(self) -> str:
        """SHA-256 (hex) of all that makes the text."""
        fields = {key: value for key, value in asdict(self).items() if key not in ("name", "replace_eos")}
        return hashlib.sha256(json.dumps(fields, sort_keys=True, ensure_ascii=False).encode()).hexdigest()

    def stop_token_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Sorted ids that end an answer: the tokenizer's eos and the stop words that are one token of its vocabulary."""
        stops = set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
        vocabulary = tokenizer.get_vocab() if self.stop_words else {}
        return sorted(stops | {vocabulary[word] for word in self.stop_words if word in vocabulary})

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """See that the marks of roles and ends are tokens, not text in pieces, and that an answer can end.

        Raises:
            UsageError: with the tokens that are missing, or with what would end an answer.
        """
        needed: list[str] = list(self.stop_words)
        for element in (*self.prefix, *self.system, *self.user, *self.assistant, *self.function, *self.observation, *self.separator):
            needed += [element.token] if isinstance(element, Token) else _MARKER.findall(element) if isinstance(element, str) else []
        vocabulary = tokenizer.get_vocab()
        missing = [token for token in dict.fromkeys(needed) if token not in vocabulary]
        if missing:
            raise missing_tokens(self.name, missing, tokenizer)
        if tokenizer.eos_token_id is None and (self.efficient_eos or _EOS in self.assistant):
            raise UsageError(
                f"--prompt-type {self.name} ends an answer with the eos token, and the tokenizer at {tokenizer.name_or_path} has none; "
                "set eos_token in its tokenizer_config.json"
            )

    def render(self, messages: Sequence[Message], system: str | None = None, thinking: str = "none", tools: str = "") -> list[Turn]:
        """The elements of each turn; all answers are to be trained.

        Thinking, for a turn without thought words: ``true`` puts an empty thought into the target, ``false`` and ``none``
        into the source; ``false`` also removes the thoughts there are.

        Raises:
            DataError: roles out of turn, an odd number of messages, or tools or calls that cannot be read.
        """
        check_alternation(messages)
        system = self._system_text(system, tools)
        return [self._turn(messages[number], messages[number + 1], number // 2, system, thinking) for number in range(0, len(messages), 2)]

    def render_last(self, messages: Sequence[Message], system: str | None = None, thinking: str = "none", tools: str = "") -> Turn:
        """The prompt before the last answer, and that answer.

        Thoughts of answers before the last user's message are removed: a model does not see them again. Those after it, of
        calls whose result the model still waits for, are kept.

        Raises:
            DataError: as :meth:`render`.
        """
        check_alternation(messages)
        system = self._system_text(system, tools)
        asked = max((number for number, message in enumerate(messages) if message["role"] == "user"), default=0)
        prompt: list[Element] = []
        for number in range(0, len(messages) - 2, 2):
            prompt += self._source(messages[number], number // 2, system)
            text = messages[number + 1]["content"]
            prompt += self._target(
                messages[number + 1]["role"], self.remove_thought(text) if self.has_thinking and number + 1 < asked else text
            )
        source, target = self._turn(messages[-2], messages[-1], len(messages) // 2 - 1, system, thinking)
        return (*prompt, *source), target

    def _system_text(self, system: str | None, tools: str) -> str:
        system = system or self.default_system
        description = describe_tools(self.tool_format, tools) if tools else ""
        return system + TOOL_FORMATS[self.tool_format].gap + description if system and description else system + description

    def _turn(self, question: Message, answer: Message, number: int, system: str, thinking: str) -> Turn:
        text = answer["content"]
        if thinking == "false":
            text = self.remove_thought(text)
        source, target = self._source(question, number, system), self._target(answer["role"], text)
        if not self.has_thinking or self.has_thought(text):
            return source, target
        return (source, (self.empty_thought, *target)) if thinking == "true" else ((*source, self.empty_thought), target)

    def _source(self, message: Message, number: int, system: str) -> tuple[Element, ...]:
        """The elements before the answer of turn ``number`` (from 0)."""
        elements: tuple[Element, ...] = self.prefix
        if number:
            elements = () if self.template_class == "LFDefaultTemplate" else self.separator
        content = message["content"]
        values = {"idx": str(number)}
        if self.template_class == "Llama2Template":
            values = {}
            if system and number == 0:
                content = str(_fill(self.system, content=system)[0]) + content
        elif system and number == 0:
            elements += _fill(self.system, content=system)
        if message["role"] == "user":
            return elements + _fill(self.user, content=content, **values)
        return elements + _fill(self.observation, content=content)

    def _target(self, role: str, text: str) -> tuple[Element, ...]:
        if role != "function":
            return _fill(self.assistant, content=text)
        end = self.thought_words[1].strip()
        thought, _, rest = text.rpartition(end)
        calls = parse_calls(rest)
        if thought:
            thought += end + rest[: len(rest) - len(rest.lstrip())]
        if not _is_call_form(self.function):
            return _fill(self.function, content=thought + write_calls(self.call_format, calls))
        if len(calls) > 1:
            raise DataError(f"{len(calls)} function calls in one turn, and template {self.name} has room for one")
        arguments = json.dumps(calls[0].arguments, ensure_ascii=False)
        return ((thought,) if thought else ()) + _fill(self.function, name=calls[0].name, arguments=arguments)

    @property
    def empty_thought(self) -> str:
        """The text that stands for "no thinking"."""
        return "".join(self.thought_words)

    def has_thought(self, text: str) -> bool:
        """Whether a thought word stands in ``text``."""
        return any(word.strip() in text for word in self.thought_words)

    def remove_thought(self, text: str) -> str:
        """``text`` without its thoughts and without the newlines before what remains."""
        start, end = (word.strip() for word in self.thought_words)
        tail = re.escape(self.thought_words[1][len(self.thought_words[1].rstrip()) :])
        return re.sub(f"{re.escape(start)}.*?{re.escape(end)}(?:{tail})?", "", text, flags=re.DOTALL).lstrip("\n")


def _fill(form: tuple[Element, ...], **values: str) -> tuple[Element, ...]:
    """Replace the first {{name}} of each text for each of ``values`` in turn; empty texts are left out."""
    filled: list[Element] = []
    for element in form:
        if isinstance(element, str):
            for name, value in values.items():
                element = element.replace("{{" + name + "}}", value, 1)
        if element != "":
            filled.append(element)
    return tuple(filled)


def _has(form: tuple[Element, ...], *names: str) -> bool:
    return all(any(isinstance(element, str) and "{{" + name + "}}" in element for element in form) for name in names)


def _is_call_form(form: tuple[Element, ...]) -> bool:
    return _has(form, "name", "arguments")


def load_template(name: str | None, path: Path | None = None) -> Template:
    """The template ``name`` from ``path`` (default: the project's own).

    Raises:
        UsageError: no name, no such file or entry, no JSON, or an entry that cannot be read.
    """
    source = Path(path) if path is not None else TEMPLATES_PATH
    flag = f"--prompt-type-path {source}"
    if not source.is_file():
        raise UsageError(f"{flag}: no such file; leave the flag out to use {TEMPLATES_PATH}")
    try:
        entries = {entry["name"]: entry for entry in json.loads(source.read_text(encoding="utf-8"))}
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{flag}: not a JSON list of templates with a name each ({error})") from error
    if name is None or name not in entries:
        near = difflib.get_close_matches(name or "", entries, 3, 0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        given = name or "is missing"
        raise UsageError(f"--prompt-type {given}: {hint}{source} has the templates {', '.join(sorted(entries))}; give one of them")
    return template_from_entry(entries[name], flag)


_FORMS = ("user", "assistant", "system", "function", "observation", "separator", "prefix")
_KEYS = {
    *("name", "default_system", "stop_words", "thought_words", "efficient_eos", "replace_eos", "force_system", "template_class"),
    *("format_tools", *(f"format_{form}" for form in _FORMS)),
}


def template_from_entry(entry: Mapping[str, Any], where: str) -> Template:
    """Read one entry in the peer's schema. ``force_system`` is read by nobody, the peer included.

    Raises:
        UsageError: an unknown key, class or tool format, or a field of another shape than the schema's.
    """
    name, where = entry["name"], f"{where}: template {entry['name']!r}"
    for key in entry.keys() - _KEYS:
        near = difflib.get_close_matches(key, _KEYS, 1)
        raise UsageError(f"{where}: unknown key {key!r}; {f'did you mean {near[0]}?' if near else 'known are ' + ', '.join(sorted(_KEYS))}")
    kind = entry.get("template_class") or "Template"
    if kind not in TEMPLATE_CLASSES:
        raise UsageError(f"{where} has template_class {kind!r}; known are {', '.join(TEMPLATE_CLASSES)}")
    efficient = bool(entry.get("efficient_eos", False))
    answer = _CONTENT if efficient else (*_CONTENT, _EOS)
    user = _slots(entry, "format_user", _CONTENT, where)
    tool_format = _tool_format(entry, "format_tools", "default", where)
    system, words, stops = _texts(entry, where)
    return Template(
        name=name,
        user=user,
        assistant=_slots(entry, "format_assistant", answer, where),
        system=_slots(entry, "format_system", _CONTENT, where),
        function=_slots(entry, "format_function", answer, where),
        observation=_slots(entry, "format_observation", user, where),
        separator=_slots(entry, "format_separator", (), where),
        prefix=_slots(entry, "format_prefix", (), where),
        default_system=system,
        stop_words=stops,
        thought_words=(words[0], words[1]),
        efficient_eos=efficient,
        replace_eos=bool(entry.get("replace_eos", False)),
        call_format=_tool_format(entry, "format_function", tool_format, where),
        tool_format=tool_format,
        template_class=kind,
    )


def _texts(entry: Mapping[str, Any], where: str) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """Default system text (a list is joined), thought words, stop words."""
    system = entry.get("default_system") or ""
    lines = [system] if isinstance(system, str) else system
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise UsageError(f"{where}: default_system is {system!r}; give a text, or a list of texts that are joined")
    words, stops = entry.get("thought_words") or DEFAULT_THOUGHT_WORDS, entry.get("stop_words") or ()
    if len(words) != 2 or not all(isinstance(word, str) and word.strip() for word in words):
        raise UsageError(f"{where}: thought_words must be two texts, the beginning and the end of a thought, but are {words!r}")
    if isinstance(stops, str) or not all(isinstance(word, str) and word for word in stops):
        raise UsageError(f"{where}: stop_words must be a list of texts, but is {stops!r}")
    return "".join(lines), tuple(words), tuple(stops)


def _tool_format(entry: Mapping[str, Any], key: str, default: str, where: str) -> str:
    name = (entry.get(key) or {}).get("tool_format") or default
    if name not in TOOL_FORMATS:
        raise UsageError(f"{where}: {key} has the tool_format {name!r}; known are {', '.join(TOOL_FORMATS)}")
    return str(name)


def _slots(entry: Mapping[str, Any], key: str, default: tuple[Element, ...], where: str) -> tuple[Element, ...]:
    form = entry.get(key)
    if not form or not form.get("slots"):
        return default
    elements: list[Element] = []
    for slot in form["slots"]:
        if isinstance(slot, str):
            elements.append(slot)
        elif isinstance(slot, dict) and isinstance(slot.get("token"), str):
            elements.append(Token(slot["token"]))
        elif isinstance(slot, list) and len(slot) == 1 and slot[0] in ("bos_token", "eos_token"):
            elements.append(Special(slot[0]))
        else:
            raise UsageError(f'{where}: {key} has the slot {slot!r}; a slot is a text, {{"token": ...}}, ["bos_token"] or ["eos_token"]')
    found = tuple(elements)
    if key in ("format_separator", "format_prefix"):
        if _has(found, "content"):
            raise UsageError(f"{where}: {key} has {{{{content}}}}, but nothing is put there; it stands before the text")
    elif not _has(found, "content") and not (key == "format_function" and _is_call_form(found)):
        either = " (or {{name}} and {{arguments}})" if key == "format_function" else ""
        raise UsageError(f"{where}: no slot of {key} has {{{{content}}}}{either}, so that the text would be lost")
    return found
