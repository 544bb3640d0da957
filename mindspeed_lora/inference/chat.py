"""``--task chat``: a conversation at the terminal, or over a pipe.

| typed                | does                                                          |
|----------------------|---------------------------------------------------------------|
| q, quit, exit        | ends it, as the end of the input does                         |
| clear, new           | forgets the conversation                                      |
| /adapter [NAME]      | lets another adapter answer from now on; alone: lists them    |

Sampled and streamed. The last ``--history-turns`` turns are part of the prompt; every rank keeps keys and values of what the
prompt has in common with the turn before.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TextIO

from mindspeed_lora.errors import UsageError
from mindspeed_lora.inference.answering import Answerer, Messages, encode
from mindspeed_lora.inference.generator import Strategy
from mindspeed_lora.inference.printing import AnswerPrinter, typed_lines
from mindspeed_lora.inference.voices import find_voice

ENDS = ("q", "quit", "exit")
BEGINS_AGAIN = ("clear", "new")
ADAPTER = "/adapter"
PROMPT = "You >> "


class Chat:
    """One conversation; ``strategy`` chooses tokens."""

    def __init__(self, answerer: Answerer, strategy: Strategy, printer: AnswerPrinter) -> None:
        self._answerer, self._strategy, self._printer = answerer, strategy, printer
        self.voices = answerer.session.voices
        self.voice = self.voices[0]
        self._turns: list[tuple[str, str]] = []  # question, answer with its thoughts
        self._cached: list[int] = []  # tokens whose keys and values the engine holds

    def clear(self) -> None:
        """Forget the conversation."""
        self._turns.clear()

    def use(self, name: str) -> None:
        """Let the adapter ``name`` answer; the conversation goes on.

        Raises:
            UsageError: there is none of that name.
        """
        voice = find_voice(self.voices, name, ADAPTER)
        if voice.adapter != self.voice.adapter:
            self._cached = []
        self.voice = voice

    def messages(self, question: str, turns: int) -> Messages:
        """The last ``turns`` turns and the question."""
        kept = self._turns[len(self._turns) - turns :]
        earlier = [{"role": role, "content": text} for pair in kept for role, text in zip(("user", "assistant"), pair, strict=True)]
        return [*earlier, {"role": "user", "content": question}]

    def prompt(self, question: str) -> list[int]:
        """Ids of the conversation; of a long one as many of its last turns as there is room for.

        Raises:
            UsageError: not even the question alone fits.
        """
        answerer = self._answerer
        turns = min(answerer.config.history_turns, len(self._turns))
        while True:
            try:
                return encode(answerer.config, answerer.session, self.voice, self.messages(question, turns), what="the conversation")
            except UsageError:
                if turns == 0:
                    raise
                turns -= 1

    def answer(self, question: str, seed: int | None = None) -> str:
        """Answer, print, remember; the text as shown.

        Raises:
            UsageError: the question is too long.
        """
        ids = self.prompt(question)
        stream = self._answerer.config.stream
        kept = _common(self._cached, ids[:-1]) if self._answerer.config.use_kv_cache else None
        (answer,) = self._answerer.answer(self.voice, [ids], self._strategy, seed, self._printer.write if stream else None, kept)
        self._cached = [*ids, *answer.tokens][: self._answerer.engine.cache_length]
        self._turns.append((question, str(self._answerer.session.tokenizer.decode(answer.tokens, skip_special_tokens=True))))
        if not stream:
            self._printer.write(answer.text)
        return answer.text


def _common(first: list[int], second: list[int]) -> int:
    """Length of the common beginning."""
    return next((index for index, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))


def run_chat(chat: Chat, printer: AnswerPrinter, seed: int, lines: TextIO | None = None) -> None:
    """Read questions from ``lines`` (default: standard input) and answer them, until told to end."""
    another = f", {ADAPTER} NAME lets another adapter answer" if len(chat.voices) > 1 else ""
    printer.write(f"({ENDS[0]} ends, {BEGINS_AGAIN[0]} begins a new conversation{another})\n")
    first: int | None = seed  # later turns go on from where the generator is
    for question in _questions(sys.stdin if lines is None else lines, printer):
        command, _, argument = question.partition(" ")
        if question in BEGINS_AGAIN:
            chat.clear()
            printer.write("(a new conversation)\n")
            continue
        printer.write("" if command == ADAPTER else "\nMindSpeed-LLM:\n")
        try:
            if command == ADAPTER:
                if argument:
                    chat.use(argument.strip())
                printer.write(f"({chat.voice.name} answers; there is {', '.join(voice.name for voice in chat.voices)})\n")
                continue
            chat.answer(question, first)
            first = None
        except UsageError as error:  # of this question: the next may be better
            printer.write(f"({error})")
        printer.write("\n\n")


def _questions(lines: TextIO, printer: AnswerPrinter) -> Iterator[str]:
    """What is typed, line by line, without empty lines, until an end."""
    printer.write(PROMPT)
    for line in typed_lines(lines):
        question = line.strip()
        if question in ENDS:
            break
        if question:
            yield question
        printer.write(PROMPT)
    printer.write("\n")
