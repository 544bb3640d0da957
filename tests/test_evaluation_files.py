"""Reading every benchmark's own files: the published ones have the published sizes; what is malformed or missing is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import shared_data

from mindspeed_lora.errors import DataError, UsageError
from mindspeed_lora.evaluation.benchmarks import BENCHMARKS, canonical_name
from mindspeed_lora.evaluation.tasks_exams import MMLU
from mindspeed_lora.evaluation.tasks_texts import load_boolq, load_hellaswag

PUBLISHED = {  # (folder, tasks, items)
    "mmlu": ("mmlu", 57, 14042),
    "ceval": ("ceval", 52, 1346),
    "cmmlu": ("cmmlu", 67, 11582),
    "gsm8k": ("gsm8k", 1, 1319),
    "boolq": ("boolq", 1, 3270),
    "bbh": ("bbh", 27, 6511),
    "bbh_zeroshot": ("bbh", 27, 6511),
    "bbh_fewshot": ("bbh", 27, 6511),
    "bbh_cot_zeroshot": ("bbh", 27, 6511),
    "agieval": ("agieval", 21, None),
    "human_eval": ("humaneval", 1, 164),
}


def rows_of(task: dict[str, Any]) -> Any:
    splits = task["custom_dataset"]()
    return splits[task.get("test_split") or task["validation_split"]]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_files_have_the_published_sizes(name: str) -> None:
    folder, num_tasks, num_items = PUBLISHED[name]
    tasks = BENCHMARKS[name].tasks(shared_data() / folder, None)
    assert len(tasks) == num_tasks and len({task["task"] for task in tasks}) == num_tasks
    assert all("dataset_path" not in task and task["num_fewshot"] == BENCHMARKS[name].num_fewshot for task in tasks)
    if num_items is not None:
        assert sum(len(rows_of(task)) for task in tasks) == num_items


def test_every_benchmark_of_the_peer_has_a_name_here() -> None:
    peer = ("mmlu", "mmlu_ppl", "gsm8k", "boolq", "ceval", "cmmlu", "bbh", "agieval", "human_eval", "hellaswag")
    assert all(canonical_name(name) in BENCHMARKS for name in peer)


def test_a_prompt_is_the_packages_own_down_to_the_subjects_description() -> None:
    (task,) = [task for task in BENCHMARKS["ceval"].tasks(shared_data() / "ceval", None) if task["task"] == "ceval-valid_accountant"]
    assert task["description"] == "以下是中国关于注册会计师的单项选择题，请选出其中的正确答案。\n\n"
    assert rows_of(task)[0]["answer"] in "ABCD" and task["fewshot_config"] == {"sampler": "first_n"}


def test_agievals_prompts_are_its_own_zero_shot_prompts() -> None:
    tasks = {task["task_alias"]: task for task in BENCHMARKS["agieval"].tasks(shared_data() / "agieval", None)}
    english, chinese, cloze = (rows_of(tasks[name])[0] for name in ("lsat-ar", "gaokao-biology", "math"))
    assert english["query"].startswith("Of the eight students") and ".Q: Which one of" in english["query"]
    assert english["query"].endswith("\nA: Among A through E, the answer is") and " Answer Choices: (A)Mon." in english["query"]
    assert english["gold"] == [2] and english["choices"][0].startswith("(A)Mon.")
    assert chinese["query"].startswith("问题：") and chinese["query"].endswith("\n答案：从A到D, 我们应选择")
    assert cloze["query"].endswith("\nA: The answer is") and cloze["answer"] == "(3,4]"
    several = [row["gold"] for row in rows_of(tasks["gaokao-physics"])]
    assert any(len(gold) > 1 for gold in several)


def test_boolq_reads_the_query_layout_to_the_same_rows() -> None:
    plain = rows_of(load_boolq(shared_data() / "boolq", 0, "x")[0])
    query = rows_of(load_boolq(shared_data() / "llm-foundry-eval" / "scripts" / "eval" / "local_data", 0, "x")[0])
    assert plain["label"] == query["label"] and plain["passage"] == query["passage"] and plain["question"] == query["question"]


def test_hellaswag_reads_both_layouts(tmp_path: Path) -> None:
    original = {"activity_label": "Dog", "ctx_a": "A dog runs.", "ctx_b": "it", "endings": ["a [x] b", "c", "d", "e"], "label": 1}
    query = {"query": "Dog: A dog runs. It", "choices": ["a b", "c", "d", "e"], "gold": 1}
    for name, row in (("original", original), ("query", query)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "hellaswag_val.jsonl").write_text(json.dumps(row) + "\n")
    (first,), (second,) = (load_hellaswag(tmp_path / name, 0, "x") for name in ("original", "query"))
    processed = first["process_docs"](rows_of(first))[0]
    assert {key: processed[key] for key in ("query", "choices")} == {key: rows_of(second)[0][key] for key in ("query", "choices")}
    assert "process_docs" not in second


def test_one_folder_may_hold_the_benchmark_at_several_depths() -> None:
    for folder in ("mmlu", "mmlu/data", "mmlu/data/test"):
        assert len(MMLU.load(shared_data() / folder, 0, "x")) == 57


ROW = '"What is 1, ""really""?","a,b",b,c,d,C\n'


def mmlu(root: Path, test: str = ROW * 3, dev: str = ROW * 5) -> Path:
    for name, text in (("test", test), ("dev", dev)):
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name / f"sums_{name}.csv").write_text(text)
    return root


def one_file(name: str) -> Callable[[Path, str], Path]:
    def write(root: Path, text: str) -> Path:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
        return root

    return write


def test_rows_may_hold_commas_quotes_and_line_breaks_and_subjects_may_be_new(tmp_path: Path) -> None:
    (task,) = BENCHMARKS["mmlu"].tasks(mmlu(tmp_path, test='"two\nlines, and ""quotes""",1,2,3,4,b\n'), None)
    assert rows_of(task)[0] == {"question": 'two\nlines, and "quotes"', "choices": ["1", "2", "3", "4"], "answer": 1}
    assert task["task"] == "mmlu_sums" and "about sums" in task["description"]


@pytest.mark.parametrize(
    ("name", "write", "text", "words"),
    [
        ("mmlu", mmlu, ROW + '"a\nb",1,2,3,4,B\nonly,five,columns,here,A\n', ("sums_test.csv, line 4", "5 columns, expected 6")),
        ("mmlu", mmlu, ROW + "q,1,2,3,4,E\n", ("line 2", "'E', expected one of A, B, C, D")),
        ("mmlu", mmlu, ROW + '"never closed,1,2,3,4,A\n', ("line 2", "quotes")),
        ("mmlu", mmlu, "", ("has no rows",)),
        ("ceval", one_file("val/law_val.csv"), "id,question,A,B,C,answer\n1,q,a,b,c,A\n", ("law_val.csv, line 1", "no column D")),
        ("ceval", one_file("val/law_val.csv"), "id,question,A,B,C,D,answer\n1,q,a,b,c,A\n", ("line 2", "6 columns, expected 7")),
        ("cmmlu", one_file("test/law.csv"), ",Question,A,B,C,D,Answer\n0,q,a,b,c,d,\n", ("law.csv, line 2", "the answer is ''")),
        ("gsm8k", one_file("test.jsonl"), '{"question": "q", "answer": "#### 1"}\n{"question": "q"}\n', ("line 2", "has no 'answer'")),
        ("gsm8k", one_file("test.jsonl"), '{"question": "q", "answer": "#### 1"}\n\n{oops\n', ("line 3", "not JSON (column 2")),
        ("boolq", one_file("dev.jsonl"), '{"passage": "p", "question": "q", "answer": "yes"}\n', ("'answer' is str, expected bool",)),
        ("boolq", one_file("dev.jsonl"), '{"query": "q", "choices": ["yes", "no"], "gold": 0}\n', ("line 1", "Passage: ")),
        ("boolq", one_file("other.jsonl"), "{}\n", ("holds no dev.jsonl of boolq",)),
        ("hellaswag", one_file("hellaswag_val.jsonl"), '{"query": "q", "choices": ["a", "b"], "gold": 2}\n', ("label 2 of 2 endings",)),
        ("hellaswag", one_file("hellaswag_test.jsonl"), "{}\n", ("holds no hellaswag_val.jsonl",)),
        ("bbh", one_file("snarks.json"), '{"examples": [{"input": "q"}]}', ("example 1", "has no 'target'")),
        ("bbh", one_file("snarks.json"), "[", ("snarks.json: not JSON",)),
        ("bbh", one_file("snarks.json"), '{"examples": []}', ("has no examples",)),
        ("bbh", one_file("sneers.json"), '{"examples": []}', ("sneers.json: lm_eval has no task",)),
        ("agieval", one_file("aqua-rat.jsonl"), '{"passage": null, "question": "q", "options": ["1"], "label": "B"}\n', ("the label is",)),
        ("agieval", one_file("aqua-bat.jsonl"), "{}\n", ("lm_eval has no task of AGIEval",)),
        ("human_eval", one_file("HumanEval.jsonl"), '{"task_id": "1"}\n', ("line 1", "has no 'prompt'")),
        ("human_eval", one_file("other.jsonl"), "{}\n", ("holds no HumanEval.jsonl",)),
    ],
)  # fmt: skip
def test_malformed_rows_are_named_by_file_and_line(
    tmp_path: Path, name: str, write: Callable[[Path, str], Path], text: str, words: tuple[str, ...]
) -> None:
    with pytest.raises(DataError) as caught:
        BENCHMARKS[name].tasks(write(tmp_path, text), 0)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("name", BENCHMARKS)
def test_missing_files_say_what_was_expected_and_where_to_get_it(tmp_path: Path, name: str) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(DataError) as caught:
            BENCHMARKS[name].tasks(path, 0)
        assert all(word in str(caught.value) for word in (str(path), "expected", "get them from https://")), caught.value


def test_missing_and_too_few_examples_are_refused(tmp_path: Path) -> None:
    root = mmlu(tmp_path)
    with pytest.raises(UsageError, match=r"--num-fewshot 6: .*has only 5 rows"):
        BENCHMARKS["mmlu"].tasks(root, 6)
    (root / "dev" / "sums_dev.csv").unlink()
    with pytest.raises(DataError, match=r"sums_dev.csv: missing"):
        BENCHMARKS["mmlu"].tasks(root, None)
    assert BENCHMARKS["mmlu"].tasks(root, 0)[0]["num_fewshot"] == 0
    with pytest.raises(UsageError, match=r"--num-fewshot 4: .*has only 3 rows"):
        BENCHMARKS["bbh"].tasks(shared_data() / "bbh", 4)
    one_file("test.jsonl")(tmp_path / "g", '{"question": "q", "answer": "#### 1"}\n')
    with pytest.raises(DataError, match=r"train.jsonl: missing"):
        BENCHMARKS["gsm8k"].tasks(tmp_path / "g", 5)


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    (tmp_path / "HumanEval.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match=r"HumanEval.jsonl.gz: not readable"):
        BENCHMARKS["human_eval"].tasks(tmp_path, 0)


def test_the_page_has_the_table_of_benchmarks() -> None:
    page = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.count("|") == 8]
    table = {row[0].split()[0]: row for row in rows[2:]}
    assert table.keys() == BENCHMARKS.keys()
    for name, benchmark in BENCHMARKS.items():
        title = f"{name} ({', '.join(benchmark.also)})" if benchmark.also else name
        score = benchmark.metric if benchmark.filter == "none" else f"{benchmark.metric}, {benchmark.filter}"
        files = benchmark.files.replace("<", "&lt;").replace(">", "&gt;")
        row = table[name]
        assert row[:5] == [title, files, benchmark.lm_eval, score, str(benchmark.num_fewshot)] and row[6] == benchmark.source
        assert ("generated" in row[5]) == benchmark.generates and ("run" in row[5]) == benchmark.runs_code
