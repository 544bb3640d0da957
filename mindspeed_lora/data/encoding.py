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
from mindspeed_lora.data.forms import Part, Recipe, Row
from mindspeed_lora.data.readers import BrokenRecord, Record
from mindspeed_lora.data.rendering import ElementEncoder
from mindspeed_lora.data.tokenizer import load_tokenizer
from mindspeed_lora.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNKS_AHEAD = 3  # per worker, so that a large input is never whole in memory


@dataclass(frozen=True)
class Sequences:
    """What a chunk adds to one file: ids of its sequences one after the other, int32, and how they make documents."""

    ids: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int32]
    sequences_per_document: list[int]


@dataclass
class EncodedChunk:
    """A chunk of records by key of file. A document is a record's sequences, none where they were dropped for their length."""

    num_records: int
    num_written: int = 0
    sequences: dict[str, Sequences] = field(default_factory=dict)
    skipped: list[tuple[int, str]] = field(default_factory=list)  # number in the chunk, reason
    notes: Counter[str] = field(default_factory=Counter)  # written, but worth a line in the report


class RecordEncoder:
    """Encodes chunks of records by one recipe."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> None:
        self.tokenizer = tokenizer
        self.recipe = recipe
        self.form = recipe.form(tokenizer, recipe)

    def encode(self, records: Sequence[Record]) -> EncodedChunk:
        """Encode a chunk; skipped records are named in the result."""
        chunk = EncodedChunk(len(records))
        rendered = [self._parts(record, chunk.notes) for record in records]
        encoder = ElementEncoder(self.tokenizer, self.recipe.template.name)
        encoder.add(element for parts in rendered if not isinstance(parts, str) for part in parts for element in part)
        documents: list[list[Row]] = []
        for number, parts in enumerate(rendered):
            if isinstance(parts, str):
                chunk.skipped.append((number, parts))
                continue
            kept = []
            for row in self.form.rows([encoder.ids(part) for part in parts], chunk.notes):
                reason = self.form.refusal(row)
                if reason:
                    chunk.skipped.append((number, reason))
                else:
                    kept.append(row)
            documents.append(kept)
        chunk.num_written = sum(map(bool, documents))
        chunk.sequences = {key: _sequences(documents, place) for place, key in enumerate(self.form.values)}
        return chunk

    def _parts(self, record: Record, notes: Counter[str]) -> list[Part] | str:
        """The parts of a record, or why it has none."""
        if isinstance(record, BrokenRecord):
            return record.reason
        try:
            return self.form.parts(record, notes)
        except DataError as error:
            return str(error)


def _sequences(documents: Sequence[Sequence[Row]], place: int) -> Sequences:
    """The values at one place of all rows."""
    rows = [row[place] for document in documents for row in document]
    lengths = np.fromiter(map(len, rows), np.int32, len(rows))
    ids = np.fromiter(chain.from_iterable(rows), np.int32, int(lengths.sum(dtype=np.int64)))
    return Sequences(ids, lengths, [len(document) for document in documents])


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
