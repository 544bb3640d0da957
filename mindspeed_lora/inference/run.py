"""``inference.py``: answers prompts with the base, or with base and adapter, at any layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mindspeed_lora.arguments.configs import InferenceConfig
from mindspeed_lora.errors import UsageError
from mindspeed_lora.inference.channel import StoppedElsewhere
from mindspeed_lora.inference.printing import AnswerPrinter
from mindspeed_lora.inference.session import Session, lead, open_session
from mindspeed_lora.log import get_logger

if TYPE_CHECKING:
    from mindspeed_lora.inference.engine import Engine
    from mindspeed_lora.inference.generator import Limits, ParallelCausalLM, Strategy


@dataclass(frozen=True)
class Task:
    """One value of ``--task``."""

    title: str
    do_sample: bool = False
    num_beams: int = 1


TASKS = {
    "greedy": Task("Greedy Search"),
    "do_sample": Task("Do Sample", do_sample=True),
    "beam_search": Task("Beam Search", num_beams=2),
    "beam_search_with_sampling": Task("Beam Search with sampling", do_sample=True, num_beams=2),
}


def infer(config: InferenceConfig) -> int:
    """Answer every prompt by every task; the first rank prints.

    Returns:
        Exit code: 0, or on the other ranks that of the rank that raised.

    Raises:
        MindSpeedLoraError: on the rank that met the error.
    """
    try:
        session = open_session(config, all_replicas=False, prepare=lambda: _check(config))
    except StoppedElsewhere as stopped:
        return stopped.exit_code
    return lead(session, lambda engine: _answer_all(config, session, engine))


def _check(config: InferenceConfig) -> None:
    unknown = [task for task in config.tasks if task not in TASKS]
    if unknown:
        raise UsageError(f"--task {' '.join(unknown)} is not supported yet; use any of {', '.join(TASKS)}")
    if config.max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens {config.max_new_tokens} must be at least 1")
    if not config.prompts or not all(prompt.strip() for prompt in config.prompts):
        raise UsageError("--prompt is empty; give a text to continue or to answer")
    if any(TASKS[task].do_sample for task in config.tasks):
        _check_sampling(config)


def _check_sampling(config: InferenceConfig) -> None:
    if config.temperature <= 0:
        raise UsageError(f"--temperature {config.temperature} must be above 0; for the most likely token use --task greedy")
    if not 0 < config.top_p <= 1:
        raise UsageError(f"--top-p {config.top_p} must be above 0 and at most 1 (1: all tokens)")
    if config.top_k < 0:
        raise UsageError(f"--top-k {config.top_k} must not be negative (0: all tokens)")


def encode_prompts(config: InferenceConfig, session: Session) -> list[list[int]]:
    """Token ids of every prompt.

    Raises:
        UsageError: one is empty, or too long for the model together with its answer.
    """
    encoded = []
    for prompt in config.prompts:
        ids = session.prompt_format.encode(session.tokenizer, prompt)
        if len(ids) + config.max_new_tokens > session.max_length:
            raise UsageError(
                f"--prompt has {len(ids)} tokens, with --max-new-tokens {config.max_new_tokens} that is more than the "
                f"{session.max_length} of {session.max_length_source}; shorten the prompt or pass a smaller --max-new-tokens"
            )
        encoded.append(ids)
    return encoded


def stop_ids(config: InferenceConfig, session: Session) -> tuple[int, ...]:
    """What ends an answer: the model's and the template's tokens, and ``--add-eos-token``.

    Raises:
        UsageError: a token is not in the vocabulary.
    """
    vocabulary = session.tokenizer.get_vocab() if config.add_eos_token else {}
    unknown = [token for token in config.add_eos_token if token not in vocabulary]
    if unknown:
        raise UsageError(f"--add-eos-token {' '.join(unknown)}: not a token of the tokenizer at {session.tokenizer.name_or_path}")
    return tuple(sorted({*session.stop_ids, *(vocabulary[token] for token in config.add_eos_token)}))


def _answer_all(config: InferenceConfig, session: Session, engine: Engine) -> None:
    from mindspeed_lora.inference.generator import Limits, ParallelCausalLM, Strategy

    encoded = encode_prompts(config, session)
    limits = Limits(config.max_new_tokens, stop_ids(config, session), session.pad_id)
    model, size = ParallelCausalLM(engine), max(config.micro_batch_size, 1)
    get_logger().info(
        f"prompt format: {session.prompt_format.name}, thinking {session.prompt_format.thinking} ({session.prompt_format.source})"
    )
    for name in config.tasks:
        task = TASKS[name]
        sampling = (config.temperature, config.top_k, config.top_p) if task.do_sample else ()
        strategy = Strategy(task.do_sample, task.num_beams, *sampling)
        pairs = list(zip(config.prompts, encoded, strict=True))
        for start in range(0, len(pairs), size):
            _answer_group(config, session, model, task, strategy, limits, pairs[start : start + size])


def _answer_group(
    config: InferenceConfig,
    session: Session,
    model: ParallelCausalLM,
    task: Task,
    strategy: Strategy,
    limits: Limits,
    prompts: Sequence[tuple[str, list[int]]],
) -> None:
    """One block per prompt. A prompt alone is streamed; beams and several prompts at once appear when they are ready."""
    from mindspeed_lora.inference.generator import AnswerStreamer, generate

    printer = AnswerPrinter()
    printer.heading(task.title)
    streamer = None
    if len(prompts) == 1 and task.num_beams == 1:
        printer.question(prompts[0][0])
        streamer = AnswerStreamer(session.tokenizer, limits.stop_ids, printer.write)
    ids = [ids for _, ids in prompts]
    answers = generate(model, ids, strategy, limits, config.runtime.seed, config.use_kv_cache, streamer)
    if streamer is None:
        for (prompt, _), answer in zip(prompts, answers, strict=True):
            printer.question(prompt)
            printer.write(str(session.tokenizer.decode(answer, skip_special_tokens=True)))
    printer.end()
