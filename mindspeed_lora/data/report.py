"""What preprocessing made of its input: counts, skipped records and why, lengths."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

import numpy as np

from mindspeed_lora.data.encoding import EncodedChunk
from mindspeed_lora.data.packing import IGNORED

_NUMBERS_SHOWN = 10
_BAR = 40  # characters of the histogram's longest bar


@dataclass
class PreprocessReport:
    """What became of the input. Record numbers count from 1, in the order in which the records are read."""

    num_records: int = 0
    num_written: int = 0
    num_tokens: int = 0
    num_trained_tokens: int = 0
    longest: int = 0
    num_packs: int | None = None  # samples of several records; None: not packed
    pack_length: int = 0
    skipped: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # reason: first records
    num_skipped: Counter[str] = field(default_factory=Counter)  # by reason
    notes: Counter[str] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)  # sequences by the power of two that is not below their length
    seconds: float = 0.0  # in all; what is neither of the next two went into checksums and moving the files
    start_seconds: float = 0.0  # until the first record
    loop_seconds: float = 0.0  # reading, encoding, writing

    def add(self, chunk: EncodedChunk) -> None:
        """Count one chunk."""
        for number, reason, where in chunk.skipped:
            self.num_skipped[reason] += 1
            if len(self.skipped[reason]) < _NUMBERS_SHOWN:
                self.skipped[reason].append(f"{self.num_records + number + 1}{where and f' ({where})'}")
        self.num_records += chunk.num_records
        self.num_written += chunk.num_written
        self.notes.update(chunk.notes)
        has_labels = any(key.endswith("labels") for key in chunk.sequences)
        for key, sequences in chunk.sequences.items():
            if key.endswith("labels"):
                self.num_trained_tokens += int(np.count_nonzero(sequences.ids != IGNORED))
                continue
            self.num_tokens += len(sequences.ids)
            self.num_trained_tokens += 0 if has_labels else len(sequences.ids)
            self.longest = max(self.longest, int(sequences.lengths.max(initial=0)))
            powers = np.ceil(np.log2(np.maximum(sequences.lengths, 1))).astype(np.int64)
            self.lengths.update({int(power): int(count) for power, count in enumerate(np.bincount(powers)) if count})

    def counts(self) -> dict[str, object]:
        """For the manifest."""
        return {
            "records": self.num_records,
            "written": self.num_written,
            "skipped": dict(self.num_skipped),
            "tokens": self.num_tokens,
            "trained_tokens": self.num_trained_tokens,
            "longest": self.longest,
            "lengths": {str(2**power): self.lengths[power] for power in sorted(self.lengths)},
            **({} if self.num_packs is None else {"packs": self.num_packs}),
            "notes": {note: count for note, count in self.notes.items() if count},
        }

    def lines(self) -> list[str]:
        """For people: one line a fact."""
        lines = [f"{self.num_records:,} records read, {self.num_written:,} written, {sum(self.num_skipped.values()):,} skipped"]
        lines += self.skipped_lines()
        lines += [f"  note: {count:,} {note}" for note, count in self.notes.items() if count]
        share = self.num_trained_tokens / max(self.num_tokens, 1)
        lines.append(f"{self.num_tokens:,} tokens, {share:.1%} of them trained; the longest record has {self.longest:,}")
        lines += self.histogram()
        if self.num_packs is not None:
            filled = self.num_tokens / max(self.num_packs * self.pack_length, 1)
            lines.append(f"packed into {self.num_packs:,} samples of {self.pack_length:,} tokens, {filled:.1%} of them filled")
        lines.append(
            f"{self.seconds:.1f} s, {self.start_seconds:.1f} s of them to start; "
            f"{self.num_records / max(self.loop_seconds, 1e-9):,.0f} records/s"
        )
        return lines

    def skipped_lines(self) -> list[str]:
        """One line for each reason: how many, and the first records."""
        lines = []
        for reason, count in self.num_skipped.most_common():
            numbers = ", ".join(self.skipped[reason]) + (", ..." if count > len(self.skipped[reason]) else "")
            lines.append(f"  skipped {count:,}: {reason} (record {numbers})")
        return lines

    def histogram(self) -> list[str]:
        """One line for each power of two: how many sequences are that long."""
        most = max(self.lengths.values(), default=1)
        lines = []
        for power in range(min(self.lengths, default=0), max(self.lengths, default=-1) + 1):
            count, low = self.lengths[power], 2 ** (power - 1) + 1 if power else 1
            lines.append(f"  {low:>7,} to {2**power:>7,} tokens: {count:>10,} {'#' * -(-count * _BAR // most)}".rstrip())
        return lines
