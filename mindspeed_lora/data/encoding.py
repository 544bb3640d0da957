"""Records to token ids, a chunk at a time: one tokenizer call for all texts of the chunk, in this process or in several."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import chain
from multiprocessing import connection, get_context, parent_process
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mindspeed_lora.data.forms import Part, Recipe, Row
from mindspeed_lora.data.readers import BrokenRecord, Record
from mindspeed_lora.data.rendering import ElementEncoder
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

    def row(self, number: int) -> npt.NDArray[np.int32]:
        """The ids of one sequence."""
        end = int(self.lengths[: number + 1].sum(dtype=np.int64))
        return self.ids[end - int(self.lengths[number]) : end]


@dataclass
class EncodedChunk:
    """A chunk of records by key of file. A document is a record's sequences, none where they were dropped for their length."""

    num_records: int
    num_written: int = 0
    sequences: dict[str, Sequences] = field(default_factory=dict)
    skipped: list[tuple[int, str, str]] = field(default_factory=list)  # number in the chunk, reason, place in the file
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
        encoder = ElementEncoder(self.tokenizer, self.recipe.template.name, self.form.special_tokens)
        encoder.add(element for parts in rendered if not isinstance(parts, str) for part in parts for element in part)
        documents: list[list[Row]] = []
        for number, (record, parts) in enumerate(zip(records, rendered, strict=True)):
            if isinstance(parts, str):
                chunk.skipped.append((number, parts, record.where if isinstance(record, BrokenRecord) else ""))
                continue
            kept: list[Row] = []
            for row in self.form.rows([encoder.ids(part) for part in parts], chunk.notes):
                reason = self.form.refusal(row)
                if reason:
                    chunk.skipped.append((number, reason, ""))
                else:
                    kept.append(row)
            documents.append(kept)
        chunk.num_written = sum(map(bool, documents))
        chunk.sequences = {key: self._sequences(documents, place) for place, key in enumerate(self.form.values)}
        return chunk

    def _parts(self, record: Record, notes: Counter[str]) -> list[Part] | str:
        """The parts of a record, or why it has none."""
        if isinstance(record, BrokenRecord):
            return record.reason
        try:
            return self.form.parts(record, notes)
        except DataError as error:
            return str(error)

    def _sequences(self, documents: list[list[Row]], place: int) -> Sequences:
        """The ids at one place of all rows."""
        columns = [[row[place] for row in document] for document in documents]
        if self.form.drops_empty:
            columns = [[ids for ids in column if ids] for column in columns if any(column) or not column]
        rows = list(chain.from_iterable(columns))
        lengths = np.fromiter(map(len, rows), np.int32, len(rows))
        ids = np.fromiter(chain.from_iterable(rows), np.int32, int(lengths.sum(dtype=np.int64)))
        return Sequences(ids, lengths, list(map(len, columns)))


def encode_chunks(
    chunks: Iterable[list[Record]], tokenizer: PreTrainedTokenizerBase, recipe: Recipe, workers: int
) -> Iterator[EncodedChunk]:
    """Encode chunks in order, in this process or (``workers`` > 1) in other processes.

    Raises:
        DataError: a worker died.
    """
    if workers <= 1:
        yield from map(RecordEncoder(tokenizer, recipe).encode, chunks)
        return
    # Linux: a fork has the tokenizer already, which takes seconds to load; elsewhere threads of libraries may not survive it
    method = "fork" if sys.platform == "linux" else "spawn"
    pool = ProcessPoolExecutor(workers, get_context(method), _start_worker, (tokenizer, recipe))
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


def _start_worker(tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> None:
    global _worker_encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread a worker: the workers are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted as well, and ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker_encoder = RecordEncoder(tokenizer, recipe)


def _end_with_parent() -> None:
    """End this process when its parent is gone, however that ended."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _encode_in_worker(records: list[Record]) -> EncodedChunk:
    assert _worker_encoder is not None
    return _worker_encoder.encode(records)
