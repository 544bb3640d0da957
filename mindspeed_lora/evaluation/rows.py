"""Benchmarks' own files, row by row: every message names the file, the line, what was found and what was expected."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mindspeed_lora.errors import DataError


def find_root(name: str, path: Path, nested: Sequence[str], pattern: str, expected: str, source: str) -> Path:
    """The folder of which ``pattern`` matches files: ``path``, a folder of ``nested`` in it, or the parent of ``path`` where ``path``
    is the folder that the pattern begins with.

    Raises:
        DataError: there is none; says what was ``expected`` below it and where to get it (``source``).
    """
    inside = pattern.split("/")[0] if "/" in pattern else None
    candidates = [path, *(path / folder for folder in nested)]
    if inside is not None and path.name == inside:
        candidates.append(path.parent)
    for candidate in candidates:
        if candidate.is_dir() and any(candidate.glob(pattern)):
            return candidate
    raise DataError(f"--task-data-path {path}: holds no files of {name}; expected {path}/{expected}; {source}")


def csv_rows(path: Path, columns: Sequence[str], header: bool) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, row by ``columns``) of a CSV file. With ``header`` the first row names the columns, in any order, and there may be more;
    without, every row has exactly ``columns``.

    Raises:
        DataError: the file is missing, empty, not UTF-8, not CSV, or a row or the header has the wrong columns.
    """
    layout = ",".join(columns) + (" in a header row" if header else "; no header")
    lines = _csv_lines(path, layout)
    names: Sequence[str] = columns
    if header:
        line, first = next(lines, (1, []))
        names = [name.strip() for name in first]
        if missing := [column for column in columns if column not in names]:
            raise DataError(f"{path}, line {line}: the header {','.join(first) or '(none)'} has no column {', '.join(missing)}")
    count = 0
    for line, row in lines:
        if len(row) != len(names):
            raise DataError(
                f"{path}, line {line}: {len(row)} columns, expected {len(names)} ({','.join(names)}); quote texts that contain commas"
            )
        count += 1
        values = dict(zip(names, row, strict=True))
        yield line, {column: values[column] for column in columns}
    if not count:
        raise DataError(f"{path}: has no rows; expected {layout}")


def _csv_lines(path: Path, layout: str) -> Iterator[tuple[int, list[str]]]:
    if not path.is_file():
        raise DataError(f"{path}: missing; it holds this subject's rows ({layout})")
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader, line = csv.reader(file, strict=True), 1
        try:
            for row in reader:
                if row:
                    yield line, row
                line = reader.line_num + 1
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path}, line {line}: not readable as CSV ({error}); check the quotes and save it as UTF-8") from error


def json_rows(path: Path, keys: Mapping[str, type | tuple[type, ...]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, object) of a ``.jsonl`` file, plain or ``.gz``; each object has at least ``keys``, of these types.

    Raises:
        DataError: the file is missing, empty, no JSON lines, or a row lacks a key or has a value of another type.
    """
    expected = "expected one JSON object a line" + (f" with {', '.join(keys)}" if keys else "")
    if not path.is_file():
        raise DataError(f"{path}: missing; {expected}")
    count = 0
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8-sig") as file:
        for line, text in enumerate(_text_lines(path, file), start=1):
            if not text.strip():
                continue
            count += 1
            yield line, check_row(_object(text, path, line), keys, f"{path}, line {line}")
    if not count:
        raise DataError(f"{path}: has no rows; {expected}")


def _text_lines(path: Path, file: Any) -> Iterator[str]:
    try:
        yield from file
    except (UnicodeDecodeError, OSError, EOFError) as error:
        raise DataError(f"{path}: not readable ({error}); get the file again") from error


def _object(text: str, path: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {line}: not JSON (column {error.colno}: {error.msg})") from error


def check_row(row: Any, keys: Mapping[str, type | tuple[type, ...]], where: str) -> dict[str, Any]:
    """``row`` with at least ``keys``.

    Raises:
        DataError: beginning with ``where``.
    """
    if not isinstance(row, dict):
        raise DataError(f"{where}: {type(row).__name__}, expected an object with {', '.join(keys)}")
    for key, kind in keys.items():
        if key not in row:
            raise DataError(f"{where}: has no {key!r}; found {', '.join(map(str, row)) or 'nothing'}, expected {', '.join(keys)}")
        if not isinstance(row[key], kind):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            words = " or ".join("null" if one is type(None) else one.__name__ for one in kinds)
            raise DataError(f"{where}: {key!r} is {type(row[key]).__name__}, expected {words}")
    return row


def letter_index(text: str, letters: str, where: str) -> int:
    """Place of an answer's letter.

    Raises:
        DataError: it is no letter of ``letters``.
    """
    answer = text.strip().upper()
    if len(answer) != 1 or answer not in letters:
        raise DataError(f"{where}: the answer is {text!r}, expected one of {', '.join(letters)}")
    return letters.index(answer)
