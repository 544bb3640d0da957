"""lm_eval's own task configurations, read from the package, with rows of ours in place of what it would download."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindspeed_lora.errors import UsageError

if TYPE_CHECKING:
    from datasets import DatasetDict

TaskSettings = dict[str, Any]
Rows = Sequence[Mapping[str, Any]]

_STRUCTURE = ("include", "group", "tag", "task_list", "dataset_path", "dataset_name", "dataset_kwargs")


def tasks_folder() -> Path:
    """Where the package keeps its configurations."""
    import lm_eval

    return Path(lm_eval.__file__).parent / "tasks"


def read_settings(name: str) -> TaskSettings:
    """A task's configuration (``name`` below the package's ``tasks/``), its includes folded in, without what names a download."""
    return {key: value for key, value in read_yaml(tasks_folder() / name, _import_function).items() if key not in _STRUCTURE}


def read_yaml(path: Path, function: Callable[[Path, str], Any]) -> TaskSettings:
    """A configuration with its includes; ``function``: what ``!function module.name`` in a file of that folder stands for."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Knows the package's way to name a function beside the file."""

    def construct(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Any:
        return function(path.parent, str(loader.construct_scalar(node)))

    Loader.add_constructor("!function", construct)
    content: TaskSettings = yaml.load(path.read_text(encoding="utf-8"), Loader)
    for included in [names] if isinstance(names := content.pop("include", []), str) else names:
        content = {**read_yaml(path.parent / included, function), **content}
    return content


def _import_function(folder: Path, name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(".".join(("lm_eval.tasks", *folder.relative_to(tasks_folder()).parts, module))), attribute)


def with_rows(settings: TaskSettings, splits: Mapping[str, Rows], num_fewshot: int, **changes: Any) -> TaskSettings:
    """The task over ``splits`` (by the name that its settings give them)."""
    task = {**settings, **changes, "custom_dataset": _dataset(splits), "num_fewshot": num_fewshot}
    if not num_fewshot:  # lm_eval would look for examples in a split that need not be there
        task = {key: value for key, value in task.items() if key not in ("fewshot_split", "fewshot_config")}
    for split in ("training_split", "validation_split", "test_split", "fewshot_split"):
        if task.get(split) not in (None, *splits):
            del task[split]
    return task


def _dataset(splits: Mapping[str, Rows]) -> Callable[..., DatasetDict]:
    """What lm_eval calls instead of downloading; it passes the task's metadata, which changes nothing here."""

    def load(**metadata: Any) -> DatasetDict:
        from datasets import Dataset, DatasetDict

        return DatasetDict({split: Dataset.from_list([dict(row) for row in rows]) for split, rows in splits.items()})

    return load


def check_fewshot(num_fewshot: int, available: int, where: str) -> None:
    """Raises:
    UsageError: more solved examples are asked for than ``where`` has.
    """
    if num_fewshot > available:
        has = f"has only {available} rows; pass at most that many" if available else "has no solved examples; pass 0 or leave the flag out"
        raise UsageError(f"--num-fewshot {num_fewshot}: {where} {has}")
