"""``inference.py``: answers prompts with the base, or with base and adapters, at any layout."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mindspeed_lora.arguments.configs import InferenceConfig
from mindspeed_lora.errors import UsageError
from mindspeed_lora.inference.channel import StoppedElsewhere
from mindspeed_lora.inference.printing import AnswerPrinter, typed_lines
from mindspeed_lora.inference.records import AnswerFile, Request, read_requests
from mindspeed_lora.inference.session import Session, lead, open_session
from mindspeed_lora.inference.voices import Voice
from mindspeed_lora.log import get_logger

if TYPE_CHECKING:
    from mindspeed_lora.inference.answering import Answerer
    from mindspeed_lora.inference.engine import Engine
    from mindspeed_lora.inference.generator import Strategy


@dataclass(frozen=True)
class Task:
    """One value of ``--task``."""

    title: str
    do_sample: bool = False
    beams: bool = False


CHAT = "chat"
TASKS = {
    "greedy": Task("Greedy Search"),
    "do_sample": Task("Do Sample", do_sample=True),
    "beam_search": Task("Beam Search", beams=True),
    "beam_search_with_sampling": Task("Beam Search with sampling", do_sample=True, beams=True),
    CHAT: Task("Chat", do_sample=True),
}
TYPED = ("-",)


@dataclass
class Questions:
    """What is asked, as the first rank has read it."""

    prompts: tuple[str, ...] = ()
    requests: Sequence[Request] = ()
    output: AnswerFile | None = None


def infer(config: InferenceConfig) -> int:
    """Answer every prompt by every task; the first rank prints.

    Returns:
        Exit code: 0, or on the other ranks that of the rank that raised.

    Raises:
        MindSpeedLoraError: on the rank that met the error.
        KeyboardInterrupt: Ctrl-C, on the first rank.
    """
    questions = Questions()
    try:
        session = open_session(
            config,
            all_replicas=config.input_file is not None,
            prepare=lambda: _prepare(config, questions),
            examine=lambda session: _examine(config, session, questions),
        )
    except StoppedElsewhere as stopped:
        return stopped.exit_code
    return lead(session, lambda engine: _work(config, session, engine, questions))


def _prepare(config: InferenceConfig, questions: Questions) -> None:
    """First rank, before anything is loaded: check the values and read the questions."""
    unknown = [task for task in config.tasks if task not in TASKS]
    if unknown:
        raise UsageError(f"--task {' '.join(unknown)} is unknown; use any of {', '.join(TASKS)}")
    if config.max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens {config.max_new_tokens} must be at least 1")
    if any(TASKS[task].do_sample for task in config.tasks):
        _check_sampling(config)
    if config.input_file is not None:
        assert config.output_file is not None
        questions.requests = read_requests(config.input_file)
        questions.output = AnswerFile(config.output_file)
        questions.output.check()
        return
    questions.prompts = config.prompts
    if config.prompts == TYPED:
        if CHAT in config.tasks:
            raise UsageError("--prompt - and --task chat both read standard input; name other tasks, or leave --prompt out")
        questions.prompts = tuple(line.strip() for line in typed_lines(sys.stdin) if line.strip())
    if not questions.prompts or not all(prompt.strip() for prompt in questions.prompts):
        raise UsageError("--prompt is empty; give a text to continue or to answer")


def _check_sampling(config: InferenceConfig) -> None:
    if config.temperature <= 0:
        raise UsageError(f"--temperature {config.temperature} must be above 0; for the most likely token use --task greedy")
    if not 0 < config.top_p <= 1:
        raise UsageError(f"--top-p {config.top_p} must be above 0 and at most 1 (1: all tokens)")
    if config.top_k < 0:
        raise UsageError(f"--top-k {config.top_k} must not be negative (0: all tokens)")


def _examine(config: InferenceConfig, session: Session, questions: Questions) -> None:
    """First rank, before weights are read: everything that a prompt can be refused for."""
    from mindspeed_lora.inference.answering import check_limits, encode, stop_ids
    from mindspeed_lora.inference.batch import fingerprint, plan_batches

    check_limits(config, session)
    for voice in session.voices:
        stop_ids(config, session, voice)
    if questions.output is not None:
        questions.output.take_over(fingerprint(config, session, plan_batches(config, session, questions.requests)))
    elif config.tasks != (CHAT,):
        for voice in _asked(config, session):
            for prompt in questions.prompts:
                encode(config, session, voice, [{"role": "user", "content": prompt}])


def _asked(config: InferenceConfig, session: Session) -> list[Voice]:
    """Who answers a prompt: every adapter, or the base where there is none or it is to be compared."""
    return [voice for voice in session.voices if voice.adapter is not None or config.compare_base or len(session.voices) == 1]


def strategy_of(config: InferenceConfig, task: Task) -> Strategy:
    """The flags that the task takes."""
    from mindspeed_lora.inference.generator import Strategy

    sampling = (config.temperature, config.top_k, config.top_p) if task.do_sample else ()
    return Strategy(task.do_sample, config.num_beams if task.beams else 1, *sampling)


def _work(config: InferenceConfig, session: Session, engine: Engine, questions: Questions) -> None:
    """Driver of each replica that has weights."""
    from mindspeed_lora.inference.answering import Answerer
    from mindspeed_lora.inference.batch import answer_file
    from mindspeed_lora.inference.chat import Chat, run_chat

    for voice in session.voices[: max(len(session.voices) - 1, 1)]:
        form = voice.prompt_format
        get_logger().info(f"prompt format of {voice.name}: {form.name}, thinking {form.thinking} ({form.source})")
    answerer = Answerer(config, session, engine)
    if config.input_file is not None:
        output = questions.output or AnswerFile(config.output_file or config.input_file)
        answer_file(answerer, strategy_of(config, TASKS[config.tasks[0]]), questions.requests, output)
        get_logger().info(f"answers are in {config.output_file}")
        return
    printer = AnswerPrinter()
    for name in config.tasks:
        strategy = strategy_of(config, TASKS[name])
        if name == CHAT:
            printer.heading(TASKS[name].title)
            run_chat(Chat(answerer, strategy, printer), printer, config.runtime.seed)
            continue
        size = max(config.micro_batch_size, 1)
        for start in range(0, len(questions.prompts), size):
            _answer_group(answerer, printer, TASKS[name].title, strategy, questions.prompts[start : start + size])


def _answer_group(answerer: Answerer, printer: AnswerPrinter, title: str, strategy: Strategy, prompts: Sequence[str]) -> None:
    """One block of prompts, by each voice. A prompt alone is streamed; beams and several prompts at once appear when they are ready."""
    from mindspeed_lora.inference.answering import encode

    config, session = answerer.config, answerer.session
    printer.heading(title)
    voices = _asked(config, session)
    for number, voice in enumerate(voices):
        printer.write("\n" if number else "")
        label = "" if len(voices) == 1 else voice.name
        ids = [encode(config, session, voice, [{"role": "user", "content": prompt}]) for prompt in prompts]
        streamed = config.stream and len(prompts) == 1 and strategy.num_beams == 1
        if streamed:
            printer.question(prompts[0], label)
        answers = answerer.answer(voice, ids, strategy, config.runtime.seed, printer.write if streamed else None)
        if not streamed:
            for prompt, answer in zip(prompts, answers, strict=True):
                printer.question(prompt, label)
                printer.write(answer.text)
    printer.end()
