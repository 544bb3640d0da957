"""``--hf-chat-template``: the tokenizer's own chat template (Jinja) as a form of conversation.

Which tokens an answer has is known in two ways:

* the template says so with ``{% generation %}``: transformers' own assistant mask, over the ids of the whole text;
* else by prefixes. P(k) is the text up to where answer k begins (``add_generation_prompt``), F(k) the text up to where it ends:

      F(k-1) [not trained] P(k) [trained] F(k) ...

  P(k) must be a beginning of F(k), and F(k) of the whole text. A template that rewrites an earlier answer once a turn follows
  (Qwen3 removes thoughts) breaks this for that answer: it stays in the text and is not trained. The last answer must hold.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from mindspeed_lora.arguments.configs import TemplateFlags
from mindspeed_lora.data.cutting import CutRule
from mindspeed_lora.data.rendering import ConversationTemplate, Message, Turn, check_alternation
from mindspeed_lora.data.templates import load_template
from mindspeed_lora.data.tools import parse_calls, parse_tools
from mindspeed_lora.errors import DataError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HF_CHAT_TEMPLATE = "hf-chat-template"  # the name in manifests
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_THOUGHT_END = "</think>"
_PROBE: list[dict[str, Any]] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@dataclass(frozen=True)
class ChatTemplate(ConversationTemplate):
    """The chat template of ``tokenizer``; made by :meth:`of`."""

    tokenizer: PreTrainedTokenizerBase
    name = HF_CHAT_TEMPLATE
    efficient_eos = False

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
        """Raises UsageError where the tokenizer has no chat template."""
        if not tokenizer.chat_template:
            raise UsageError(f"--hf-chat-template: the tokenizer at {tokenizer.name_or_path} has no chat template; use --prompt-type")
        return cls(tokenizer)

    @property
    def source(self) -> str:
        """The Jinja text; where the tokenizer has several, the default one."""
        templates = self.tokenizer.chat_template
        return str(templates.get("default", "") if isinstance(templates, Mapping) else templates)

    @property
    def has_thinking(self) -> bool:
        """Whether the template reads ``enable_thinking``."""
        return "enable_thinking" in self.source

    @property
    def cut_rule(self) -> CutRule:
        """The newer of the two."""
        return "halves"

    @property
    def has_stop(self) -> bool:
        """Whether an answer ends in the eos token."""
        eos = self.tokenizer.eos_token
        return eos is not None and self._text(_PROBE, [], "none").rstrip().endswith(str(eos))

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the Jinja text."""
        return hashlib.sha256(self.source.encode()).hexdigest()

    def stop_token_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """The eos token."""
        return [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Template and tokenizer come together; see that the template can render a question and an answer to train.

        Raises:
            UsageError: it cannot.
        """
        try:
            self.render(_PROBE)
        except DataError as error:
            raise UsageError(
                f"--hf-chat-template: the chat template of the tokenizer at {tokenizer.name_or_path} cannot be trained with: {error}; "
                "use --prompt-type"
            ) from error

    def render(self, messages: Sequence[Message], system: str | None = None, thinking: str = "none", tools: str = "") -> list[Turn]:
        """The turns whose answers can be trained, with all that stands before each answer.

        Raises:
            DataError: roles out of turn, tools or calls that cannot be read, a conversation that the template refuses, or a last
                answer that does not begin where the model would be asked for it.
        """
        check_alternation(messages)
        chat, described = _chat(messages, system), _described(tools)
        if _GENERATION.search(self.source):
            return self._by_mask(chat, described, thinking)
        first = len(chat) - len(messages)
        whole = self._text(chat, described, thinking)
        turns: list[Turn] = []
        start = 0
        for end in range(first + 2, len(chat) + 1, 2):
            asked = self._text(chat[: end - 1], described, thinking, ask=True)
            answered = whole if end == len(chat) else self._text(chat[:end], described, thinking)
            if whole.startswith(answered) and answered.startswith(asked) and len(asked) >= start:
                turns.append(((whole[start : len(asked)],), (answered[len(asked) :],)))
                start = len(answered)
            elif end == len(chat):
                raise DataError("the chat template writes the last answer in another place than where it asks for it")
        return turns

    def render_last(self, messages: Sequence[Message], system: str | None = None, thinking: str = "none", tools: str = "") -> Turn:
        """The prompt before the last answer, and that answer.

        Raises:
            DataError: as :meth:`render`.
        """
        check_alternation(messages)
        chat, described = _chat(messages, system), _described(tools)
        asked = self._text(chat[:-1], described, thinking, ask=True)
        whole = self._text(chat, described, thinking)
        if not whole.startswith(asked):
            if messages[-1]["content"]:
                raise DataError("the chat template writes the last answer in another place than where it asks for it")
            whole = asked
        return (asked,), (whole[len(asked) :],)

    def _by_mask(self, chat: list[dict[str, Any]], tools: list[dict[str, Any]], thinking: str) -> list[Turn]:
        encoded = self._apply(chat, tools, thinking, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        runs = [
            (trained, tuple(index for _, index in run))
            for trained, run in groupby(zip(encoded["assistant_masks"], encoded["input_ids"], strict=True), key=lambda pair: pair[0])
        ]
        if not any(trained for trained, _ in runs):
            raise DataError("the chat template has {% generation %}, and marks no answer of this conversation with it")
        turns: list[Turn] = []
        before: tuple[int, ...] = ()
        for trained, ids in runs:
            if trained:
                turns.append(((before,), (ids,)))
            before = () if trained else ids
        return [*turns, ((before,), ())] if before else turns

    def _text(self, chat: list[dict[str, Any]], tools: list[dict[str, Any]], thinking: str, ask: bool = False) -> str:
        return str(self._apply(chat, tools, thinking, tokenize=False, add_generation_prompt=ask))

    def _apply(self, chat: list[dict[str, Any]], tools: list[dict[str, Any]], thinking: str, **options: Any) -> Any:
        from jinja2 import TemplateError

        if thinking != "none":
            options["enable_thinking"] = thinking == "true"
        try:
            return self.tokenizer.apply_chat_template(chat, tools=list(tools) or None, **options)
        except (TemplateError, TypeError, ValueError) as error:
            raise DataError(f"the chat template refuses the conversation: {error}") from error


def _described(tools: str) -> list[dict[str, Any]]:
    return [{"type": "function", "function": dict(tool)} for tool in parse_tools(tools)]


def _chat(messages: Sequence[Message], system: str | None) -> list[dict[str, Any]]:
    """Messages as chat templates have them."""
    chat: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    for message in messages:
        role, text = message["role"], message["content"]
        if role == "function":
            head, end, rest = text.rpartition(_THOUGHT_END)
            calls = [{"type": "function", "function": {"name": call.name, "arguments": call.arguments}} for call in parse_calls(rest)]
            chat.append({"role": "assistant", "content": head + end, "tool_calls": calls})
        else:
            chat.append({"role": "tool" if role == "observation" else role, "content": text})
    return chat


def template_words(recorded: Mapping[str, Any]) -> list[str]:
    """The words of a command line that name the template of a manifest; none where it has none."""
    name = recorded.get("name")
    return ["--hf-chat-template"] if name == HF_CHAT_TEMPLATE else ["--prompt-type", str(name)] if name else []


def open_template(flags: TemplateFlags, tokenizer: PreTrainedTokenizerBase) -> ConversationTemplate:
    """The template that the flags name: the tokenizer's own, or one of a file.

    Raises:
        UsageError: none is named, the tokenizer has no chat template or lacks tokens of the template, or as :func:`load_template`.
    """
    if flags.hf_chat_template:
        template: ConversationTemplate = ChatTemplate.of(tokenizer)
    else:
        template = load_template(flags.prompt_type, flags.prompt_type_path)
    template.check_tokenizer(tokenizer)
    return template
