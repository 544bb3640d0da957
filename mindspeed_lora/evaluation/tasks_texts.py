"""Benchmarks in JSON files: GSM8K, BoolQ, HellaSwag, BIG-Bench Hard, AGIEval, HumanEval.

```
gsm8k       <root>/test.jsonl             question, answer ("... #### 42"); examples in train.jsonl
boolq       <root>/dev.jsonl              passage, question, answer (true or false); examples in train.jsonl
hellaswag   <root>/hellaswag_val.jsonl    activity_label, ctx_a, ctx_b, endings, label; examples in hellaswag_train.jsonl
bbh         <root>/{task}.json            {"examples": [{"input", "target"}]}; the package brings the solved examples
agieval     <root>/{task}.jsonl           passage, question, options, label, answer
humaneval   <root>/HumanEval.jsonl[.gz]   task_id, prompt, entry_point, test
```

BoolQ and HellaSwag may also be one jsonl file of query, choices and gold (llm-foundry's layout).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mindspeed_lora.errors import DataError
from mindspeed_lora.evaluation.package import TaskSettings, check_fewshot, read_settings, tasks_folder, with_rows
from mindspeed_lora.evaluation.rows import check_row, find_root, json_rows

Row = dict[str, Any]
QUERY_KEYS: dict[str, type | tuple[type, ...]] = {"query": str, "choices": list, "gold": int}
TEXT_OR_NONE = (str, type(None))


def _examples(file: Path, num_fewshot: int, read: Callable[[Path], list[Row]]) -> dict[str, list[Row]]:
    """The split of solved examples, where some are asked for."""
    if not num_fewshot:
        return {}
    rows = read(file)
    check_fewshot(num_fewshot, len(rows), str(file))
    return {"train": rows}


def load_gsm8k(path: Path, num_fewshot: int, source: str) -> list[TaskSettings]:
    """One task; answers are generated."""
    root = find_root("gsm8k", path, ("data", "gsm8k", "grade_school_math/data"), "test.jsonl", "test.jsonl and train.jsonl", source)

    def read(file: Path) -> list[Row]:
        return [row for _, row in json_rows(file, {"question": str, "answer": str})]

    splits = {"test": read(root / "test.jsonl"), **_examples(root / "train.jsonl", num_fewshot, read)}
    return [with_rows(read_settings("gsm8k/gsm8k.yaml"), splits, num_fewshot)]


def load_boolq(path: Path, num_fewshot: int, source: str) -> list[TaskSettings]:
    """One task: "yes" against "no"."""
    root = find_root("boolq", path, ("boolq", "reading_comprehension"), "*.jsonl", "dev.jsonl (passage, question, answer)", source)
    file = next((root / name for name in ("dev.jsonl", "val.jsonl", "boolq.jsonl") if (root / name).is_file()), None)
    if file is None:
        raise DataError(f"--task-data-path {path}: holds no dev.jsonl of boolq (nor val.jsonl, boolq.jsonl); {source}")
    splits = {"validation": _boolq_rows(file), **_examples(root / "train.jsonl", num_fewshot, _boolq_rows)}
    return [with_rows(read_settings("super_glue/boolq/default.yaml"), splits, num_fewshot)]


def _boolq_rows(file: Path) -> list[Row]:
    rows = []
    for line, row in json_rows(file, {}):
        if "query" in row:
            row = _boolq_query(row, f"{file}, line {line}")
        check_row(row, {"passage": str, "question": str, "answer": bool}, f"{file}, line {line}")
        rows.append({"passage": row["passage"], "question": row["question"], "label": int(row["answer"])})
    return rows


def _boolq_query(row: Row, where: str) -> Row:
    check_row(row, QUERY_KEYS, where)
    match = re.match(r"Passage: (.*)\nQuestion: (.*)\?\n?", row["query"], flags=re.DOTALL)
    answers = [str(choice).strip().lower() for choice in row["choices"]]
    if match is None or sorted(answers) != ["no", "yes"]:
        raise DataError(f"{where}: expected a query 'Passage: ..\\nQuestion: ..?' and the choices yes and no")
    return {"passage": match[1], "question": match[2], "answer": answers[row["gold"]] == "yes"}


def load_hellaswag(path: Path, num_fewshot: int, source: str) -> list[TaskSettings]:
    """One task: which of four endings."""
    expected = "hellaswag_val.jsonl (activity_label, ctx_a, ctx_b, endings, label)"
    root = find_root("hellaswag", path, ("data", "hellaswag"), "hellaswag*.jsonl", expected, source)
    file = next((root / name for name in ("hellaswag_val.jsonl", "hellaswag.jsonl") if (root / name).is_file()), None)
    if file is None:
        raise DataError(f"--task-data-path {path}: holds no {expected}; {source}")
    settings = read_settings("hellaswag/hellaswag.yaml")
    rows = _hellaswag_rows(file)
    if "query" in rows[0]:
        settings.pop("process_docs")  # it makes query, choices and gold; they are here already
    splits = {"validation": rows, **_examples(root / "hellaswag_train.jsonl", num_fewshot, _hellaswag_rows)}
    return [with_rows(settings, splits, num_fewshot)]


def _hellaswag_rows(file: Path) -> list[Row]:
    keys: dict[str, type | tuple[type, ...]] = {"activity_label": str, "ctx_a": str, "ctx_b": str, "endings": list, "label": (int, str)}
    rows: list[Row] = []
    for line, row in json_rows(file, {}):
        where = f"{file}, line {line}"
        if "query" in row:
            check_row(row, QUERY_KEYS, where)
            rows.append({"query": row["query"], "choices": list(map(str, row["choices"])), "label": row["gold"]})
        else:
            check_row(row, keys, where)
            rows.append({**{key: row[key] for key in keys}, "label": str(row["label"])})
        endings, label = rows[-1].get("endings") or rows[-1].get("choices") or [], int(rows[-1]["label"])
        if rows[-1].keys() != rows[0].keys() or not 0 <= label < len(endings):
            raise DataError(f"{where}: label {label} of {len(endings)} endings; expected one layout, and a label that counts from 0")
    return rows


def load_bbh(variant: str) -> Callable[[Path, int, str], list[TaskSettings]]:
    """One task per file; ``variant``: the package's folder of prompts."""

    def load(path: Path, num_fewshot: int, source: str) -> list[TaskSettings]:
        root = find_root("bbh", path, ("bbh", "data"), "*.json", '<task>.json ({"examples": [{"input", "target"}]})', source)
        return [_bbh_task(variant, file, num_fewshot) for file in sorted(root.glob("*.json"))]

    return load


def _bbh_task(variant: str, file: Path, num_fewshot: int) -> TaskSettings:
    name = f"bbh/{variant}/{file.stem}.yaml"
    if not (tasks_folder() / name).is_file():
        raise DataError(f"{file}: lm_eval has no task of BIG-Bench Hard of this name; keep only the benchmark's 27 files in the folder")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: not JSON ({error}); get the file again") from error
    examples = check_row(content, {"examples": list}, str(file))["examples"]
    if not examples:
        raise DataError(f"{file}: has no examples")
    rows = [check_row(row, {"input": str, "target": str}, f"{file}, example {index}") for index, row in enumerate(examples, start=1)]
    settings = read_settings(name)
    check_fewshot(num_fewshot, len((settings.get("fewshot_config") or {}).get("samples") or ()), f"lm_eval's {name}")
    splits = {"test": [{"input": row["input"], "target": row["target"]} for row in rows]}
    return with_rows(settings, splits, num_fewshot, task_alias=file.stem)


CHINESE = ("gaokao", "jec-qa", "logiqa-zh")
NOT_CHINESE = ("gaokao-english",)


def load_agieval(path: Path, num_fewshot: int, source: str) -> list[TaskSettings]:
    """One task per file; prompts are AGIEval's own zero-shot prompts (source: its ``dataset_loader.py``), as lm_eval's rows have them."""
    root = find_root("agieval", path, ("data/v1", "v1", "agieval"), "*.jsonl", "<task>.jsonl (passage, question, options, label)", source)
    check_fewshot(num_fewshot, 0, "agieval (lm_eval asks it without examples)")
    tasks = []
    for file in sorted(root.glob("*.jsonl")):
        name = f"agieval/{file.stem}.yaml"
        if not (tasks_folder() / name).is_file():
            raise DataError(f"{file}: lm_eval has no task of AGIEval of this name; keep only the benchmark's files in the folder")
        rows = [
            _agieval_row(row, file.stem, f"{file}, line {line}")
            for line, row in json_rows(file, {"question": str, "passage": TEXT_OR_NONE})
        ]
        tasks.append(with_rows(read_settings(name), {"test": rows}, 0, task_alias=file.stem))
    return tasks


def _agieval_row(row: Row, task: str, where: str) -> Row:
    chinese = task.startswith(CHINESE) and not task.startswith(NOT_CHINESE)
    begin = (row["passage"] or "") + ("问题：" if chinese else "Q: ") + row["question"]
    if not row.get("options"):
        check_row(row, {"answer": str}, where)
        return {"query": begin + ("\n答案：" if chinese else "\nA: The answer is"), "answer": row["answer"]}
    options = check_row(row, {"options": list, "label": (str, list)}, where)["options"]
    last = chr(ord("A") + len(options) - 1)
    # jec-qa has rows whose label is an empty list: nothing is right there, as in lm_eval's own rows
    gold = sorted({ord(letter) - ord("A") for letter in "".join(row["label"]) if letter.isalpha()})
    if (not gold and row["label"] != []) or any(not 0 <= index < len(options) for index in gold):
        raise DataError(f"{where}: the label is {row['label']!r}, expected letters from A to {last}")
    asked = (
        f"选项：{' '.join(options)}\n答案：从A到{last}, 我们应选择"
        if chinese
        else (f"Answer Choices: {' '.join(options)}\nA: Among A through {last}, the answer is")
    )
    return {"query": f"{begin} {asked}", "choices": options, "gold": gold}
