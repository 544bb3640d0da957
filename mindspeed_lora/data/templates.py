"""Chat templates: how a conversation becomes pieces of text, and which of them are trained.

A template is data (``configs/finetune/templates.json``, in the peer's schema; ``--prompt-type-path`` names another file).
Every slot of a format is one *element*; each element is encoded by itself and the ids are concatenated, because byte
pair merges across elements would give other ids than the peer's.

    source (label -100): prefix, system, user      target (trained): assistant
    later turns:         separator, user                             assistant

Source: formats.md 3.3 and 3.4 (MindSpeed-LLM v26.0.0, itself after LLaMA-Factory 0.8.2 and 0.9.4).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindspeed_lora.data.cutting import CutRule, cut_turns
from mindspeed_lora.data.tokenizer import encode_texts
from mindspeed_lora.errors import DataError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATES_PATH = Path(__file__).resolve().parents[2] / "configs" / "finetune" / "templates.json"
THINKING_MODES = ("true", "false", "none")
DEFAULT_THOUGHT_WORDS = ("<think>\n", "\n</think>\n\n")
TEMPLATE_CLASSES = ("Template", "Llama2Template", "LFDefaultTemplate", "ReasoningTemplate")

Message = Mapping[str, str]  # {"role": user | assistant | observation | system, "content": text}


@dataclass(frozen=True)
class Token:
    """An element that is one token of the vocabulary, by its name."""

    token: str


@dataclass(frozen=True)
class Special:
    """An element that is the tokenizer's ``bos_token`` or ``eos_token``; nothing where the tokenizer has none."""

    name: str


Element = str | Token | Special
Turn = tuple[tuple[Element, ...], tuple[Element, ...]]  # source, target

_CONTENT: tuple[Element, ...] = ("{{content}}",)
_EOS = Special("eos_token")


@dataclass(frozen=True)
class Template:
    """One entry of a templates file; see the module for what the parts mean.

    ``template_class``: Llama2Template puts the system text inside the first user text; ReasoningTemplate knows thinking;
    the last two of TEMPLATE_CLASSES cut long records by the newer rule. ``efficient_eos``: one eos at the end of the
    conversation instead of one a turn.
    """

    name: str
    user: tuple[Element, ...] = _CONTENT
    assistant: tuple[Element, ...] = (*_CONTENT, _EOS)
    system: tuple[Element, ...] = _CONTENT
    observation: tuple[Element, ...] = _CONTENT
    separator: tuple[Element, ...] = ()
    prefix: tuple[Element, ...] = ()
    default_system: str = ""
    stop_words: tuple[str, ...] = ()
    thought_words: tuple[str, str] = DEFAULT_THOUGHT_WORDS
    efficient_eos: bool = False
    template_class: str = "Template"

    @property
    def has_thinking(self) -> bool:
        """Whether ``--enable-thinking true|false`` means anything here."""
        return self.template_class == "ReasoningTemplate"

    @property
    def cut_rule(self) -> CutRule:
        """How records longer than ``--seq-length`` are cut."""
        return "halves" if self.template_class in ("LFDefaultTemplate", "ReasoningTemplate") else "proportional"

    def fingerprint(self) -> str:
        """SHA-256 (hex) of everything but the name."""
        fields = {key: value for key, value in asdict(self).items() if key != "name"}
        return hashlib.sha256(json.dumps(fields, sort_keys=True, ensure_ascii=False).encode()).hexdigest()

    def check_thinking(self, thinking: str) -> str:
        """Return ``thinking`` if this template can do it.

        Raises:
            UsageError: an unknown mode, or true / false with a template without thinking.
        """
        if thinking not in THINKING_MODES:
            raise UsageError(f"--enable-thinking {thinking}: give one of {', '.join(THINKING_MODES)}")
        if thinking != "none" and not self.has_thinking:
            raise UsageError(
                f"--enable-thinking {thinking}: template {self.name!r} has no thinking; "
                "leave the flag out (none), or use --prompt-type qwen3"
            )
        return thinking

    def render(self, messages: Sequence[Message], system: str | None = None, thinking: str = "none") -> list[Turn]:
        """The elements of each turn of a conversation that alternates user (or observation) and assistant.

        Thinking, for a turn without thought words: ``true`` puts an empty thought into the target, ``false`` and ``none``
        into the source; ``false`` also removes the thoughts there are.

        Raises:
            DataError: an odd number of messages, or a role out of turn.
        """
        if len(messages) % 2 or not messages:
            raise DataError(f"a conversation needs pairs of user and assistant, but it has {len(messages)} messages")
        turns = []
        for number in range(len(messages) // 2):
            answer = self._content(messages[2 * number + 1], ("assistant",))
            if thinking == "false":
                answer = self.remove_thought(answer)
            source = list(self.render_source(messages[2 * number], number, system))
            target = _fill(self.assistant, content=answer)
            if self.has_thinking and not self.has_thought(answer):
                if thinking == "true":
                    target = (self.empty_thought, *target)
                else:
                    source.append(self.empty_thought)
            turns.append((tuple(source), target))
        return turns

    def render_last(self, messages: Sequence[Message], system: str | None = None, thinking: str = "none") -> Turn:
        """All that comes before the last answer as one source, and that answer as the target.

        Thoughts of earlier answers are removed; of the last one as :meth:`render` says.

        Raises:
            DataError: as :meth:`render`.
        """
        source, target = self.render(messages, system, thinking)[-1]
        return (*self._earlier_turns(messages, system), *source), target

    def _earlier_turns(self, messages: Sequence[Message], system: str | None) -> list[Element]:
        """The elements of all turns but the last, their answers without thoughts."""
        elements: list[Element] = []
        for number in range((len(messages) - 1) // 2):
            answer = self._content(messages[2 * number + 1], ("assistant",))
            elements += self.render_source(messages[2 * number], number, system)
            elements += _fill(self.assistant, content=self.remove_thought(answer) if self.has_thinking else answer)
        return elements

    def render_source(self, message: Message, number: int, system: str | None) -> tuple[Element, ...]:
        """The elements before the answer of turn ``number`` (from 0)."""
        system = system or self.default_system
        content = self._content(message, ("user", "observation"))
        elements: list[Element] = list(self.separator if number else self.prefix)
        values = {"idx": str(number)}
        if self.template_class == "Llama2Template":
            values = {}
            content = str(_fill(self.system, content=system)[0]) + content if system and number == 0 else content
        elif system and number == 0:
            elements += _fill(self.system, content=system)
        if message["role"] == "user":
            return (*elements, *_fill(self.user, content=content, **values))
        return (*elements, *_fill(self.observation, content=content))

    def _content(self, message: Message, roles: tuple[str, ...]) -> str:
        if message["role"] not in roles:
            raise DataError(f"a message has role {message['role']!r} where {' or '.join(roles)} must stand")
        return message["content"]

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

    def encode_conversation(
        self,
        tokenizer: PreTrainedTokenizerBase,
        messages: Sequence[Message],
        system: str | None = None,
        tools: str | None = None,
        thinking: str = "none",
        cutoff: int | None = None,
    ) -> list[tuple[list[int], list[int]]]:
        """(source ids, target ids) of each turn; cut to ``cutoff`` tokens in all where given. All turns are to be trained.

        Raises:
            UsageError: ``thinking`` does not fit the template, or a token of the template is not in the vocabulary.
            DataError: the conversation is malformed, or has tools.
        """
        if tools:
            raise DataError("tool descriptions are not supported by this version; leave the tools column out of --map-keys")
        system, messages = split_system(messages, system)
        encoder = ElementEncoder(tokenizer, self.name)
        turns = self.render(messages, system, self.check_thinking(thinking))
        encoder.add(element for turn in turns for side in turn for element in side)
        pairs = [(encoder.ids(source), encoder.ids(target)) for source, target in turns]
        return pairs if cutoff is None else cut_turns(pairs, cutoff, self.cut_rule)

    def encode_prompt(
        self, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], system: str | None = None, thinking: str = "none"
    ) -> list[int]:
        """Ids of a conversation up to where the model answers its last message (a user's or an observation).

        Thoughts of earlier answers are removed. With ``none`` and ``false`` the empty thought is part of the prompt, with
        ``true`` the model writes its own.

        Raises:
            UsageError, DataError: as encode_conversation.
        """
        thinking = self.check_thinking(thinking)
        system, messages = split_system(messages, system)
        if len(messages) % 2 == 0:
            raise DataError(
                f"a prompt must end with a user's message, but it has {len(messages)} messages; drop the last or add a question"
            )
        elements = self._earlier_turns(messages, system)
        elements += self.render_source(messages[-1], len(messages) // 2, system)
        if self.has_thinking and thinking != "true":
            elements.append(self.empty_thought)
        encoder = ElementEncoder(tokenizer, self.name)
        encoder.add(elements)
        return encoder.ids(elements)

    def stop_token_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Sorted ids that end an answer: the tokenizer's eos and the stop words that are one token of its vocabulary."""
        stops = set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
        vocabulary = tokenizer.get_vocab() if self.stop_words else {}
        return sorted(stops | {vocabulary[word] for word in self.stop_words if word in vocabulary})

    @property
    def has_stop(self) -> bool:
        """Whether an answer ends in a stop token by this template's own form."""
        tail = "".join(element for element in self.assistant if isinstance(element, str)).split("{{content}}")[-1]
        return self.efficient_eos or _EOS in self.assistant or any(word in tail for word in self.stop_words)


class ElementEncoder:
    """Token ids of elements: :meth:`add` encodes new ones in one call, :meth:`ids` concatenates."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template_name: str) -> None:
        self.tokenizer = tokenizer
        self._template_name = template_name
        self._ids: dict[Element, list[int]] = {}

    def add(self, elements: Any) -> None:
        """Encode those of ``elements`` (an iterable) that are not known yet."""
        new = [element for element in dict.fromkeys(elements) if element not in self._ids]
        texts = [element for element in new if isinstance(element, str)]
        self._ids.update(zip(texts, encode_texts(self.tokenizer, texts), strict=True))
        self._ids.update((element, self._single(element)) for element in new if not isinstance(element, str))

    def ids(self, elements: Sequence[Element]) -> list[int]:
        """Concatenated ids of ``elements``, all of them added before."""
        return [index for element in elements for index in self._ids[element]]

    def _single(self, element: Token | Special) -> list[int]:
        if isinstance(element, Special):
            index = self.tokenizer.bos_token_id if element.name == "bos_token" else self.tokenizer.eos_token_id
            return [] if index is None else [int(index)]
        index = self.tokenizer.get_vocab().get(element.token)
        if index is None:
            raise UsageError(
                f"--prompt-type {self._template_name} needs the token {element.token!r}, "
                f"which the tokenizer at {self.tokenizer.name_or_path} lacks"
            )
        return [int(index)]


def split_system(messages: Sequence[Message], system: str | None) -> tuple[str | None, Sequence[Message]]:
    """Take a leading system message out of ``messages``; it wins over ``system``."""
    if messages and messages[0]["role"] == "system":
        return messages[0]["content"], messages[1:]
    return system, messages


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


def load_template(name: str | None, path: Path | None = None) -> Template:
    """The template ``name`` from ``path`` (default: configs/finetune/templates.json).

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
        raise UsageError(
            f"--prompt-type {name if name else 'is missing'}: {source} has the templates {', '.join(sorted(entries))}; give one of them"
        )
    return template_from_entry(entries[name], flag)


def template_from_entry(entry: Mapping[str, Any], where: str) -> Template:
    """Read one entry in the peer's schema; keys that only its tool calls or its tokenizer changes use are ignored.

    Raises:
        UsageError: a field has another shape than the schema's, or ``template_class`` is unknown.
    """
    name = entry["name"]
    kind = entry.get("template_class") or "Template"
    if kind not in TEMPLATE_CLASSES:
        raise UsageError(f"{where}: template {name!r} has template_class {kind!r}; known are {', '.join(TEMPLATE_CLASSES)}")
    efficient = bool(entry.get("efficient_eos", False))
    default_system = entry.get("default_system") or ""
    words = tuple(entry.get("thought_words") or DEFAULT_THOUGHT_WORDS)
    stops = tuple(entry.get("stop_words") or ())
    if (
        len(words) != 2
        or not all(isinstance(word, str) and word.strip() for word in words)
        or not all(isinstance(word, str) for word in stops)
    ):
        raise UsageError(f"{where}: template {name!r}: thought_words must be two texts and stop_words a list of texts")
    user = _slots(entry, "format_user", _CONTENT, where)
    return Template(
        name=name,
        user=user,
        assistant=_slots(entry, "format_assistant", _CONTENT if efficient else (*_CONTENT, _EOS), where),
        system=_slots(entry, "format_system", _CONTENT, where),
        observation=_slots(entry, "format_observation", user, where),
        separator=_slots(entry, "format_separator", (), where),
        prefix=_slots(entry, "format_prefix", (), where),
        default_system="".join(default_system),
        stop_words=stops,
        thought_words=(words[0], words[1]),
        efficient_eos=efficient,
        template_class=kind,
    )


def _slots(entry: Mapping[str, Any], key: str, default: tuple[Element, ...], where: str) -> tuple[Element, ...]:
    form = entry.get(key)
    if not form:
        return default
    elements: list[Element] = []
    for slot in form.get("slots") or ():
        if isinstance(slot, str):
            elements.append(slot)
        elif isinstance(slot, dict) and isinstance(slot.get("token"), str):
            elements.append(Token(slot["token"]))
        elif isinstance(slot, list) and len(slot) == 1 and slot[0] in ("bos_token", "eos_token"):
            elements.append(Special(slot[0]))
        else:
            raise UsageError(
                f"{where}: template {entry['name']!r}: {key} has the slot {slot!r}; "
                'a slot is a text, {"token": ...}, ["bos_token"] or ["eos_token"]'
            )
    return tuple(elements)
