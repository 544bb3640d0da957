"""What a person sees: one block per answer, in the peer's layout, the answer growing as it is produced."""

from __future__ import annotations

import sys
import time
from typing import TextIO

_WIDTH = 46


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
