"""What a person types, and sees: one block per answer, in the peer's layout, the answer growing as it is produced."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import TextIO

from mindspeed_lora.errors import UsageError

_WIDTH = 46


def typed_lines(lines: TextIO) -> Iterator[str]:
    """What is typed, line by line, with its line ends.

    Raises:
        UsageError: it is not text.
    """
    try:
        while line := lines.readline():
            line.encode()  # where no language is set, Python hands on bytes that it cannot read
            yield line
    except UnicodeError as error:
        raise UsageError(
            f"standard input is not UTF-8 text ({error}); convert it, or name its encoding, as in PYTHONIOENCODING=gbk"
        ) from error


class AnswerPrinter:
    """Prints blocks to ``out`` (default: standard output)."""

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = sys.stdout if out is None else out
        self._start = 0.0

    def write(self, text: str) -> None:
        """Print at once, without a line end."""
        self._out.write(text)
        self._out.flush()

    def heading(self, title: str) -> None:
        """``=============== Greedy Search ================``; the clock starts."""
        self._start = time.perf_counter()
        self.write(f"\n{f' {title} '.center(_WIDTH, '=')}\n")

    def question(self, prompt: str, label: str = "") -> None:
        """The prompt, and the line after which the answer stands; ``label``: whose answer it is, where there are several."""
        self.write(f"\nYou:\n{prompt}\n\nMindSpeed-LLM{f' ({label})' if label else ''}:\n")

    def end(self) -> None:
        """Close the block and say how long it took, in seconds."""
        self.write(f"\n{'=' * _WIDTH}\n\nElapsed: {time.perf_counter() - self._start:.2f}s\n")
