"""Records from files of every kind, arrays larger than what is held of them, and several inputs as one."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from data_helpers import write_json
from hypothesis import given
from hypothesis import strategies as st

from mindspeed_lora.arguments.configs import MixFlags
from mindspeed_lora.data import json_array
from mindspeed_lora.data.json_array import iterate_array
from mindspeed_lora.data.mixing import open_inputs
from mindspeed_lora.data.readers import BrokenRecord, open_records
from mindspeed_lora.errors import DataError, UsageError


@pytest.fixture
def small_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays are read a few characters at a time, so that values lie over every kind of edge."""
    monkeypatch.setattr(json_array, "_CHUNK", 3)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(st.lists(JSON, max_size=6), st.sampled_from([None, 1, "\t"]), st.booleans(), st.sampled_from([1, 2, 7, 1 << 20]))
def test_arrays_are_read_as_json_reads_them(values: list[Any], indent: Any, ascii_only: bool, chunk: int) -> None:
    text = "\n " + json.dumps(values, indent=indent, ensure_ascii=ascii_only) + " \n"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_array, "_CHUNK", chunk)
        assert list(iterate_array(io.StringIO(text))) == values


@pytest.mark.parametrize(
    ("text", "read", "message"),
    [
        ('[{"a": 1},\n {"a": 2', 1, r"line 2 column 9"),
        ('[{"a": 1}\n {"a": 2}]', 1, r"Expecting ',' or '\]' after a value: line 2 column 2"),
        ('[{"a": 1},\n {"a" 2}, ' + '"x", ' * 99, 1, r"Expecting ':' delimiter: line 2 column 7"),
        ('[{"a": 1},\n "open', 1, r"Unterminated string starting at: line 2 column 2"),
        ("[1, 2] 3", 2, r"Extra data after the array: line 1 column 8"),
        ("[1,]", 1, r"Expecting value: line 1 column 4"),
        ("[1", 1, r"Expecting ',' or '\]' after a value: line 1 column 3"),
        ("{}", 0, r"an array must begin with '\[': line 1 column 1"),
        ("[", 0, r"Expecting value: line 1 column 2"),
    ],
)
def test_broken_arrays_say_where(text: str, read: int, message: str, small_reads: None) -> None:
    values = iterate_array(io.StringIO(text))
    for _ in range(read):
        next(values)
    with pytest.raises(ValueError, match=message):
        next(values)


def test_an_array_is_never_whole_in_memory(tmp_path: Path) -> None:
    """Of 25 MB some chunks are held; json.loads would hold several times the text."""
    import tracemalloc

    path = tmp_path / "large.json"
    path.write_text("[" + ('{"a": "' + "x" * 990 + '"},\n') * 25_000 + "{}]")
    tracemalloc.start()
    count = sum(1 for _ in open_records(path).records())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 25_001
    assert peak < 8 << 20


def test_arrow_files_and_streams(tmp_path: Path) -> None:
    import pyarrow

    records = [{"text": f"text {number}", "tags": [number, None]} for number in range(2500)]
    table = pyarrow.Table.from_pylist(records)
    for name, writer in (("file", pyarrow.ipc.new_file), ("stream", pyarrow.ipc.new_stream)):
        path = tmp_path / f"{name}.arrow"
        with writer(str(path), table.schema) as sink:
            sink.write_table(table)
        assert list(open_records(path).records()) == records
    (tmp_path / "bad.arrow").write_bytes(b"nothing of the kind")
    with pytest.raises(DataError, match=r"bad.arrow: not a readable arrow file"):
        list(open_records(tmp_path / "bad.arrow").records())


def test_a_folder_of_data_beside_notes(tmp_path: Path) -> None:
    (tmp_path / "LICENSE.txt").write_text("free\n")
    write_json(tmp_path / "data.json", [{"a": 1}])
    assert list(open_records(tmp_path).records()) == [{"a": 1}]


def test_broken_lines_say_where(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n{"a": \n[1]\n')
    assert list(open_records(tmp_path / "a.jsonl").records()) == [
        {"a": 1},
        BrokenRecord("line is no JSON", "a.jsonl line 3"),
        BrokenRecord("a JSON list instead of an object"),
    ]
    (tmp_path / "a.csv").write_text("a,b\n1,2\n1\n")
    assert list(open_records(tmp_path / "a.csv").records()) == [
        {"a": "1", "b": "2"},
        BrokenRecord("row has another number of columns than the header", "a.csv line 3"),
    ]


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """Three files of 3, 7 and 5 records, named with commas between."""
    lengths = {"a": 3, "b": 7, "c": 5}
    paths = [
        write_json(tmp_path / f"{name}.json", [{"text": f"{name}{number}"} for number in range(count)]) for name, count in lengths.items()
    ]
    return Path(",".join(map(str, paths)))


def texts(inputs: Path, **mix: Any) -> list[str]:
    return [record["text"] for record in open_inputs(inputs, MixFlags(**mix)).records() if isinstance(record, dict)]


@pytest.mark.parametrize("strategy", ["interleave_under", "interleave_over"])
@pytest.mark.parametrize("probabilities", [None, (0.2, 0.5, 0.3), (0.01, 0.01, 0.98)])
@pytest.mark.parametrize("seed", [1234, 7])
def test_interleaving_is_the_librarys(inputs: Path, strategy: str, probabilities: tuple[float, ...] | None, seed: int) -> None:
    datasets = pytest.importorskip("datasets")
    parts = [datasets.Dataset.from_list(json.loads(Path(name).read_text())) for name in str(inputs).split(",")]
    stop = "first_exhausted" if strategy == "interleave_under" else "all_exhausted"
    expected = datasets.interleave_datasets(parts, probabilities=probabilities, seed=seed, stopping_strategy=stop)["text"]
    assert texts(inputs, strategy=strategy, interleave_probs=probabilities, seed=seed) == list(expected)


def test_concatenation_and_max_samples(inputs: Path, tmp_path: Path) -> None:
    assert texts(inputs, max_samples=2) == ["a0", "a1", "b0", "b1", "c0", "c1"]
    assert texts(inputs, max_samples=4, strategy="interleave_over") == [
        f"{name}{n % 3 if name == 'a' else n}" for n in range(4) for name in "abc"
    ]
    assert texts(Path("a.json, c.json"), dataset_dir=tmp_path) == [f"a{n}" for n in range(3)] + [f"c{n}" for n in range(5)]
    assert open_inputs(Path("a.json,c.json"), MixFlags(dataset_dir=tmp_path)).count() is None  # of JSON it is not cheap to know
    batches = list(open_inputs(inputs, MixFlags()).batches(4))
    assert [len(batch) for batch in batches] == [4, 4, 4, 3]


def test_a_name_with_a_comma_is_one_input(tmp_path: Path) -> None:
    path = write_json(tmp_path / "a,b.json", [{"text": "one"}])
    assert texts(path) == ["one"]


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ({"interleave_probs": (0.5, 0.5)}, r"--interleave-probs 0.5,0.5 has no meaning with --mix-strategy concat; use interleave_under"),
        ({"interleave_probs": (0.5, 0.5), "strategy": "interleave_over"}, r"0.5,0.5: 2 probabilities for 3 inputs; give one for each"),
        ({"interleave_probs": (0.5, 0.5, 0.5), "strategy": "interleave_over"}, r"probabilities above 0 that sum to 1; these sum to 1.5"),
    ],
)
def test_refused_mixtures(mix: dict[str, Any], message: str, inputs: Path) -> None:
    with pytest.raises(UsageError, match=message):
        open_inputs(inputs, MixFlags(**mix))


def test_an_input_that_is_missing_or_empty(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--input .*nothing.json: no such file or folder"):
        open_inputs(Path(f"{inputs},{tmp_path / 'nothing.json'}"), MixFlags())
    empty = write_json(tmp_path / "empty.json", [])
    with pytest.raises(DataError, match=r"empty.json: no records in it, and an empty input cannot be interleaved"):
        texts(Path(f"{inputs},{empty}"), strategy="interleave_under")
