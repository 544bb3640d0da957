"""What every template makes: turns of elements, and their token ids.

An *element* is a text, one token by name, or ready ids. Each element is encoded by itself and the ids are concatenated:
byte pair merges across elements would give other ids than the peer's, and than the prompt that the model sees when asked.

    source (label -100): prefix, system, user      target (trained): assistant
    later turns:         separator, user                             assistant
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mindspeed_lora.data.cutting import CutRule, cut_turns
from mindspeed_lora.data.tokenizer import encode_texts
from mindspeed_lora.errors import DataError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

THINKING_MODES = ("true", "false", "none")
ASKING_ROLES = ("user", "observation")
ANSWERING_ROLES = ("assistant", "function")  # function: the content is JSON of calls, after a thought if there is one

Message = Mapping[str, str]  # {"role": one of the above or a leading "system", "content": text}


@dataclass(frozen=True)
class Token:
    """An element that is one token of the vocabulary, by its name."""

    token: str


@dataclass(frozen=True)
class Special:
    """An element that is the tokenizer's ``bos_token`` or ``eos_token``; nothing where the tokenizer has none."""

    name: str


Element = str | Token | Special | tuple[int, ...]
Turn = tuple[tuple[Element, ...], tuple[Element, ...]]  # source, target


class ConversationTemplate(ABC):
    """A form of conversation: the template of a file (templates.py) or the tokenizer's own (chat_template.py)."""

    name: str
    efficient_eos: bool  # one eos at the end of the conversation instead of one a turn

    @property
    @abstractmethod
    def has_thinking(self) -> bool:
        """Whether ``--enable-thinking true|false`` means anything here."""

    @property
    @abstractmethod
    def cut_rule(self) -> CutRule:
        """How records longer than ``--seq-length`` are cut."""

    @property
    @abstractmethod
    def has_stop(self) -> bool:
        """Whether an answer ends in a stop token by this template's own form."""

    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 (hex) of everything but the name."""

    @abstractmethod
    def stop_token_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Sorted ids that end an answer."""

    @abstractmethod
    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise UsageError where the tokenizer lacks a token that this template needs."""

    @abstractmethod
    def render(self, messages: Sequence[Message], system: str | None = None, thinking: str = "none", tools: str = "") -> list[Turn]:
        """The turns of a conversation that alternates asking and answering roles, all answers to be trained.

        ``tools``: JSON, see tools.py. ``thinking``: one of THINKING_MODES, checked before.

        Raises:
            DataError: roles out of turn, an odd number of messages, or tools or calls that cannot be read.
        """

    @abstractmethod
    def render_last(self, messages: Sequence[Message], system: str | None = None, thinking: str = "none", tools: str = "") -> Turn:
        """A conversation as its last prompt and the answer to it: how a model is asked, and how pairs are trained.

        Raises:
            DataError: as :meth:`render`.
        """

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

    def encode_conversation(
        self,
        tokenizer: PreTrainedTokenizerBase,
        messages: Sequence[Message],
        system: str | None = None,
        tools: str = "",
        thinking: str = "none",
        cutoff: int | None = None,
    ) -> list[tuple[list[int], list[int]]]:
        """(source ids, target ids) of each turn; cut to ``cutoff`` tokens in all where given. All targets are to be trained.

        Raises:
            UsageError: ``thinking`` does not fit the template, or a token of the template is not in the vocabulary.
            DataError: as :meth:`render`.
        """
        system, messages = split_system(messages, system)
        turns = self.render(messages, system, self.check_thinking(thinking), tools)
        encoder = ElementEncoder(tokenizer, self.name)
        encoder.add(element for turn in turns for side in turn for element in side)
        pairs = [(encoder.ids(source), encoder.ids(target)) for source, target in turns]
        return pairs if cutoff is None else cut_turns(pairs, cutoff, self.cut_rule)

    def encode_prompt(
        self,
        tokenizer: PreTrainedTokenizerBase,
        messages: Sequence[Message],
        system: str | None = None,
        thinking: str = "none",
        tools: str = "",
    ) -> list[int]:
        """Ids of a conversation up to where the model answers its last message (a user's or an observation).

        Raises:
            UsageError, DataError: as :meth:`encode_conversation`.
        """
        system, messages = split_system(messages, system)
        if len(messages) % 2 == 0:
            raise DataError(
                f"a prompt must end with a user's message, but it has {len(messages)} messages; drop the last or add a question"
            )
        answer = {"role": "assistant", "content": ""}
        prompt, _ = self.render_last([*messages, answer], system, self.check_thinking(thinking), tools)
        encoder = ElementEncoder(tokenizer, self.name)
        encoder.add(prompt)
        return encoder.ids(prompt)


class ElementEncoder:
    """Token ids of elements: :meth:`add` encodes new ones in one call, :meth:`ids` concatenates.

    ``special_tokens``: the tokenizer adds its own to each text, such as a bos.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template_name: str, special_tokens: bool = False) -> None:
        self.tokenizer = tokenizer
        self._template_name = template_name
        self._special_tokens = special_tokens
        self._ids: dict[Element, Sequence[int]] = {}

    def add(self, elements: Iterable[Element]) -> None:
        """Encode those of ``elements`` that are not known yet."""
        new = [element for element in dict.fromkeys(elements) if element not in self._ids]
        texts = [element for element in new if isinstance(element, str)]
        self._ids.update(zip(texts, encode_texts(self.tokenizer, texts, self._special_tokens), strict=True))
        self._ids.update((element, self._ready(element)) for element in new if not isinstance(element, str))

    def ids(self, elements: Sequence[Element]) -> list[int]:
        """Concatenated ids of ``elements``, all of them added before."""
        return [index for element in elements for index in self._ids[element]]

    def _ready(self, element: Token | Special | tuple[int, ...]) -> Sequence[int]:
        if isinstance(element, tuple):
            return element
        if isinstance(element, Special):
            index = self.tokenizer.bos_token_id if element.name == "bos_token" else self.tokenizer.eos_token_id
            return [] if index is None else [int(index)]
        index = self.tokenizer.get_vocab().get(element.token)
        if index is None:
            raise missing_tokens(self._template_name, [element.token], self.tokenizer)
        return [int(index)]


def missing_tokens(template_name: str, tokens: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> UsageError:
    """The error for a tokenizer that lacks tokens of a template."""
    plural = "s" if len(tokens) > 1 else ""
    return UsageError(
        f"--prompt-type {template_name} needs the token{plural} {', '.join(tokens)}, which the tokenizer at {tokenizer.name_or_path} "
        "lacks; give the template of the model's family, or one of plain text such as default"
    )


def split_system(messages: Sequence[Message], system: str | None) -> tuple[str | None, Sequence[Message]]:
    """Take a leading system message out of ``messages``; it wins over ``system``."""
    if messages and messages[0]["role"] == "system":
        return messages[0]["content"], messages[1:]
    return system, messages


def check_alternation(messages: Sequence[Message]) -> None:
    """Raise DataError unless asking and answering roles take turns and the last is an answer."""
    if len(messages) % 2 or not messages:
        raise DataError(f"a conversation needs pairs of user and assistant, but it has {len(messages)} messages")
    for number, message in enumerate(messages):
        roles = ANSWERING_ROLES if number % 2 else ASKING_ROLES
        if message["role"] not in roles:
            raise DataError(f"a message has role {message['role']!r} where {' or '.join(roles)} must stand")
