"""The values of a JSON array one at a time, so that a file of any size needs memory for one of its values only."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from json.decoder import JSONDecodeError
from typing import Any, TextIO

_CHUNK = 1 << 20  # characters
_BLANK = re.compile(r"[ \t\n\r]*")
_LONGEST_CUT = 16  # characters before the end of what is read, within which an error may come from the cut


def iterate_array(file: TextIO) -> Iterator[Any]:
    """Yield the values of the array that is the whole content of ``file``.

    Raises:
        ValueError: it is no JSON array; the text says why, with line and column. The values before it have been yielded.
    """
    window = _Window(file)
    window.take("[", "an array must begin with '['")
    if window.peek() == "]":
        window.take("]", "")
    else:
        yield window.value()
        while window.peek() == ",":
            window.take(",", "")
            yield window.value()
        window.take("]", "Expecting ',' or ']' after a value")
    if window.peek():
        window.fail("Extra data after the array")


class _Window:
    """The part of a text file that is not yet used up: ``text[at:]``."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._decode = json.JSONDecoder().raw_decode
        self._text = ""
        self._at = 0
        self._lines = 0  # line ends before text
        self._columns = 0  # characters between the last of them and text

    def peek(self) -> str:
        """The next character that is no blank, not used up; empty at the end of the file."""
        while True:
            found = _BLANK.match(self._text, self._at)
            assert found is not None
            self._at = found.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read_more():
                return ""

    def take(self, character: str, otherwise: str) -> None:
        """Use up ``character``, which must be next; ``otherwise``: what is wrong if it is not."""
        if self.peek() != character:
            self.fail(otherwise)
        self._at += 1

    def value(self) -> Any:
        """Use up one JSON value."""
        self.peek()
        while True:
            try:
                value, end = self._decode(self._text, self._at)
            except JSONDecodeError as error:
                whole = error.pos < len(self._text) - _LONGEST_CUT and not error.msg.startswith("Unterminated string")
                if whole or not self._read_more():
                    self._at = min(error.pos, len(self._text))
                    self.fail(error.msg)
                continue
            if isinstance(value, int | float) and len(self._text) - end < _LONGEST_CUT and self._read_more():
                continue  # a number may go on: 1, then .5 or e+3
            self._at = end
            return value

    def fail(self, reason: str) -> None:
        """Raise ValueError for where the window stands."""
        before = self._text[: self._at]
        line = self._lines + before.count("\n") + 1
        column = len(before) - before.rfind("\n") if "\n" in before else self._columns + len(before) + 1
        raise ValueError(f"{reason}: line {line} column {column}")

    def _read_more(self) -> bool:
        """Drop what is used up and read as much as is left, at least a chunk; False at the end of the file."""
        more = self._file.read(max(_CHUNK, len(self._text) - self._at))
        if not more:
            return False
        used = self._text[: self._at]
        self._lines += used.count("\n")
        self._columns = len(used) - used.rfind("\n") - 1 if "\n" in used else self._columns + len(used)
        self._text, self._at = self._text[self._at :] + more, 0
        return True
