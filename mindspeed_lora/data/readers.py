"""Records from parquet, json, jsonl and csv files, or from a folder of one kind of them, in batches.

A record is a dict; csv values are texts as they stand in the file. Something that is no record (a broken line, a value
that is no object) comes as a :class:`BrokenRecord`, so that numbers stay true and the report can name it.
"""

from __future__ import annotations

import csv
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindspeed_lora.errors import DataError, UsageError

_MAX_CSV_FIELD = 2**31 - 1
_COUNT_BYTES = 1 << 22


@dataclass(frozen=True)
class BrokenRecord:
    """What stands where a record should be, and why it is none."""

    reason: str


Record = dict[str, Any] | BrokenRecord


@dataclass(frozen=True)
class RecordSource:
    """Input files of one format, in the order they are read."""

    files: tuple[Path, ...]
    extension: str

    def batches(self, size: int) -> Iterator[list[Record]]:
        """Lists of up to ``size`` records, file after file.

        Raises:
            DataError: a file cannot be decoded or parsed at all.
        """
        for path in self.files:
            try:
                yield from _batches(_READERS[self.extension](path, size), size)
            except UnicodeDecodeError as error:
                raise DataError(f"{path}: not UTF-8 text (byte {error.start}); save the file as UTF-8") from error
            except OSError as error:
                raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error

    def columns(self, needed: set[str]) -> list[str]:
        """Sorted names of the columns; stops reading when all of ``needed`` have been seen."""
        if self.extension == "parquet":
            return sorted({name for path in self.files for name in _open_parquet(path).schema_arrow.names})
        found: set[str] = set()
        for batch in self.batches(1000):
            for record in batch:
                if isinstance(record, dict):
                    found.update(record)
            if needed <= found:
                break
        return sorted(found)

    def count(self) -> int | None:
        """Number of records where it is cheap to know (about, for jsonl), for the progress bar."""
        if self.extension == "parquet":
            return sum(_open_parquet(path).metadata.num_rows for path in self.files)
        if self.extension == "jsonl":
            return sum(_count_lines(path) for path in self.files)
        return None


def open_records(path: Path, flag: str = "--input") -> RecordSource:
    """Find the input files of ``--input``: one file, or a folder, of which the most common known extension is read, sorted by name.

    ``flag``: what the messages call it.

    Raises:
        UsageError: no such path, an unknown extension, or a folder without a known file.
    """
    path = Path(path)
    known = ", ".join(sorted(_READERS))
    if path.is_file():
        extension = path.suffix.lstrip(".").lower()
        if extension not in _READERS:
            raise UsageError(f"{flag} {path}: unknown extension {path.suffix or '(none)'!r}; known are {known}")
        return RecordSource((path,), extension)
    if not path.is_dir():
        raise UsageError(f"{flag} {path}: no such file or folder; nothing is downloaded, give a local {known} file")
    files = sorted(file for file in path.iterdir() if file.is_file() and file.suffix.lstrip(".").lower() in _READERS)
    if not files:
        raise UsageError(f"{flag} {path}: the folder holds no {known} file")
    extension = Counter(file.suffix.lstrip(".").lower() for file in files).most_common(1)[0][0]
    return RecordSource(tuple(file for file in files if file.suffix.lstrip(".").lower() == extension), extension)


def _batches(records: Iterable[Record], size: int) -> Iterator[list[Record]]:
    iterator = iter(records)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def _open_parquet(path: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file: {str(error).splitlines()[0]}") from error


def _read_parquet(path: Path, size: int) -> Iterator[Record]:
    import pyarrow

    try:
        for batch in _open_parquet(path).iter_batches(size):
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: damaged parquet file: {str(error).splitlines()[0]}") from error


def _read_json(path: Path, size: int) -> Iterator[Record]:
    """A JSON list of objects, or (as many .json files are) one object a line."""
    with path.open(encoding="utf-8-sig") as file:
        head = file.read(1)
        while head.isspace():
            head = file.read(1)
    if head and head != "[":
        yield from _read_jsonl(path, size)
        return
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig")) if head else []
    except ValueError as error:
        if isinstance(error, UnicodeDecodeError):
            raise
        raise DataError(f"{path}: not valid JSON: {error}; the file is truncated or damaged") from error
    for value in values:
        yield _as_record(value)


def _read_jsonl(path: Path, size: int) -> Iterator[Record]:
    with path.open(encoding="utf-8-sig") as file:
        for line in file:
            if not line.strip():
                continue
            try:
                yield _as_record(json.loads(line))
            except ValueError:
                yield BrokenRecord("line is no JSON")


def _as_record(value: Any) -> Record:
    return value if isinstance(value, dict) else BrokenRecord(f"a JSON {type(value).__name__} instead of an object")


def _read_csv(path: Path, size: int) -> Iterator[Record]:
    csv.field_size_limit(_MAX_CSV_FIELD)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                broken = None in row or None in row.values()
                yield BrokenRecord("row has another number of columns than the header") if broken else dict(row)
        except csv.Error as error:
            raise DataError(f"{path}: line {reader.line_num}: not valid CSV: {error}") from error


def _count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(_COUNT_BYTES), b""))


_READERS: dict[str, Callable[[Path, int], Iterator[Record]]] = {
    "parquet": _read_parquet,
    "json": _read_json,
    "jsonl": _read_jsonl,
    "csv": _read_csv,
}
EXTENSIONS = tuple(_READERS)
"""Of files that can be read, without the dot."""
