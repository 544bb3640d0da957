"""Records to token ids, a chunk at a time: one tokenizer call for all texts of the chunk, in this process or in several."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import chain
from multiprocessing import get_context
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mindspeed_lora.arguments.configs import TokenizerFlags
from mindspeed_lora.data.cutting import Pair, cut_turns
from mindspeed_lora.data.packing import IGNORED
from mindspeed_lora.data.readers import BrokenRecord, Record
from mindspeed_lora.data.records import Columns, SkippedRecord
from mindspeed_lora.data.templates import ElementEncoder, Template, Turn
from mindspeed_lora.data.tokenizer import load_tokenizer
from mindspeed_lora.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_CUTOFF = 100_000  # tokens, where --seq-length is not given (the peer's)
_CHUNKS_AHEAD = 3  # per worker, so that a large input is never whole in memory


@dataclass(frozen=True)
class Recipe:
    """Everything but the tokenizer that decides what a record becomes."""

    template: Template
    thinking: str
    columns: Columns
    seq_length: int | None
    append_eod: bool = False
    cut_rest: bool = False  # --neat-pack: cut at the right what is still too long, instead of dropping it


def _no_ids() -> npt.NDArray[np.int32]:
    return np.empty(0, np.int32)


@dataclass
class EncodedChunk:
    """The documents of a chunk of records. A document is one sequence, or none where the record was dropped for its length."""

    num_records: int
    ids: npt.NDArray[np.int32] = field(default_factory=_no_ids)
    labels: npt.NDArray[np.int32] = field(default_factory=_no_ids)
    lengths: npt.NDArray[np.int32] = field(default_factory=_no_ids)  # of the sequences
    sequences_per_document: list[int] = field(default_factory=list)
    skipped: list[tuple[int, str]] = field(default_factory=list)  # number in the chunk, reason
    notes: Counter[str] = field(default_factory=Counter)  # written, but worth a line in the report


class RecordEncoder:
    """Encodes chunks of records by one recipe."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> None:
        self.tokenizer = tokenizer
        self.recipe = recipe
        self._eos: list[int] = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self._stops = set(recipe.template.stop_token_ids(tokenizer))
        blank = ElementEncoder(tokenizer, recipe.template.name)
        blank.add(("\n", " ", "\n\n"))
        self._blank = {index for text in ("\n", " ", "\n\n") for index in blank.ids((text,))}

    def encode(self, records: Sequence[Record]) -> EncodedChunk:
        """Encode a chunk; skipped records are named in the result."""
        chunk = EncodedChunk(len(records))
        rendered = [self._render(record, chunk.notes) for record in records]
        encoder = ElementEncoder(self.tokenizer, self.recipe.template.name)
        encoder.add(element for turns in rendered if not isinstance(turns, str) for turn in turns for side in turn for element in side)
        rows: list[Pair] = []
        for number, turns in enumerate(rendered):
            if isinstance(turns, str):
                chunk.skipped.append((number, turns))
                continue
            pairs = [(encoder.ids(source), encoder.ids(target)) for source, target in turns]
            row = self._assemble(pairs, chunk.notes)
            reason = self._refusal(row)
            chunk.sequences_per_document.append(0 if reason else 1)
            if reason:
                chunk.skipped.append((number, reason))
            else:
                rows.append(row)
        chunk.lengths = np.fromiter((len(ids) for ids, _ in rows), np.int32, len(rows))
        total = int(chunk.lengths.sum(dtype=np.int64))
        chunk.ids = np.fromiter(chain.from_iterable(ids for ids, _ in rows), np.int32, total)
        chunk.labels = np.fromiter(chain.from_iterable(labels for _, labels in rows), np.int32, total)
        return chunk

    def _render(self, record: Record, notes: Counter[str]) -> list[Turn] | str:
        """The turns of a record, or why it has none."""
        if isinstance(record, BrokenRecord):
            return record.reason
        try:
            conversation = self.recipe.columns.conversation(record)
        except SkippedRecord as error:
            return str(error)
        notes["records with an empty prompt"] += not conversation.messages[-2]["content"]
        notes["records with an empty answer"] += not conversation.messages[-1]["content"]
        return self.recipe.template.render(conversation.messages, conversation.system, self.recipe.thinking)

    def _assemble(self, pairs: list[Pair], notes: Counter[str]) -> Pair:
        """Input ids and labels of one conversation, cut to the length."""
        template = self.recipe.template
        cut = cut_turns(pairs, self.recipe.seq_length or DEFAULT_CUTOFF, template.cut_rule)
        ids: list[int] = []
        labels: list[int] = []
        efficient_eos = self._eos if template.efficient_eos else []
        for number, (source, target) in enumerate(cut):
            ids += source
            ids += target
            hidden = [IGNORED] * len(source)
            if efficient_eos and number and hidden:
                hidden[:1] = efficient_eos
            labels += hidden
            labels += target
            notes["turns without a stop token at the end"] += not efficient_eos and not self._stops_well(target)
        end = [*efficient_eos, *(self._eos if self.recipe.append_eod else ())]
        ids, labels = ids + end, labels + end
        longest = self.recipe.seq_length - 1 if self.recipe.seq_length and self.recipe.cut_rest else len(ids)
        notes["records cut to --seq-length"] += _count(cut) != _count(pairs) or len(ids) > longest
        return ids[:longest], labels[:longest]

    def _stops_well(self, target: list[int]) -> bool:
        for index in reversed(target):
            if index in self._stops:
                return True
            if index not in self._blank:
                return False
        return False

    def _refusal(self, row: Pair) -> str:
        """Why a sequence is not written, or nothing."""
        ids, labels = row
        if self.recipe.seq_length is not None and len(ids) >= self.recipe.seq_length:
            return f"{self.recipe.seq_length} tokens or more (--seq-length)"
        if labels[1:].count(IGNORED) == len(labels[1:]):
            return "no token to train"
        return ""


def _count(pairs: Iterable[Pair]) -> int:
    return sum(len(source) + len(target) for source, target in pairs)


def encode_chunks(
    chunks: Iterable[list[Record]], tokenizer: PreTrainedTokenizerBase, flags: TokenizerFlags, recipe: Recipe, workers: int
) -> Iterator[EncodedChunk]:
    """Encode chunks in order, in this process or (``workers`` > 1) in new processes that load the tokenizer from ``flags``.

    Raises:
        DataError: a worker died.
    """
    if workers <= 1:
        yield from map(RecordEncoder(tokenizer, recipe).encode, chunks)
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (flags, recipe))
    pending: deque[Future[EncodedChunk]] = deque()
    try:
        for chunk in chunks:
            pending.append(pool.submit(_encode_in_worker, chunk))
            if len(pending) >= workers * _CHUNKS_AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(f"--workers {workers}: a worker process died (out of memory?); use fewer workers") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_worker_encoder: RecordEncoder | None = None  # set once in each worker process, never in the parent


def _start_worker(flags: TokenizerFlags, recipe: Recipe) -> None:
    global _worker_encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread a worker: the workers are the parallelism
    _worker_encoder = RecordEncoder(load_tokenizer(flags), recipe)


def _encode_in_worker(records: list[Record]) -> EncodedChunk:
    assert _worker_encoder is not None
    return _worker_encoder.encode(records)
