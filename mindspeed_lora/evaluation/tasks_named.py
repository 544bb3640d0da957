"""Any other task of lm_eval's by its name, group or tag; its data set from a local folder or the ``datasets`` cache, never the network.

```
<--task-data-path>/<name of the data set>   such as openbookqa for allenai/openbookqa: what `hf download` makes, or plain
<--task-data-path>                          parquet, json, jsonl or csv files named by split (validation.jsonl, ...), in a
                                            folder of its own for each configuration where the data set has several
```
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindspeed_lora.errors import DataError, MindSpeedLoraError, UsageError
from mindspeed_lora.evaluation.package import read_yaml

if TYPE_CHECKING:
    from datasets import DatasetDict

_GROUP_ONLY = ("group", "group_alias", "task", "aggregate_metric_list", "metadata", "include", "tag")

Wanted = tuple[str, str | None]
"""A data set's name, and its configuration."""


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
        return dict(manager.load([{"group": f"named {name}", "task": [{**spec, **rows} for spec in _specs(manager.task_index, name)]}]))
    except MindSpeedLoraError:
        raise
    except Exception as error:  # a task's own code: whatever it raises, the user needs to know which task and why
        raise DataError(f"--task {name}: lm_eval could not set it up here ({type(error).__name__}: {_first_line(error)})") from error


def _specs(index: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """The tasks that a name stands for, each once: a task for itself, a tag or group for its members. lm_eval takes no rows for a group."""
    entry = index[name]
    if entry.kind.name == "TAG":
        return [{"task": task} for task in sorted(entry.tags)]
    if entry.kind.name != "GROUP":
        return [{"task": name}]
    specs = _members(index, read_yaml(entry.yaml_path, lambda folder, function: None), {})
    return list({spec["task"]: spec for spec in specs}.values())


def _members(index: Mapping[str, Any], group: Mapping[str, Any], outer: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A group's tasks, with what it and those around it (``outer``) change in their settings."""
    changes = {**outer, **{key: value for key, value in group.items() if key not in _GROUP_ONLY}}
    for member in group["task"]:
        own = member if isinstance(member, dict) else {"task": member}
        if isinstance(own.get("task"), list):
            yield from _members(index, own, changes)
            continue
        settings = {key: value for key, value in own.items() if key not in ("task", "group")}
        yield from ({**changes, **settings, **spec} for spec in _specs(index, own.get("task") or own["group"]))


def local_dataset(name: str, path: Path | None) -> Callable[..., DatasetDict]:
    """What lm_eval calls instead of downloading. It passes the task's metadata, in which it notes the file of its configuration."""
    plain: dict[Path, Wanted] = {}

    def load(config_source: str = "", **_: Any) -> DatasetDict:
        settings = read_yaml(Path(config_source), lambda folder, function: None) if Path(config_source).is_file() else {}
        return read_dataset(name, settings.get("dataset_path"), settings.get("dataset_name"), path, plain)

    return load


def read_dataset(task: str, dataset: str | None, config: str | None, path: Path | None, plain: dict[Path, Wanted]) -> DatasetDict:
    """The data set of a task, from below ``path``, else from the cache.

    Raises:
        DataError: it is in neither, or its files do not say which of several they are; ``plain``: what those of a folder were taken for.
    """
    import datasets

    if dataset is None:
        raise DataError(f"--task {task}: this task makes its own data set, which is not supported here; name another task")
    short = dataset.rpartition("/")[2]
    folders = [] if path is None else [folder for folder in (path / dataset, path / short, path) if folder.is_dir()]
    try:
        if folders:
            return _load(datasets, folders[0], (dataset, config), plain, task)
        return datasets.load_dataset(dataset, config)
    except MindSpeedLoraError:
        raise
    except Exception as error:
        cache = "it is not in the cache of datasets (HF_HOME), and nothing is downloaded"
        where, below = f"{folders[0]} could not be read" if folders else cache, path or Path("<--task-data-path>")
        raise DataError(
            f"--task {task} needs {_called(dataset, config)}: {where} "
            f"({type(error).__name__}: {_first_line(error)}). Expected {below / short}/ as `hf download --repo-type dataset {dataset}` "
            "makes it, or parquet, json, jsonl or csv files there named by split (train, validation, test)"
        ) from error


def _load(datasets: Any, folder: Path, wanted: Wanted, plain: dict[Path, Wanted], task: str) -> DatasetDict:
    """Plain files have no configurations: they are those of one, or lie in a folder of its name."""
    dataset, config = wanted
    names = datasets.get_dataset_config_names(str(folder))
    if config is not None and config not in names and (folder / config).is_dir():
        folder = folder / config
    elif config not in names and plain.setdefault(folder, wanted) != wanted:
        raise DataError(
            f"--task {task} needs {_called(*plain[folder])} and {_called(*wanted)}, and the files in {folder} do not say which they are; "
            f"put those of the second in {folder / dataset.rpartition('/')[2] / (config or '')}/, and those of the first likewise"
        )
    loaded: DatasetDict = datasets.load_dataset(str(folder), config if config in names else None)
    return loaded


def _called(dataset: str, config: str | None) -> str:
    return f"the data set {dataset}{f', configuration {config}' if config else ''}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]
