"""Records from parquet, arrow, json, jsonl, csv and txt files, or from a folder of one kind of them, one after the other.

A record is a dict; csv values are texts as they stand in the file, a line of a txt file is the column ``text``. Something
that is no record (a broken line, a value that is no object) comes as a :class:`BrokenRecord`, so that numbers stay true
and the report can name it. No file is ever whole in memory.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindspeed_lora.data.json_array import iterate_array
from mindspeed_lora.errors import DataError, UsageError

_MAX_CSV_FIELD = 2**31 - 1
_COUNT_BYTES = 1 << 22
_COUNTED_BYTES = 1 << 28  # larger text files are not read once more to know how many lines they have
_ROWS = 1000  # of a columnar file, turned into dicts at a time


@dataclass(frozen=True)
class BrokenRecord:
    """What stands where a record should be: why it is none and, where a number does not say it, the place in the file."""

    reason: str
    where: str = ""


Record = dict[str, Any] | BrokenRecord


@dataclass(frozen=True)
class RecordSource:
    """Input files of one format, in the order they are read."""

    files: tuple[Path, ...]
    extension: str

    def records(self) -> Iterator[Record]:
        """The records, file after file.

        Raises:
            DataError: a file cannot be decoded or parsed at all.
        """
        for path in self.files:
            try:
                yield from _READERS[self.extension](path)
            except UnicodeDecodeError as error:
                raise DataError(f"{path}: not UTF-8 text (byte {error.start}); save the file as UTF-8") from error
            except OSError as error:
                raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error

    def columns(self, needed: set[str]) -> list[str]:
        """Sorted names of the columns; stops reading when all of ``needed`` have been seen."""
        if self.extension == "parquet":
            return sorted({name for path in self.files for name in _open_parquet(path).schema_arrow.names})
        found: set[str] = set()
        for record in self.records():
            if isinstance(record, dict):
                found.update(record)
                if needed <= found:
                    break
        return sorted(found)

    def count(self) -> int | None:
        """Number of records where it is cheap to know (about, for lines), for the progress bar."""
        if self.extension == "parquet":
            return sum(_open_parquet(path).metadata.num_rows for path in self.files)
        if self.extension in ("jsonl", "txt") and sum(path.stat().st_size for path in self.files) <= _COUNTED_BYTES:
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
        extension = _extension(path)
        if extension not in _READERS:
            raise UsageError(f"{flag} {path}: unknown extension {path.suffix or '(none)'!r}; known are {known}")
        return RecordSource((path,), extension)
    if not path.is_dir():
        raise UsageError(f"{flag} {path}: no such file or folder; nothing is downloaded, give a local {known} file")
    files = sorted(file for file in path.iterdir() if file.is_file() and _extension(file) in _READERS)
    if not files:
        raise UsageError(f"{flag} {path}: the folder holds no {known} file")
    counts = Counter(map(_extension, files))
    extension = max(counts, key=lambda kind: (counts[kind], kind != "txt"))  # a notes.txt beside one data file is no data
    return RecordSource(tuple(file for file in files if _extension(file) == extension), extension)


def _extension(path: Path) -> str:
    return path.suffix.lstrip(".").lower()


def _open_parquet(path: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file: {str(error).splitlines()[0]}") from error


def _read_parquet(path: Path) -> Iterator[Record]:
    import pyarrow

    try:
        for batch in _open_parquet(path).iter_batches(_ROWS):
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: damaged parquet file: {str(error).splitlines()[0]}") from error


def _read_arrow(path: Path) -> Iterator[Record]:
    """Arrow's file format, or its stream format, which the ``datasets`` library writes."""
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as file:
            is_file = file.read(6) == b"ARROW1"
            file.seek(0)
            reader = pyarrow.ipc.open_file(file) if is_file else pyarrow.ipc.open_stream(file)
            batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
            for batch in batches:
                for start in range(0, len(batch), _ROWS):
                    yield from batch.slice(start, _ROWS).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable arrow file: {str(error).splitlines()[0]}") from error


def _read_json(path: Path) -> Iterator[Record]:
    """A JSON list of objects, or (as many .json files are) one object a line."""
    with path.open(encoding="utf-8-sig") as file:
        head = file.read(1)
        while head.isspace():
            head = file.read(1)
        if not head:
            return
        if head != "[":
            yield from _read_jsonl(path)
            return
    with path.open(encoding="utf-8-sig") as file:
        try:
            yield from map(_as_record, iterate_array(file))
        except UnicodeDecodeError:
            raise
        except ValueError as error:
            raise DataError(f"{path}: not valid JSON: {error}; the file is truncated or damaged") from error


def _read_jsonl(path: Path) -> Iterator[Record]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except ValueError:
                yield BrokenRecord("line is no JSON", f"{path.name} line {number}")
            else:
                yield _as_record(value)


def _as_record(value: Any) -> Record:
    return value if isinstance(value, dict) else BrokenRecord(f"a JSON {type(value).__name__} instead of an object")


def _read_csv(path: Path) -> Iterator[Record]:
    csv.field_size_limit(_MAX_CSV_FIELD)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    yield BrokenRecord("row has another number of columns than the header", f"{path.name} line {reader.line_num}")
                else:
                    yield dict(row)
        except csv.Error as error:
            raise DataError(f"{path}: line {reader.line_num}: not valid CSV: {error}") from error


def _read_txt(path: Path) -> Iterator[Record]:
    with path.open(encoding="utf-8-sig") as file:
        for line in file:
            yield {"text": line.removesuffix("\n")}


def _count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(_COUNT_BYTES), b""))


_READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    "parquet": _read_parquet,
    "arrow": _read_arrow,
    "json": _read_json,
    "jsonl": _read_jsonl,
    "csv": _read_csv,
    "txt": _read_txt,
}
EXTENSIONS = tuple(_READERS)
"""Of files that can be read, without the dot."""
