"""From a record of a file to a conversation: which columns mean what, and which records are none.

Alpaca: instruction + newline + input is the user's text, output the answer; history, a list of [user, answer] pairs,
comes first. ``history`` and ``system`` are read only when ``--map-keys`` names their columns (as the peer does).
ShareGPT: a list of messages with a role and a text each; a leading system message wins over the system column.
A pairwise record has a chosen and a rejected answer to one prompt.
Source: formats.md 3.2.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from mindspeed_lora.data.rendering import Message
from mindspeed_lora.errors import DataError, UsageError


class SkippedRecord(DataError):
    """A record that no conversation can be made of; counted, reported, and left out."""


@dataclass(frozen=True)
class Conversation:
    """Messages in turn, user first and assistant last; ``system`` and ``tools`` may be empty."""

    messages: Sequence[Message]
    system: str
    tools: str = ""


@dataclass(frozen=True)
class Preference:
    """Two answers to one prompt, which ends with a user's message (or an observation)."""

    prompt: Sequence[Message]
    chosen: Message
    rejected: Message
    system: str
    tools: str = ""


@dataclass(frozen=True)
class AlpacaColumns:
    """Columns of an Alpaca file; None: not used."""

    prompt: str | None = "instruction"
    query: str | None = "input"
    response: str | None = "output"
    history: str | None = None
    system: str | None = None
    chosen: str | None = "chosen"
    rejected: str | None = "rejected"

    def conversation(self, record: Mapping[str, Any]) -> Conversation:
        """The conversation of one record; empty texts stay, as with the peer.

        Raises:
            SkippedRecord: no answer, no text at all, or a column of another type.
        """
        prompt = self._prompt(record)
        answer = _answer(record.get(self.response) if self.response else None, self.response)
        if not prompt[-1]["content"] and not answer:
            raise SkippedRecord("prompt and answer are empty")
        return Conversation([*prompt, {"role": "assistant", "content": answer}], self._system(record))

    def preference(self, record: Mapping[str, Any]) -> Preference:
        """The two answers of one record. A column with a list holds the answer first; one column for both holds chosen, rejected.

        Raises:
            SkippedRecord: an answer is missing, or a column is of another type.
        """
        one_column = self.chosen == self.rejected
        chosen = _answer(_entry(record, self.chosen, 0, one_column), self.chosen)
        rejected = _answer(_entry(record, self.rejected, 1 if one_column else 0, one_column), self.rejected)
        return Preference(
            self._prompt(record),
            {"role": "assistant", "content": chosen},
            {"role": "assistant", "content": rejected},
            self._system(record),
        )

    def texts(self, record: Mapping[str, Any]) -> tuple[str, str, str]:
        """Prompt, query and response as they stand in the record; prompt and query may be empty.

        Raises:
            SkippedRecord: no response, or a column of another type.
        """
        prompt, query = (_text(record, column) if column else "" for column in (self.prompt, self.query))
        return prompt, query, _answer(record.get(self.response) if self.response else None, self.response)

    def _prompt(self, record: Mapping[str, Any]) -> list[Message]:
        """The history and the user's text."""
        parts = [_text(record, column) for column in (self.prompt, self.query) if column]
        return [*self._history(record), {"role": "user", "content": "\n".join(part for part in parts if part)}]

    def _system(self, record: Mapping[str, Any]) -> str:
        return _text(record, self.system) if self.system else ""

    def _history(self, record: Mapping[str, Any]) -> list[Message]:
        pairs = record.get(self.history) if self.history else None
        if isinstance(pairs, str):  # csv has only texts
            try:
                pairs = json.loads(pairs) if pairs.strip() else None
            except ValueError as error:
                raise SkippedRecord(f"column {self.history} is no JSON list") from error
        messages: list[Message] = []
        for pair in pairs or ():
            if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
                raise SkippedRecord(f"column {self.history} is no list of [user, answer] pairs of texts")
            messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
        return messages


@dataclass(frozen=True)
class SharegptTags:
    """Names inside a message and of the roles; None: no such role."""

    role_tag: str | None = "from"
    content_tag: str | None = "value"
    user_tag: str | None = "human"
    assistant_tag: str | None = "gpt"
    observation_tag: str | None = "observation"
    function_tag: str | None = "function_call"
    system_tag: str | None = "system"


@dataclass(frozen=True)
class SharegptColumns:
    """Columns of a ShareGPT file; None: not used."""

    messages: str | None = "conversations"
    system: str | None = None
    tools: str | None = None
    chosen: str | None = "chosen"
    rejected: str | None = "rejected"
    kto_tag: str | None = None  # known to the peer, used by nothing here
    tags: SharegptTags = SharegptTags()

    def conversation(self, record: Mapping[str, Any]) -> Conversation:
        """The conversation of one record.

        Raises:
            SkippedRecord: roles out of turn, an odd number of messages, or a message without text.
        """
        messages, system = self._messages(record)
        if not messages or len(messages) % 2:
            raise SkippedRecord(f"{len(messages)} messages instead of an even number")
        return Conversation(messages, system, self._tools(record))

    def preference(self, record: Mapping[str, Any]) -> Preference:
        """The two answers of one record, each a message in its own column.

        Raises:
            SkippedRecord: as :meth:`conversation`, an even number of messages, or an answer that is no message.
        """
        messages, system = self._messages(record)
        if len(messages) % 2 == 0:
            raise SkippedRecord(f"{len(messages)} messages before the answers instead of an odd number")
        chosen, rejected = self._reply(record, self.chosen), self._reply(record, self.rejected)
        return Preference(messages, chosen, rejected, system, self._tools(record))

    def _messages(self, record: Mapping[str, Any]) -> tuple[list[Message], str]:
        """The messages in turn, and the system text."""
        messages = record.get(self.messages) if self.messages else None
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages) or not messages:
            raise SkippedRecord(f"column {self.messages} is no list of messages")
        system = _text(record, self.system) if self.system else ""
        if self.tags.system_tag and messages[0].get(self.tags.role_tag) == self.tags.system_tag:
            system, messages = self._content(messages[0]), messages[1:]
        return [self._message(message, turn) for turn, message in enumerate(messages)], system

    def _tools(self, record: Mapping[str, Any]) -> str:
        """The tools as JSON text; a list in the record is written as such."""
        value = record.get(self.tools) if self.tools else None
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) if value else ""

    def _reply(self, record: Mapping[str, Any], column: str | None) -> Message:
        value = record.get(column) if column else None
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if isinstance(value, str):
            return {"role": "assistant", "content": value}
        if not isinstance(value, dict):
            raise SkippedRecord(f"column {column} is no message")
        return self._message(value, 1)

    def _message(self, message: Mapping[str, Any], turn: int) -> Message:
        tags, role = self.tags, message.get(self.tags.role_tag) if self.tags.role_tag else None
        if role is None or role not in ((tags.user_tag, tags.observation_tag), (tags.assistant_tag, tags.function_tag))[turn % 2]:
            raise SkippedRecord(f"role {role!r} out of turn")
        known = {
            tags.observation_tag: "observation",
            tags.function_tag: "function",
            tags.assistant_tag: "assistant",
            tags.user_tag: "user",
        }
        return {"role": known[role], "content": self._content(message)}

    def _content(self, message: Mapping[str, Any]) -> str:
        content = message.get(self.tags.content_tag) if self.tags.content_tag else None
        if not isinstance(content, str):
            raise SkippedRecord("a message without text")
        return content


@dataclass(frozen=True)
class ChatColumns:
    """The column of a MOSS file: an object of turns."""

    chat: str | None = "chat"


@dataclass(frozen=True)
class TextColumns:
    """Columns of plain text (``--json-keys``); each is also the key of its files."""

    keys: tuple[str, ...] = ("text",)


ConversationColumns = AlpacaColumns | SharegptColumns
Columns = ConversationColumns | ChatColumns | TextColumns


def required_text(record: Mapping[str, Any], column: str) -> str:
    """The text of a column that a record must have.

    Raises:
        SkippedRecord: it has none, or something else than a text.
    """
    value = record.get(column)
    if not isinstance(value, str):
        raise SkippedRecord(f"column {column} is empty" if value is None else f"column {column} holds a {type(value).__name__}, not a text")
    return value


def _text(record: Mapping[str, Any], column: str) -> str:
    value = record.get(column)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise SkippedRecord(f"column {column} holds a {type(value).__name__}, not a text")
    return value


def _answer(value: Any, column: str | None) -> str:
    """The text of an answer, which may be the only entry of a list."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is None:
        raise SkippedRecord("no answer")
    if not isinstance(value, str):
        raise SkippedRecord(f"column {column} holds a {type(value).__name__}, not a text")
    return value


def _entry(record: Mapping[str, Any], column: str | None, place: int, must_be_list: bool) -> Any:
    """Entry ``place`` of a column's list (None: it has none), or the value itself where it is no list."""
    value = record.get(column) if column else None
    if isinstance(value, list):
        return value[place] if place < len(value) else None
    if must_be_list and value is not None:
        raise SkippedRecord(f"column {column}, named for chosen and rejected, holds a {type(value).__name__}, not a list of the two")
    return value


def columns_of(default: Columns, map_keys: Mapping[str, Any] | None, json_keys: Sequence[str] | None = None) -> Columns:
    """The columns of a file as ``--map-keys`` (of plain text: ``--json-keys``) names them, where it differs from ``default``.

    Raises:
        UsageError: an unknown key, or a value that is no column name.
    """
    keys = dict(map_keys or {})
    if isinstance(default, TextColumns):
        if keys:
            raise UsageError("--map-keys means nothing to plain text; name its columns with --json-keys")
        return TextColumns(tuple(dict.fromkeys(json_keys))) if json_keys else default
    if not isinstance(default, SharegptColumns):
        return replace(default, **_checked(keys, type(default), "--map-keys"))
    given = keys.pop("tags", None)
    tags = default.tags
    if given is not None:
        if not isinstance(given, Mapping):
            raise UsageError(f"--map-keys tags: {given!r} is no JSON object of tag names")
        none: dict[str, str | None] = {field.name: None for field in fields(SharegptTags)}  # a tag that is not named is not used
        tags = SharegptTags(**{**none, **_checked(given, SharegptTags, "--map-keys tags")})
    return replace(default, tags=tags, **_checked(keys, SharegptColumns, "--map-keys"))


def _checked(keys: Mapping[str, Any], kind: type, flag: str) -> dict[str, Any]:
    known = [field.name for field in fields(kind)]
    for key, value in keys.items():
        if key not in known:
            raise UsageError(f"{flag}: unknown key {key!r}; known are {', '.join(known)}")
        if value is not None and not isinstance(value, str):
            raise UsageError(f"{flag}: {key} is {value!r}; give the name of a column as a text")
    return {key: value or None for key, value in keys.items()}


def used_columns(columns: Columns, used: Iterable[str]) -> dict[str, str]:
    """The columns that are read, by their key; ``used``: the keys that the handler reads."""
    if isinstance(columns, TextColumns):
        return {key: key for key in columns.keys}
    return {key: column for key in used if (column := getattr(columns, key)) is not None}


def check_columns(columns: Columns, wanted: Mapping[str, str], found: Iterable[str], where: str, hint: str = "") -> None:
    """Compare the columns that an input must have (by key) with those it has; ``hint``: goes to the end of the message.

    Raises:
        UsageError: a column is missing, or no column is left for user or answer.
    """
    found = list(found)
    flag, example = ("--json-keys", "COLUMN") if isinstance(columns, TextColumns) else ("--map-keys", "'{}'")
    for key, column in wanted.items():
        if column not in found:
            example = example.format(json.dumps({key: "COLUMN"}))
            raise UsageError(
                f"{flag}: no column {column!r} (for {key}) in {where}, which has {', '.join(found) or 'no columns'}; "
                f"name the right one with {flag} {example}{hint}"
            )


def check_mapping(columns: Columns, used: Sequence[str]) -> None:
    """Whether ``--map-keys`` leaves a column for all that a record needs.

    Raises:
        UsageError: it does not.
    """
    needed = ("response", "chosen", "rejected", "messages", "chat")
    missing = [key for key in needed if key in used and not getattr(columns, key)]
    if isinstance(columns, AlpacaColumns) and not (columns.prompt or columns.query):
        missing.append("prompt")
    if missing:
        raise UsageError(f"--map-keys leaves no column for {' and '.join(missing)}; give the names of columns")
