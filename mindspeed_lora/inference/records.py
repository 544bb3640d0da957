"""``--input-file``: what each line asks, and where its answer goes.

```
in   {"prompt": "..."} | {"messages": [{"role": ..., "content": ...}]}   + "system", "adapter", and fields of your own
out  the same record + "answer", "finish_reason" (stop | length), "prompt_tokens", "answer_tokens", and with --compare-base "answer_base"
```

While a run goes on, answers are appended to ``<output>.partial``, in the order in which they are ready; at the end the whole file is
written in the order of the input. A run that was ended goes on from the partial file, if it was asked the same.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindspeed_lora.errors import UsageError
from mindspeed_lora.files import write_text

ROLES = ("user", "assistant")


@dataclass(frozen=True)
class Request:
    """One line: ``number`` from 1; ``adapter`` None: the first."""

    number: int
    record: dict[str, Any]
    messages: list[dict[str, str]]
    system: str | None
    adapter: str | None


def read_requests(path: Path) -> list[Request]:
    """Every line of a jsonl file.

    Raises:
        UsageError: the file holds nothing, or a line is not such a record.
    """
    requests = [
        _request(f"--input-file {path}, line {number}", number, line)
        for number, line in enumerate(path.read_bytes().split(b"\n"), 1)
        if line.strip()
    ]
    if not requests:
        raise UsageError(f'--input-file {path} is empty; give one {{"prompt": "..."}} a line')
    return requests


def _request(where: str, number: int, line: bytes) -> Request:
    try:
        record = json.loads(line.decode())
        json.dumps(record, ensure_ascii=False).encode()  # half a character, as in "\ud83d", could not be written with the answer
    except UnicodeError as error:
        raise UsageError(f"{where}: not UTF-8 text ({error}); correct the line") from error
    except ValueError as error:
        raise UsageError(f"{where}: not JSON ({error}); correct the line") from error
    if not isinstance(record, dict):
        raise UsageError(f'{where}: JSON, but no object; give a line such as {{"prompt": "..."}}')
    messages, system = _messages(where, record), record.get("system")
    if messages[0]["role"] == "system":
        system, messages = messages[0]["content"], messages[1:]
    for index, message in enumerate(messages):
        if message["role"] != ROLES[index % 2]:
            raise UsageError(f"{where}: message {index + 1} has role {message['role']!r} where {ROLES[index % 2]!r} must stand")
    if len(messages) % 2 == 0 or not messages[-1]["content"].strip():
        raise UsageError(f"{where}: it asks nothing; it must end with a user's text that is not empty")
    for name in ("system", "adapter"):
        if not isinstance(record.get(name), str | None):
            raise UsageError(f"{where}: {name} is {record[name]!r}; it must be a text")
    return Request(number, record, messages, system, record.get("adapter"))


def _messages(where: str, record: dict[str, Any]) -> list[dict[str, str]]:
    if ("prompt" in record) == ("messages" in record):
        raise UsageError(f"{where}: needs either prompt or messages; its fields are {', '.join(record) or 'none'}")
    if "prompt" in record:
        record_messages: Any = [{"role": "user", "content": record["prompt"]}]
    else:
        record_messages = record["messages"]
    if (
        not isinstance(record_messages, list)
        or not record_messages
        or not all(isinstance(message, dict) for message in record_messages)
        or not all(isinstance(message.get(key), str) for message in record_messages for key in ("role", "content"))
    ):
        raise UsageError(f'{where}: prompt must be a text, messages a list of {{"role": ..., "content": ...}} with texts')
    return [{"role": message["role"], "content": message["content"]} for message in record_messages]


class AnswerFile:
    """The output file, and its partial one while the run goes on."""

    def __init__(self, path: Path) -> None:
        self.path, self.partial = path, path.with_name(path.name + ".partial")
        self._asked = ""
        self.done: dict[int, dict[str, Any]] = {}  # by the request's number

    def check(self) -> None:
        """Raise UsageError where the output is there already, or its folder is not."""
        if self.path.exists():
            raise UsageError(f"--output-file {self.path} exists already; remove it or name another file")
        if not self.path.absolute().parent.is_dir():
            raise UsageError(f"--output-file {self.path}: there is no folder {self.path.parent}; make it or name another file")

    def take_over(self, asked: str) -> None:
        """Take over what an earlier run has answered, if it was asked the same (``asked``: a fingerprint of it).

        Raises:
            UsageError: the partial file is another run's.
        """
        self._asked = asked
        if not self.partial.exists():
            return
        lines = self.partial.read_bytes().split(b"\n")[:-1]  # what follows the last line end was cut off
        if lines[:1] != [self._first_line().encode()]:
            raise UsageError(
                f"{self.partial} was begun with other questions, settings or weights; run that command again with those, or remove the "
                "file to begin anew"
            )
        self.done = {entry["line"]: entry["record"] for entry in map(json.loads, lines[1:])}

    def begin(self) -> None:
        """Write the partial file's first lines: what was asked, and the answers taken over."""
        entries = [self._first_line(), *(_entry(line, record) for line, record in self.done.items())]
        write_text(self.partial, "".join(entry + "\n" for entry in entries))

    def add(self, answered: dict[int, dict[str, Any]]) -> None:
        """Append records (by their request's number), on the disk before this returns to the caller's next batch."""
        self.done.update(answered)
        with self.partial.open("a", encoding="utf-8") as file:
            for line, record in answered.items():
                file.write(_entry(line, record) + "\n")

    def _first_line(self) -> str:
        return json.dumps({"asked": self._asked})

    def finish(self) -> None:
        """Write the whole file in the order of the input, and remove the partial one."""
        write_text(self.path, "".join(json.dumps(self.done[line], ensure_ascii=False) + "\n" for line in sorted(self.done)))
        self.partial.unlink()


def _entry(line: int, record: dict[str, Any]) -> str:
    return json.dumps({"line": line, "record": record}, ensure_ascii=False)
