"""Several inputs as one stream of records.

``concat``: one after the other. ``interleave_under`` and ``interleave_over``: a record of each in turn, or of one drawn by
``--interleave-probs``; the stream ends when the first (under) or the last (over) input has been read to its end, and an
input that ends before starts again. The order is that of ``datasets.interleave_datasets`` with the same seed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from mindspeed_lora.arguments.configs import MixFlags
from mindspeed_lora.data.readers import Record, RecordSource, open_records
from mindspeed_lora.errors import DataError, UsageError

_DRAWS = 1000  # at a time, as in the library named above: another number would give another order


@dataclass(frozen=True)
class Mixture:
    """The inputs of one run, in the order in which they are named."""

    sources: tuple[RecordSource, ...]
    mix: MixFlags

    @property
    def files(self) -> tuple[Path, ...]:
        """All input files."""
        return tuple(path for source in self.sources for path in source.files)

    def batches(self, size: int) -> Iterator[list[Record]]:
        """Lists of up to ``size`` records.

        Raises:
            DataError: a file cannot be decoded or parsed at all.
        """
        records = self.records()
        while batch := list(itertools.islice(records, size)):
            yield batch

    def records(self) -> Iterator[Record]:
        """All records in the order of the mix."""
        if self.mix.strategy == "concat" or len(self.sources) == 1:
            return itertools.chain.from_iterable(map(self._of, self.sources))
        return self._interleaved()

    def count(self) -> int | None:
        """Number of records where it is cheap to know."""
        counts = [source.count() for source in self.sources]
        limit = self.mix.max_samples
        known = [count if limit is None else min(count, limit) for count in counts if count is not None]
        return sum(known) if len(known) == len(counts) and (self.mix.strategy == "concat" or len(counts) == 1) else None

    def _of(self, source: RecordSource) -> Iterator[Record]:
        return itertools.islice(source.records(), self.mix.max_samples)

    def _interleaved(self) -> Iterator[Record]:
        streams = [_Restarting(partial(self._of, source), source) for source in self.sources]
        finished = any if self.mix.strategy == "interleave_under" else all
        for place in self._places():
            yield streams[place].take()
            round_ends = self.mix.interleave_probs is not None or place == len(streams) - 1
            if round_ends and finished(stream.ended for stream in streams):
                return

    def _places(self) -> Iterator[int]:
        """Which input comes next, for ever."""
        if self.mix.interleave_probs is None:
            yield from itertools.cycle(range(len(self.sources)))
        draw = np.random.default_rng(self.mix.seed)
        while True:
            yield from draw.choice(len(self.sources), size=_DRAWS, p=self.mix.interleave_probs).tolist()


class _Restarting:
    """An input that begins again after its end, and knows whether that has come."""

    def __init__(self, start: Callable[[], Iterator[Record]], source: RecordSource) -> None:
        self._start = start
        self._stream = start()
        first = next(self._stream, None)
        if first is None:
            raise DataError(f"{source.files[0]}: no records in it, and an empty input cannot be interleaved")
        self._next = first
        self.ended = False

    def take(self) -> Record:
        """The next record."""
        taken, following = self._next, next(self._stream, None)
        if following is None:
            self.ended = True
            self._stream = self._start()
            following = next(self._stream)
        self._next = following
        return taken


def open_inputs(inputs: Path, mix: MixFlags, flag: str = "--input") -> Mixture:
    """The inputs of ``--input``: a file, a folder, or several with commas between them. ``flag``: what the messages call it.

    Raises:
        UsageError: an input is not there or of no known kind, or the probabilities do not fit the inputs.
    """
    names = [inputs] if inputs.exists() else [Path(name.strip()) for name in str(inputs).split(",") if name.strip()]
    if mix.dataset_dir is not None:
        names = [mix.dataset_dir / name for name in names]
    sources = tuple(open_records(name, flag) for name in names)
    probabilities = mix.interleave_probs
    if probabilities is None:
        return Mixture(sources, mix)
    text = ",".join(f"{value:g}" for value in probabilities)
    if mix.strategy == "concat":
        raise UsageError(f"--interleave-probs {text} has no meaning with --mix-strategy concat; use interleave_under or interleave_over")
    if len(probabilities) != len(sources):
        raise UsageError(f"--interleave-probs {text}: {len(probabilities)} probabilities for {len(sources)} inputs; give one for each")
    if min(probabilities) <= 0 or abs(sum(probabilities) - 1) > 1e-6:
        raise UsageError(f"--interleave-probs {text}: give probabilities above 0 that sum to 1; these sum to {sum(probabilities):g}")
    return Mixture(sources, mix)
