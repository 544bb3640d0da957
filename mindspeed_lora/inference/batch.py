"""Answers the records of ``--input-file``, in batches of about equally long prompts that the replicas share.

```
round:   replica 0    batch 0     batch 2     ...      every driver answers its batch, then all gather;
         replica 1    batch 1     batch 3     ...      the first writes what the round has answered
```
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from mindspeed_lora.arguments.configs import InferenceConfig
from mindspeed_lora.errors import MindSpeedLoraError, UsageError
from mindspeed_lora.inference.answering import Answer, Answerer, check_limits, encode
from mindspeed_lora.inference.channel import StoppedElsewhere
from mindspeed_lora.inference.generator import Strategy
from mindspeed_lora.inference.interrupt import Interrupted
from mindspeed_lora.inference.records import AnswerFile, Request
from mindspeed_lora.inference.session import Session
from mindspeed_lora.inference.voices import Voice, find_voice
from mindspeed_lora.log import get_logger
from mindspeed_lora.parallel.collectives import broadcast_object, gather_objects


@dataclass(frozen=True)
class Batch:
    """Requests of one voice, answered together; ``prompts``: their ids."""

    voice: Voice
    requests: list[Request]
    prompts: list[list[int]]


def plan_batches(config: InferenceConfig, session: Session, requests: Sequence[Request]) -> list[Batch]:
    """Longest prompts first, so that what does not fit in memory shows at once.

    Raises:
        UsageError: a prompt is too long, or names an adapter that is not loaded.
    """
    check_limits(config, session)
    items: list[tuple[Voice, Request, list[int]]] = []
    for request in requests:
        where = f"--input-file {config.input_file}, line {request.number}"
        voice = find_voice(session.voices, request.adapter, where) if request.adapter is not None else session.voices[0]
        try:
            items.append((voice, request, encode(config, session, voice, request.messages, request.system, what="the prompt")))
        except UsageError as error:
            raise UsageError(f"{where}: {error}") from error
    items.sort(key=lambda item: (item[0].name, -len(item[2]), item[1].number))
    batches: list[Batch] = []
    for voice, request, prompt in items:
        if not batches or batches[-1].voice != voice or len(batches[-1].prompts) == config.micro_batch_size:
            batches.append(Batch(voice, [], []))
        batches[-1].requests.append(request)
        batches[-1].prompts.append(prompt)
    return batches


def fingerprint(config: InferenceConfig, session: Session, batches: Sequence[Batch]) -> str:
    """SHA-256 (hex) over what decides the answers, the same at every layout and batch size: what is asked of whom, the weights, and how
    tokens are chosen. Rank 0 only.
    """
    asked = [pair for batch in batches for pair in zip(batch.requests, batch.prompts, [batch.voice] * len(batch.prompts), strict=True)]
    values = (
        [(request.record, ids, voice.name, voice.stop_ids) for request, ids, voice in sorted(asked, key=lambda each: each[0].number)],
        [session.scored[name] for name in ("base_fingerprint", "lora_fingerprints", "dtype")],
        [config.tasks, config.max_new_tokens, config.max_length, config.num_beams, config.top_p, config.top_k, config.temperature],
        [config.compare_base, config.show_thinking, config.add_eos_token, config.runtime.seed],
    )
    return hashlib.sha256(json.dumps(values, ensure_ascii=False).encode()).hexdigest()


def answer_file(answerer: Answerer, strategy: Strategy, requests: Sequence[Request], output: AnswerFile) -> None:
    """Driver of each replica; ``requests`` and ``output`` are the first one's.

    Raises:
        KeyboardInterrupt: Ctrl-C; what was answered is in the partial file.
    """
    session, config = answerer.session, answerer.config
    rank, size, drivers = session.context.replica_rank, session.context.replicas, session.channels.drivers
    planned: Any = None
    if rank == 0:
        planned = plan_batches(config, session, [request for request in requests if request.number not in output.done])
        output.begin()
        if output.done:
            get_logger().info(f"{len(output.done)} of {len(requests)} answers are taken over from {output.partial}")
    batches: list[Batch] = broadcast_object(planned, 0, drivers)  # type: ignore[assignment]
    try:
        with tqdm(total=len(requests), initial=len(output.done), desc="answering", unit="prompt", file=sys.stderr, disable=rank > 0) as bar:
            for start in range(0, len(batches), size):
                outcome = _outcome(answerer, strategy, batches[start + rank] if start + rank < len(batches) else None)
                answered, failed = _gather(outcome, session)
                if rank == 0:
                    output.add(answered)
                    bar.update(len(answered))
                if failed is not None:
                    raise failed
    except (KeyboardInterrupt, MindSpeedLoraError):
        if rank == 0:
            kept = f"{len(output.done)} of {len(requests)} answers are in {output.partial}"
            get_logger().info(f"{kept}; the same command, given again, goes on from there")
        raise
    if rank == 0:
        output.finish()


def _outcome(answerer: Answerer, strategy: Strategy, batch: Batch | None) -> dict[int, dict[str, Any]] | MindSpeedLoraError:
    """Records by their number; or what ended this driver's work, for the others to know."""
    try:
        return {} if batch is None else _answer_batch(answerer, strategy, batch)
    except KeyboardInterrupt:
        return Interrupted()
    except MindSpeedLoraError as error:
        return error


def _gather(
    outcome: dict[int, dict[str, Any]] | MindSpeedLoraError, session: Session
) -> tuple[dict[int, dict[str, Any]], BaseException | None]:
    """All replicas' records, and what this driver is to raise where one of them could not go on."""
    own = outcome if isinstance(outcome, MindSpeedLoraError) else None
    found = gather_objects(outcome if own is None else own.exit_code, session.channels.drivers)
    records = {number: record for part in found if isinstance(part, dict) for number, record in part.items()}
    codes = [value for value in found if isinstance(value, int)]
    if isinstance(own, Interrupted):
        return records, KeyboardInterrupt()
    return records, StoppedElsewhere(codes[0]) if codes and own is None else own


def _answer_batch(answerer: Answerer, strategy: Strategy, batch: Batch) -> dict[int, dict[str, Any]]:
    config = answerer.config
    seed = config.runtime.seed + batch.requests[0].number  # of the batch's own, so that a run that goes on samples the same
    answers = answerer.answer(batch.voice, batch.prompts, strategy, seed)
    others: list[Answer] | None = None
    if config.compare_base and batch.voice.adapter is not None:
        others = answerer.answer(answerer.session.voices[-1], batch.prompts, strategy, seed)
    records = {}
    for index, (request, prompt, answer) in enumerate(zip(batch.requests, batch.prompts, answers, strict=True)):
        records[request.number] = {
            **request.record,
            "answer": answer.text,
            "finish_reason": "stop" if answer.stopped else "length",
            "prompt_tokens": len(prompt),
            "answer_tokens": len(answer.tokens),
            **({} if others is None else {"answer_base": others[index].text}),
        }
    return records
