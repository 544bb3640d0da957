"""MMLU from its own CSV files, as lm_eval tasks: prompts, choices and metric are the package's, only the rows are read here.

```
<root>/test/{subject}_test.csv   question,A,B,C,D,answer (no header)
<root>/dev/{subject}_dev.csv     the same; the first 5 are the examples in front of each question
```
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindspeed_lora.errors import DataError, UsageError

if TYPE_CHECKING:
    from datasets import DatasetDict

LETTERS = ("A", "B", "C", "D")
USUAL_FEWSHOT = 5
_TEST, _DEV = "_test.csv", "_dev.csv"


@dataclass(frozen=True)
class Question:
    """One row; ``answer`` is the index of the right choice."""

    question: str
    choices: tuple[str, str, str, str]
    answer: int


def find_root(path: Path) -> Path:
    """The folder that holds ``test/``; ``path`` may also be that ``test/`` itself.

    Raises:
        DataError: no such folder, or no ``{subject}_test.csv`` in it; says what was expected and where.
    """
    path = Path(path)
    expected = f"expected {path}/test/<subject>_test.csv and {path}/dev/<subject>_dev.csv (question,A,B,C,D,answer; no header)"
    if not path.is_dir():
        raise DataError(f"--task-data-path {path}: no such folder; {expected}")
    for root in (path, path.parent):
        if (root / "test").is_dir() and (root == path or path.name == "test") and any((root / "test").glob(f"*{_TEST}")):
            return root
    nested = [folder for folder in (path / "data", path / "mmlu") if (folder / "test").is_dir()]
    hint = f"; did you mean {nested[0]}?" if nested else "; the original archive is hendrycks/test's data.tar"
    raise DataError(f"--task-data-path {path}: holds no MMLU files; {expected}{hint}")


def read_questions(path: Path) -> list[Question]:
    """Every row of one file.

    Raises:
        DataError: naming the file and the line of a row that has not six columns or no letter A to D at its end.
    """
    if not path.is_file():
        raise DataError(f"{path}: missing; it holds this subject's rows (question,A,B,C,D,answer; no header)")
    questions = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        line = 1
        try:
            for row in reader:
                if row:
                    questions.append(_question(row, path, line))
                line = reader.line_num + 1
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path}, line {line}: not readable as CSV ({error}); check the quotes and save it as UTF-8") from error
    if not questions:
        raise DataError(f"{path}: has no rows; expected question,A,B,C,D,answer (no header)")
    return questions


def _question(row: list[str], path: Path, line: int) -> Question:
    if len(row) != 6:
        raise DataError(f"{path}, line {line}: {len(row)} columns, expected 6 (question,A,B,C,D,answer); quote texts that contain commas")
    answer = row[5].strip().upper()
    if answer not in LETTERS:
        raise DataError(f"{path}, line {line}: the answer is {row[5]!r}, expected one of A, B, C, D")
    return Question(row[0], (row[1], row[2], row[3], row[4]), LETTERS.index(answer))


def mmlu_tasks(path: Path, num_fewshot: int | None) -> list[dict[str, Any]]:
    """One lm_eval task configuration per subject, named ``mmlu_{subject}``; every file is read, and so checked, first.

    Subjects that the published benchmark does not have are welcome: they get the same prompt with their own name.

    Raises:
        UsageError: more examples are asked for than a subject's dev file has.
        DataError: a file is missing or malformed.
    """
    root = find_root(path)
    fewshot = USUAL_FEWSHOT if num_fewshot is None else num_fewshot
    template = _template()
    if not fewshot:  # without examples the task must not name where they come from: lm_eval would look there
        template = {key: value for key, value in template.items() if key not in ("fewshot_split", "fewshot_config")}
    tasks = []
    for test_file in sorted((root / "test").glob(f"*{_TEST}")):
        subject = test_file.name.removesuffix(_TEST)
        dev_file = root / "dev" / f"{subject}{_DEV}"
        examples = read_questions(dev_file) if fewshot else []
        if len(examples) < fewshot:
            raise UsageError(f"--num-fewshot {fewshot}: {dev_file} has only {len(examples)} rows; pass at most that many")
        tasks.append(
            {
                **template,
                "task": f"mmlu_{subject}",
                "task_alias": subject,
                "description": f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n",
                "custom_dataset": _dataset(read_questions(test_file), examples),
                "num_fewshot": fewshot,
            }
        )
    return tasks


def _template() -> dict[str, Any]:
    """lm_eval's own configuration of an MMLU subject, less what would download it."""
    import lm_eval
    import yaml

    path = Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "default" / "_default_template_yaml"
    config: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {key: value for key, value in config.items() if key != "dataset_path"}


def _dataset(test: list[Question], dev: list[Question]) -> Callable[..., DatasetDict]:
    """What lm_eval calls instead of downloading; it passes the task's metadata, which changes nothing here."""

    def load(**metadata: Any) -> DatasetDict:
        from datasets import Dataset, DatasetDict

        def rows(questions: list[Question]) -> Dataset:
            return Dataset.from_dict(
                {
                    "question": [question.question for question in questions],
                    "choices": [list(question.choices) for question in questions],
                    "answer": [question.answer for question in questions],
                }
            )

        return DatasetDict({"test": rows(test), **({"dev": rows(dev)} if dev else {})})

    return load
