"""From a conversation to an answer: one object that knows the session, the flags and which voice speaks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mindspeed_lora.arguments.configs import InferenceConfig
from mindspeed_lora.errors import UsageError
from mindspeed_lora.inference.engine import Engine
from mindspeed_lora.inference.generator import AnswerStreamer, Limits, ParallelCausalLM, Strategy, generate
from mindspeed_lora.inference.session import Session
from mindspeed_lora.inference.thinking import ThoughtFilter, opens_thought
from mindspeed_lora.inference.voices import Voice

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Answer:
    """``tokens`` without the stop token; ``text`` without special tokens, and without thoughts where those are hidden;
    ``stopped``: it ended by itself, not at the limit.
    """

    tokens: list[int]
    text: str
    stopped: bool


def stop_ids(config: InferenceConfig, session: Session, voice: Voice) -> tuple[int, ...]:
    """What ends an answer: the model's and the template's tokens, and ``--add-eos-token``.

    Raises:
        UsageError: a token is not in the vocabulary.
    """
    vocabulary = session.tokenizer.get_vocab() if config.add_eos_token else {}
    unknown = [token for token in config.add_eos_token if token not in vocabulary]
    if unknown:
        raise UsageError(f"--add-eos-token {' '.join(unknown)}: not a token of the tokenizer at {session.tokenizer.name_or_path}")
    return tuple(sorted({*voice.stop_ids, *(vocabulary[token] for token in config.add_eos_token)}))


def check_limits(config: InferenceConfig, session: Session) -> None:
    """Raise UsageError where ``--max-length`` is more than the model can."""
    if config.max_length is not None and config.max_length > session.max_length:
        raise UsageError(
            f"--max-length {config.max_length} is more than the {session.max_length} of {session.max_length_source}; pass at most that"
        )


def encode(
    config: InferenceConfig, session: Session, voice: Voice, messages: Messages, system: str | None = None, what: str = "--prompt"
) -> list[int]:
    """Ids of the prompt; ``what`` names it in errors.

    Raises:
        UsageError: it is empty, or too long for the model together with its answer.
    """
    ids = voice.prompt_format.encode_conversation(session.tokenizer, messages, system if system is not None else config.system_prompt)
    room = session.max_length - len(ids)
    if room < 1:
        raise UsageError(
            f"{what} has {len(ids)} tokens, which leaves no room for an answer in the {session.max_length} of "
            f"{session.max_length_source}; shorten the prompt"
        )
    if config.max_length is not None and len(ids) >= config.max_length:
        raise UsageError(
            f"{what} has {len(ids)} tokens, which leaves no room for an answer in --max-length {config.max_length}; "
            f"shorten the prompt or pass a --max-length of up to {session.max_length}"
        )
    if config.max_length is None and config.max_new_tokens > room:
        raise UsageError(
            f"{what} has {len(ids)} tokens, with --max-new-tokens {config.max_new_tokens} that is more than the "
            f"{session.max_length} of {session.max_length_source}; shorten the prompt or pass at most --max-new-tokens {room}"
        )
    return ids


class Answerer:
    """Driver side."""

    def __init__(self, config: InferenceConfig, session: Session, engine: Engine) -> None:
        self.config, self.session, self.engine = config, session, engine
        self.model = ParallelCausalLM(engine)
        self._speaking: Voice = session.voices[0]

    def speak_as(self, voice: Voice) -> None:
        """Let the engine use the voice's adapter."""
        if voice.adapter != self._speaking.adapter:
            self.engine.use_adapter(voice.adapter)
        self._speaking = voice

    def limits(self, voice: Voice, longest: int) -> Limits:
        """Where answers to prompts of at most ``longest`` tokens end."""
        new_tokens = self.config.max_new_tokens if self.config.max_length is None else self.config.max_length - longest
        return Limits(new_tokens, stop_ids(self.config, self.session, voice), self.session.pad_id)

    def answer(
        self,
        voice: Voice,
        prompts: Sequence[list[int]],
        strategy: Strategy,
        seed: int | None,
        write: Callable[[str], None] | None = None,
        kept: int | None = None,
    ) -> list[Answer]:
        """Answers to ``prompts``; ``write`` takes the text of the only one as it grows; ``kept`` as for ``generate``."""
        self.speak_as(voice)
        limits = self.limits(voice, max(map(len, prompts)))
        streamer, filters = None, [self._filter(voice, prompt) for prompt in prompts]
        if write is not None:
            show, own = write, filters[0]
            streamer = AnswerStreamer(self.session.tokenizer, limits.stop_ids, show if own is None else lambda text: show(own.feed(text)))
        found = generate(self.model, prompts, strategy, limits, seed, self.config.use_kv_cache, streamer, kept=kept)
        answers: list[Answer] = []
        for tokens, thoughts in zip(found, filters, strict=True):
            text = str(self.session.tokenizer.decode(tokens, skip_special_tokens=True))
            if thoughts is not None and write is not None:
                write(thoughts.end())
            if thoughts is not None:
                fresh = self._filter(voice, prompts[len(answers)])
                assert fresh is not None
                text = fresh.feed(text) + fresh.end()
            answers.append(Answer(tokens, text, len(tokens) < limits.max_new_tokens))
        return answers

    def _filter(self, voice: Voice, prompt: list[int]) -> ThoughtFilter | None:
        if self.config.show_thinking:
            return None
        words = voice.prompt_format.thought_words
        return ThoughtFilter(words, opens_thought(str(self.session.tokenizer.decode(prompt[-16:])), words))
