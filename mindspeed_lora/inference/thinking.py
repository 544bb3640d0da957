"""Takes the model's thoughts out of its answer, also while it grows."""

from __future__ import annotations


class ThoughtFilter:
    """``feed`` returns what may be shown of the text so far; ``inside``: the prompt has already opened a thought."""

    def __init__(self, words: tuple[str, str], inside: bool = False) -> None:
        self._words, self._inside = words, inside
        self._held = ""  # may be the beginning of a word
        self._at_start = True  # nothing shown so far: the blanks behind a thought are left out

    def feed(self, text: str) -> str:
        """The part of ``text`` (and of what was held back) that is no thought."""
        self._held += text
        shown = ""
        while True:
            word = self._words[self._inside]
            before, found, behind = self._held.partition(word)
            if not found:
                break
            shown += "" if self._inside else before
            self._held, self._inside = behind, not self._inside
        size = _overlap(self._held, word)
        shown += "" if self._inside else self._held[: len(self._held) - size]
        self._held = self._held[len(self._held) - size :]
        if self._at_start:
            shown = shown.lstrip()
            self._at_start = not shown
        return shown

    def end(self) -> str:
        """What was held back, once the answer is over."""
        held, self._held = self._held, ""
        return "" if self._inside else held


def _overlap(text: str, word: str) -> int:
    """Length of the longest end of ``text`` with which ``word`` begins."""
    return next((size for size in range(min(len(text), len(word) - 1), 0, -1) if text.endswith(word[:size])), 0)


def opens_thought(text: str, words: tuple[str, str]) -> bool:
    """Whether ``text`` ends inside a thought."""
    return text.rfind(words[0]) > text.rfind(words[1])
