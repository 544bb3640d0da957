"""From a record of a file to a conversation: which columns mean what, and which records are none.

Alpaca: instruction + newline + input is the user's text, output the answer; history, a list of [user, answer] pairs,
comes first. ``history`` and ``system`` are read only when ``--map-keys`` names their columns (as the peer does).
ShareGPT: a list of messages with a role and a text each; a leading system message wins over the system column.
Source: formats.md 3.2.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from mindspeed_lora.data.templates import Message
from mindspeed_lora.errors import DataError, UsageError

ALPACA_HANDLER = "AlpacaStyleInstructionHandler"
SHAREGPT_HANDLER = "SharegptStyleInstructionHandler"


class SkippedRecord(DataError):
    """A record that no conversation can be made of; counted, reported, and left out."""


@dataclass(frozen=True)
class Conversation:
    """Messages in turn, user first and assistant last; ``system`` may be empty."""

    messages: Sequence[Message]
    system: str


@dataclass(frozen=True)
class AlpacaColumns:
    """Columns of an Alpaca file; None: not used."""

    prompt: str | None = "instruction"
    query: str | None = "input"
    response: str | None = "output"
    history: str | None = None
    system: str | None = None

    handler = ALPACA_HANDLER
    optional = ("query",)  # a default column that a file may lack

    def conversation(self, record: Mapping[str, Any]) -> Conversation:
        """The conversation of one record; empty texts stay, as with the peer.

        Raises:
            SkippedRecord: no answer, no text at all, or a column of another type.
        """
        parts = [_text(record, column) for column in (self.prompt, self.query) if column]
        user = "\n".join(part for part in parts if part)
        answer = record.get(self.response) if self.response else None
        if answer is None:
            raise SkippedRecord("no answer")
        if not isinstance(answer, str):
            raise SkippedRecord(f"column {self.response} holds a {type(answer).__name__}, not a text")
        if not user and not answer:
            raise SkippedRecord("prompt and answer are empty")
        messages = self._history(record)
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
        return Conversation(messages, _text(record, self.system) if self.system else "")

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
    tags: SharegptTags = SharegptTags()

    handler = SHAREGPT_HANDLER
    optional = ()

    def conversation(self, record: Mapping[str, Any]) -> Conversation:
        """The conversation of one record.

        Raises:
            SkippedRecord: roles out of turn, an odd number of messages, a message without text, or tool calls.
        """
        if self.tools and record.get(self.tools):
            raise SkippedRecord("tools are not supported by this version")
        messages = record.get(self.messages) if self.messages else None
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages) or not messages:
            raise SkippedRecord(f"column {self.messages} is no list of messages")
        system = _text(record, self.system) if self.system else ""
        roles = [message.get(self.tags.role_tag) for message in messages]
        if self.tags.system_tag and roles[0] == self.tags.system_tag:
            system, messages, roles = self._content(messages[0]), messages[1:], roles[1:]
        if not messages or len(messages) % 2:
            raise SkippedRecord(f"{len(messages)} messages instead of an even number")
        return Conversation(
            [self._message(role, message, turn) for turn, (role, message) in enumerate(zip(roles, messages, strict=True))], system
        )

    def _message(self, role: Any, message: Mapping[str, Any], turn: int) -> Message:
        tags = self.tags
        if role is None or role not in ((tags.user_tag, tags.observation_tag), (tags.assistant_tag, tags.function_tag))[turn % 2]:
            raise SkippedRecord(f"role {role!r} out of turn")
        if role == tags.function_tag and role != tags.assistant_tag:
            raise SkippedRecord("function calls are not supported by this version")
        known = {tags.observation_tag: "observation", tags.assistant_tag: "assistant", tags.user_tag: "user"}
        return {"role": known[role], "content": self._content(message)}

    def _content(self, message: Mapping[str, Any]) -> str:
        content = message.get(self.tags.content_tag) if self.tags.content_tag else None
        if not isinstance(content, str):
            raise SkippedRecord("a message without text")
        return content


Columns = AlpacaColumns | SharegptColumns


def _text(record: Mapping[str, Any], column: str) -> str:
    value = record.get(column)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise SkippedRecord(f"column {column} holds a {type(value).__name__}, not a text")
    return value


def columns_of(handler_name: str, map_keys: Mapping[str, Any] | None) -> Columns:
    """What ``--handler-name`` and ``--map-keys`` say about the columns.

    Raises:
        UsageError: another handler, an unknown key, or a value that is no column name.
    """
    keys = dict(map_keys or {})
    if handler_name == ALPACA_HANDLER:
        return AlpacaColumns(**_checked(keys, AlpacaColumns, "--map-keys"))
    if handler_name != SHAREGPT_HANDLER:
        raise UsageError(f"--handler-name {handler_name} is not supported by this version; use {ALPACA_HANDLER} or {SHAREGPT_HANDLER}")
    given = keys.pop("tags", None)
    tags = SharegptTags()
    if given is not None:
        if not isinstance(given, Mapping):
            raise UsageError(f"--map-keys tags: {given!r} is no JSON object of tag names")
        none: dict[str, str | None] = {field.name: None for field in fields(SharegptTags)}  # a tag that is not named is not used
        tags = SharegptTags(**{**none, **_checked(given, SharegptTags, "--map-keys tags")})
    return SharegptColumns(tags=tags, **_checked(keys, SharegptColumns, "--map-keys"))


def _checked(keys: Mapping[str, Any], kind: type, flag: str) -> dict[str, Any]:
    known = [field.name for field in fields(kind)]
    for key, value in keys.items():
        if key not in known:
            raise UsageError(f"{flag}: unknown key {key!r}; known are {', '.join(known)}")
        if value is not None and not isinstance(value, str):
            raise UsageError(f"{flag}: {key} is {value!r}; give the name of a column as a text")
    return {key: value or None for key, value in keys.items()}


def check_columns(columns: Columns, map_keys: Mapping[str, Any] | None, found: Iterable[str]) -> None:
    """Compare the columns in use with those of the input; a default column that is optional may be missing.

    Raises:
        UsageError: a column is missing, or no column is left for user or answer.
    """
    found = list(found)
    used = {field.name: getattr(columns, field.name) for field in fields(columns) if field.name != "tags"}
    for key, column in used.items():
        optional = key in columns.optional and key not in (map_keys or {})
        if column is not None and column not in found and not optional:
            example = json.dumps({key: "COLUMN"})
            raise UsageError(
                f"--map-keys: no column {column!r} (for {key}) in the input, which has {', '.join(found) or 'no columns'}; "
                f"name the right one with --map-keys '{example}'"
            )
    if isinstance(columns, AlpacaColumns) and not (columns.response and (columns.prompt or columns.query)):
        raise UsageError("--map-keys leaves no column for the prompt or the response; give prompt and response the names of columns")
