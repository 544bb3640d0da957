"""Global batches for training and evaluation; the same samples in the same order whatever the parallel layout.

The stream of samples: every epoch is ``arange`` over the split, shuffled by one ``RandomState(seed)`` that runs through
the epochs (the peer's order); epochs follow each other without a gap. Global batch k is samples ``[k G, (k + 1) G)``.
Inside a batch, micro-batch m of data rank d has the rows ``(m D + d) M .. (m D + d + 1) M`` (G global and M micro batch
size, D data-parallel size), so every rank's micro-batches together are the whole batch.

With ``--padding-free`` a micro-batch is one row, with M records behind one another (:mod:`mindspeed_lora.data.spreading`).

Each rank reads its own rows from the memory map, and of the others only lengths and labels: padded length and token
count need no communication.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from mindspeed_lora.data.packing import IGNORED
from mindspeed_lora.data.sft_dataset import DocumentRule
from mindspeed_lora.data.spreading import deal, spread
from mindspeed_lora.errors import UsageError

_NO_SAMPLE = -1  # stands in sample_ids for a row that only fills up the last evaluation batch


@dataclass(frozen=True)
class StepBatch:
    """The rows of this rank in one global batch, and what is known of the whole of it.

    ``labels`` are shifted: labels[:, i] is the target of position i, -100 where none is trained.
    """

    input_ids: torch.Tensor  # [G / D, s] int64 (padding-free: [G / D / M, s]), micro-batch after micro-batch
    labels: torch.Tensor  # likewise
    num_trained_tokens: int  # of the global batch
    micro_batch_trained_tokens: tuple[int, ...]  # of this rank's micro-batches
    num_real_tokens: int  # of the global batch, without padding
    sample_ids: tuple[int, ...]  # of the global batch: numbers in the dataset, -1 for rows that only fill up
    skipped_samples: int  # of the global batch: samples without a trained token
    cut_samples: int  # of the global batch: samples longer than seq_length, cut at the right
    micro_batch_size: int  # rows of a micro-batch
    row_trained_tokens: tuple[int, ...]  # of this rank's rows
    row_real_tokens: tuple[int, ...]  # likewise, all without padding, which comes behind them
    columns: tuple[int, ...]  # of this rank's micro-batches: the first so many of the s columns hold all its tokens
    num_documents: int  # of the global batch: texts that see only themselves; without --reset-attention-mask the samples
    document_ends: torch.Tensor | None = None  # [G / D, n] int32: ends of each row's documents, the last one s, repeated as needed
    num_pairs: int = 0  # of the global batch: preference pairs that are trained


class Rows(Protocol):
    """What a batch is made of: ids and labels by row number, and the rows' lengths."""

    @property
    def input_ids(self) -> Any:
        """``[row]``: ids int32 of a row."""
        ...

    @property
    def labels(self) -> Any:
        """``[row]``: its labels, not shifted."""
        ...

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """Of all rows."""
        ...


@dataclass(frozen=True)
class BatchShape:
    """How many rows a rank takes, and how far they are padded.

    ``pad_multiple``: the padded length is rounded up to it (lcm of --pad-to-multiple-of and TP), unless padded to ``seq_length``.
    ``documents``: where the documents of a sample end; None: a sample is one document. ``padding_free``: the samples of a
    micro-batch lie in one row, however long it gets.
    """

    micro_batch_size: int
    global_batch_size: int
    dp_rank: int
    dp_size: int
    seq_length: int
    pad_to_seq_length: bool
    pad_multiple: int
    pad_token_id: int
    documents: DocumentRule | None = None
    padding_free: bool = False

    def __post_init__(self) -> None:
        rows = self.micro_batch_size * self.dp_size
        if self.global_batch_size <= 0 or self.global_batch_size % rows:
            raise UsageError(
                f"--global-batch-size {self.global_batch_size} is no multiple of --micro-batch-size {self.micro_batch_size} "
                f"x data parallel size {self.dp_size} = {rows}; use {max(self.global_batch_size // rows, 1) * rows}"
            )

    def padded_length(self, longest: int) -> int:
        """Columns of rows of which the longest has ``longest`` tokens."""
        if self.pad_to_seq_length and not self.padding_free:
            return self.seq_length
        return -(-max(longest, 1) // self.pad_multiple) * self.pad_multiple

    def rows(self, lengths: Sequence[int]) -> list[list[int]]:
        """Of this rank's rows, the sample numbers (in the global batch) that lie in each; ``lengths`` of all samples."""
        size = self.micro_batch_size
        if self.padding_free:
            return deal(spread(lengths, self.global_batch_size // size, size), lengths, self.dp_size)[self.dp_rank]
        numbers = np.arange(self.global_batch_size).reshape(-1, self.dp_size, size)[:, self.dp_rank].reshape(-1)
        return [[number] for number in numbers.tolist()]


BatchMaker = Callable[[Any, npt.NDArray[np.int64], BatchShape], StepBatch]
"""The rows of a rank in a global batch, from a data set and the numbers of its samples (-1: none)."""


class StepBatches:
    """Endless training batches, from sample number ``start_sample`` of the stream on (a multiple of the global batch size or not).

    ``prefetch``: a thread prepares the next batch meanwhile. ``num_skipped_samples`` and ``num_cut_samples`` count over
    the batches handed out. ``make``: how a batch is made of the data set.
    """

    def __init__(
        self,
        dataset: Any,
        indices: Sequence[int],
        seed: int,
        shuffle: bool,
        micro_batch_size: int,
        global_batch_size: int,
        dp_rank: int,
        dp_size: int,
        seq_length: int,
        pad_to_seq_length: bool,
        pad_multiple: int,
        pad_token_id: int,
        start_sample: int = 0,
        prefetch: bool = True,
        documents: DocumentRule | None = None,
        make: BatchMaker | None = None,
        padding_free: bool = False,
    ) -> None:
        if not len(indices):
            raise UsageError("--split leaves no sample for training; use --split 100,0,0 or give more data")
        self.dataset, self.make = dataset, make or make_batch
        self.order = SampleOrder(indices, seed, shuffle)
        self.shape = BatchShape(
            micro_batch_size,
            global_batch_size,
            dp_rank,
            dp_size,
            seq_length,
            pad_to_seq_length,
            pad_multiple,
            pad_token_id,
            documents,
            padding_free,
        )
        self.next_sample = start_sample
        self.prefetch = prefetch
        self.num_skipped_samples = 0
        self.num_cut_samples = 0

    def __iter__(self) -> Iterator[StepBatch]:
        if not self.prefetch:
            while True:
                yield self._hand_out(self._make(self.next_sample))
        with ThreadPoolExecutor(1, "batches") as pool:
            pending = pool.submit(self._make, self.next_sample)
            while True:
                batch = pending.result()
                pending = pool.submit(self._make, self.next_sample + self.shape.global_batch_size)
                yield self._hand_out(batch)

    def _make(self, start: int) -> StepBatch:
        return self.make(self.dataset, self.order.slice(start, self.shape.global_batch_size), self.shape)

    def _hand_out(self, batch: StepBatch) -> StepBatch:
        self.next_sample += self.shape.global_batch_size
        self.num_skipped_samples += batch.skipped_samples
        self.num_cut_samples += batch.cut_samples
        return batch


class EvalBatches:
    """Every sample of ``indices`` once, in order, in global batches; rows that fill up the last one are ignored (labels -100).

    ``max_batches``: stop after so many. Iterating again starts from the beginning.
    """

    def __init__(
        self, dataset: Any, indices: Sequence[int], shape: BatchShape, max_batches: int | None = None, make: BatchMaker | None = None
    ) -> None:
        self.dataset, self.make = dataset, make or make_batch
        self.indices = np.asarray(indices, np.int64)
        self.shape = shape
        batches = -(-len(self.indices) // shape.global_batch_size)
        self.num_batches = batches if max_batches is None else min(batches, max_batches)

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[StepBatch]:
        size = self.shape.global_batch_size
        for number in range(self.num_batches):
            samples = np.full(size, _NO_SAMPLE, np.int64)
            piece = self.indices[number * size : (number + 1) * size]
            samples[: len(piece)] = piece
            yield self.make(self.dataset, samples, self.shape)


class SampleOrder:
    """The endless stream of sample numbers; only the epochs in use are held."""

    def __init__(self, indices: Sequence[int], seed: int, shuffle: bool) -> None:
        self.indices = np.asarray(indices, np.int64)
        self.shuffle = shuffle
        self.seed = seed
        self._restart()

    def _restart(self) -> None:
        self._random = np.random.RandomState(self.seed)
        self._epoch = -1
        self._order = self.indices

    def epoch(self, number: int) -> npt.NDArray[np.int64]:
        """Sample numbers of epoch ``number`` (from 0), in order."""
        if not self.shuffle:
            return self.indices
        if number < self._epoch:
            self._restart()
        while self._epoch < number:
            self._order = self.indices.copy()
            self._random.shuffle(self._order)
            self._epoch += 1
        return self._order

    def slice(self, start: int, count: int) -> npt.NDArray[np.int64]:
        """``count`` sample numbers from position ``start`` of the stream."""
        pieces = []
        while count:
            epoch, offset = divmod(start, len(self.indices))
            piece = self.epoch(epoch)[offset : offset + count]
            pieces.append(piece)
            start += len(piece)
            count -= len(piece)
        return np.concatenate(pieces)


def make_batch(dataset: Rows, samples: npt.NDArray[np.int64], shape: BatchShape) -> StepBatch:
    """The rows of this rank in the global batch ``samples`` [G] (-1: a row to be ignored).

    With documents, the first token of one is no target: the token before it belongs to another one.
    """
    real = samples >= 0
    full_lengths = np.where(real, dataset.lengths[samples], 0)
    lengths = np.minimum(full_lengths, shape.seq_length)
    ends = [_document_ends(dataset, int(sample), int(length), shape.documents) for sample, length in zip(samples, lengths, strict=True)]
    targets = [_targets(dataset, int(sample), int(length), end) for sample, length, end in zip(samples, lengths, ends, strict=True)]
    trained = np.array([np.count_nonzero(target != IGNORED) for target in targets], np.int64)
    used = [int(end[-1]) if len(end) else 0 for end in ends] if shape.padding_free else lengths.tolist()
    rows, size = shape.rows(used), 1 if shape.padding_free else shape.micro_batch_size
    row_lengths = [sum(used[number] for number in row) for row in rows]
    columns = tuple(shape.padded_length(max(row_lengths[start : start + size])) for start in range(0, len(rows), size))
    width = max(columns) if shape.padding_free else shape.padded_length(int(lengths.max()))
    input_ids = np.full((len(rows), width), shape.pad_token_id, np.int64)
    labels = np.full((len(rows), width), IGNORED, np.int64)
    row_ends = []
    for row, numbers in enumerate(rows):
        starts = [0, *itertools.accumulate(used[number] for number in numbers)]
        for number, start in zip(numbers, starts, strict=False):
            length = used[number]
            if length:
                input_ids[row, start : start + length] = dataset.input_ids[int(samples[number])][:length]
                labels[row, start : start + length - 1] = targets[number][: length - 1]
        row_ends.append(np.concatenate([ends[number] + start for number, start in zip(numbers, starts, strict=False)]).astype(np.int32))
    row_trained = [sum(int(trained[number]) for number in row) for row in rows]
    return StepBatch(
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        num_trained_tokens=int(trained.sum()),
        micro_batch_trained_tokens=tuple(sum(row_trained[start : start + size]) for start in range(0, len(rows), size)),
        num_real_tokens=sum(int(end[-1]) for end in ends if len(end)),
        sample_ids=tuple(int(sample) for sample in samples),
        skipped_samples=int((real & (trained == 0)).sum()),
        cut_samples=int((full_lengths > shape.seq_length).sum()),
        micro_batch_size=size,
        row_trained_tokens=tuple(row_trained),
        row_real_tokens=tuple(sum(int(ends[number][-1]) for number in row if len(ends[number])) for row in rows),
        columns=columns,
        num_documents=sum(len(end) for end in ends),
        document_ends=_ends_tensor(row_ends, width) if shape.documents is not None or shape.padding_free else None,
    )


def _document_ends(dataset: Any, sample: int, length: int, documents: DocumentRule | None) -> npt.NDArray[np.int32]:
    """Ends of a sample's documents, padding left out; empty for a row that only fills up."""
    if sample < 0 or not length:
        return np.empty(0, np.int32)
    return np.array([length], np.int32) if documents is None else documents.ends(dataset, sample, length)


def _targets(dataset: Rows, sample: int, length: int, ends: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """``[length - 1]``: the trained id that follows each position in its document, -100 elsewhere."""
    if sample < 0:
        return np.empty(0, np.int32)
    targets = dataset.labels[sample][1:length].astype(np.int32)
    targets[ends[ends < length] - 1] = IGNORED
    return targets


def _ends_tensor(ends: Sequence[npt.NDArray[np.int32]], columns: int) -> torch.Tensor:
    """int32 ``[rows, n]``: ``ends`` and then ``columns``, the end of the padding, until all rows are as long."""
    table = np.full((len(ends), max(len(row) for row in ends) + 1), columns, np.int32)
    for number, row in enumerate(ends):
        table[number, : len(row)] = row
    last = int((table != columns).sum(1).max(initial=0)) + 1
    return torch.from_numpy(table[:, :last].copy())
