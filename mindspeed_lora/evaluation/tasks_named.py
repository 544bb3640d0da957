"""Any other task of lm_eval's by its name, group or tag; its data set from a local folder or the ``datasets`` cache, never the network.

```
<--task-data-path>/<name of the data set>   such as openbookqa for allenai/openbookqa: what `hf download` makes, or plain
<--task-data-path>                          parquet, json, jsonl or csv files named by split (validation.jsonl, ...)
```
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindspeed_lora.errors import DataError, MindSpeedLoraError, UsageError
from mindspeed_lora.evaluation.package import read_yaml

if TYPE_CHECKING:
    from datasets import DatasetDict
    from lm_eval.tasks import TaskManager


def load_named(name: str, path: Path | None, known: tuple[str, ...]) -> dict[str, Any]:
    """lm_eval's own tasks and groups of that name, over local rows.

    Raises:
        UsageError: lm_eval knows no such task (``known``: the benchmarks that are read here).
        DataError: the data set is not on this machine; says what was expected where.
    """
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    entry = manager.task_index.get(name)
    if entry is None:
        near = difflib.get_close_matches(name, [*known, *manager.all_tasks], n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise UsageError(f"--task {name}: neither a benchmark that is read here ({', '.join(known)}) nor a task of lm_eval's{hint}")
    rows = {"custom_dataset": local_dataset(name, path)}
    try:
        return dict(manager.load([{"group": f"named {name}", "task": [{**spec, **rows} for spec in _specs(manager, name)]}]))
    except MindSpeedLoraError:
        raise
    except Exception as error:  # a task's own code: whatever it raises, the user needs to know which task and why
        raise DataError(f"--task {name}: lm_eval could not set it up here ({type(error).__name__}: {_first_line(error)})") from error


def _specs(manager: TaskManager, name: str) -> list[dict[str, str]]:
    """A tag stands for its tasks."""
    entry = manager.task_index[name]
    kind = entry.kind.name
    if kind == "TAG":
        return [{"task": task} for task in sorted(entry.tags)]
    return [{"group" if kind == "GROUP" else "task": name}]


def local_dataset(name: str, path: Path | None) -> Callable[..., DatasetDict]:
    """What lm_eval calls instead of downloading. It passes the task's metadata, in which it notes the file of its configuration."""

    def load(config_source: str = "", **_: Any) -> DatasetDict:
        settings = read_yaml(Path(config_source), lambda folder, function: None) if Path(config_source).is_file() else {}
        return read_dataset(name, settings.get("dataset_path"), settings.get("dataset_name"), path)

    return load


def read_dataset(task: str, dataset: str | None, config: str | None, path: Path | None) -> DatasetDict:
    """The data set of a task, from below ``path``, else from the cache.

    Raises:
        DataError: it is in neither.
    """
    import datasets

    if dataset is None:
        raise DataError(f"--task {task}: this task makes its own data set, which is not supported here; name another task")
    short = dataset.rpartition("/")[2]
    folders = [] if path is None else [folder for folder in (path / dataset, path / short, path) if folder.is_dir()]
    try:
        if folders:
            return _load(datasets, str(folders[0]), config)
        return datasets.load_dataset(dataset, config)
    except Exception as error:
        cache = "it is not in the cache of datasets (HF_HOME), and nothing is downloaded"
        where, below = f"{folders[0]} could not be read" if folders else cache, path or Path("<--task-data-path>")
        raise DataError(
            f"--task {task} needs the data set {dataset}{f', configuration {config}' if config else ''}: {where} "
            f"({type(error).__name__}: {_first_line(error)}). Expected {below / short}/ as `hf download --repo-type dataset {dataset}` "
            "makes it, or parquet, json, jsonl or csv files there named by split (train, validation, test)"
        ) from error


def _load(datasets: Any, folder: str, config: str | None) -> DatasetDict:
    """Plain files have no configurations of their own."""
    names = datasets.get_dataset_config_names(folder)
    loaded: DatasetDict = datasets.load_dataset(folder, config if config in names else None)
    return loaded


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]
