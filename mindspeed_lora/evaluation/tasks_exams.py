"""Exams in CSV files, one per subject: MMLU, C-Eval, CMMLU.

```
mmlu   <root>/test/{subject}_test.csv   question,A,B,C,D,answer            no header; examples in dev/{subject}_dev.csv
ceval  <root>/val/{subject}_val.csv     id,question,A,B,C,D,answer         examples in dev/{subject}_dev.csv (and an explanation)
cmmlu  <root>/test/{subject}.csv        ,Question,A,B,C,D,Answer           examples in dev/{subject}.csv
```

The first rows of the dev file stand in front of each question. Subjects that the package does not know get the same prompt with
their own name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindspeed_lora.evaluation.package import TaskSettings, check_fewshot, read_settings, tasks_folder, with_rows
from mindspeed_lora.evaluation.rows import csv_rows, find_root, letter_index

LETTERS = "ABCD"


@dataclass(frozen=True)
class Exam:
    """Where an exam's files are and how the package calls them.

    ``columns``: the file's names for question, choices and answer. ``convert``: a row as the package's template reads it.
    ``description``: for subjects that the package does not know.
    """

    name: str
    split: str
    suffix: str
    dev_suffix: str
    columns: tuple[str, ...]
    header: bool
    template: str
    settings: str
    task: str
    description: str
    convert: Callable[[dict[str, str], int], dict[str, Any]]

    @property
    def expected(self) -> str:
        """The files, below the root."""
        layout = ",".join(self.columns) + (" in a header row" if self.header else "; no header")
        return f"{self.split}/<subject>{self.suffix} and dev/<subject>{self.dev_suffix} ({layout})"

    def load(self, path: Path, num_fewshot: int, source: str) -> list[TaskSettings]:
        """One lm_eval task per subject; every file is read, and so checked, first.

        Raises:
            UsageError: more examples are asked for than a subject's dev file has.
            DataError: a file is missing or malformed.
        """
        root = find_root(self.name, path, ("data", self.name), f"{self.split}/*{self.suffix}", self.expected, source)
        return [self._subject(root, file, num_fewshot) for file in sorted((root / self.split).glob(f"*{self.suffix}"))]

    def _subject(self, root: Path, file: Path, num_fewshot: int) -> TaskSettings:
        subject = file.name.removesuffix(self.suffix)
        dev_file = root / "dev" / f"{subject}{self.dev_suffix}"
        examples = self.read(dev_file) if num_fewshot else []
        check_fewshot(num_fewshot, len(examples), str(dev_file))
        own = self.settings.format(subject=subject)
        known = (tasks_folder() / own).is_file()
        settings = read_settings(own if known else self.template)
        changes = {} if known else {"description": self.description.format(subject=subject.replace("_", " "))}
        splits = {self.split: self.read(file), **({"dev": examples} if examples else {})}
        return with_rows(settings, splits, num_fewshot, task=self.task.format(subject=subject), task_alias=subject, **changes)

    def read(self, file: Path) -> list[dict[str, Any]]:
        """Every row of one file, as the package's template reads it."""
        answer = self.columns[-1]
        return [
            self.convert(row, letter_index(row[answer], LETTERS, f"{file}, line {line}"))
            for line, row in csv_rows(file, self.columns, self.header)
        ]


def _mmlu_row(row: dict[str, str], answer: int) -> dict[str, Any]:
    return {"question": row["question"], "choices": [row[letter] for letter in LETTERS], "answer": answer}


MMLU = Exam(
    name="mmlu",
    split="test",
    suffix="_test.csv",
    dev_suffix="_dev.csv",
    columns=("question", *LETTERS, "answer"),
    header=False,
    template="mmlu/default/_default_template_yaml",
    settings="mmlu/default/mmlu_{subject}.yaml",
    task="mmlu_{subject}",
    description="The following are multiple choice questions (with answers) about {subject}.\n\n",
    convert=_mmlu_row,
)
CEVAL = Exam(
    name="ceval",
    split="val",
    suffix="_val.csv",
    dev_suffix="_dev.csv",
    columns=("question", *LETTERS, "answer"),
    header=True,
    template="ceval/_default_ceval_yaml",
    settings="ceval/ceval-valid_{subject}.yaml",
    task="ceval-valid_{subject}",
    description="以下是中国关于{subject}的单项选择题，请选出其中的正确答案。\n\n",
    convert=lambda row, answer: {**row, "answer": LETTERS[answer]},
)
CMMLU = Exam(
    name="cmmlu",
    split="test",
    suffix=".csv",
    dev_suffix=".csv",
    columns=("Question", *LETTERS, "Answer"),
    header=True,
    template="cmmlu/_default_template_yaml",
    settings="cmmlu/cmmlu_{subject}.yaml",
    task="cmmlu_{subject}",
    description="以下是关于{subject}的单项选择题，请直接给出正确答案的选项。\n\n",
    convert=lambda row, answer: {**row, "Answer": LETTERS[answer]},
)
