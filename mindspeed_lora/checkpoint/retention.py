"""Which iterations of a save folder stay: the best one by its own file, the newest ones by ``--save-total-limit``.

::

    <save>/best_checkpointed_iteration.txt     the iteration with the lowest validation loss (--save-best)

Nothing is removed before the newer iteration is complete and named by the tracker; a removed one vanishes under its name first, so
that an interrupted removal leaves nothing that looks like a checkpoint.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from mindspeed_lora.files import write_text
from mindspeed_lora.log import get_logger
from mindspeed_lora.weights.megatron_files import iteration_directory_name

BEST_NAME = "best_checkpointed_iteration.txt"


def write_best(folder: Path, iteration: int) -> None:
    """Name the best iteration, which is complete."""
    write_text(folder / BEST_NAME, str(iteration))


def remove_old(folder: Path, current: int, limit: int, best: int | None) -> list[int]:
    """Remove iterations older than ``current`` but the newest ``limit`` (``current`` included) and ``best``; returns the removed ones.

    What cannot be removed is told and left: the new checkpoint is complete all the same.
    """
    found = sorted(int(match[1]) for path in folder.iterdir() if (match := re.fullmatch(r"iter_(\d{7})", path.name)))
    older = [iteration for iteration in found if iteration < current]
    removed = []
    for iteration in older[: len(older) - (limit - 1)] if len(older) >= limit else []:
        if iteration == best:
            continue
        name = iteration_directory_name(iteration)
        try:
            (folder / name).rename(folder / f".{name}.removed")
            shutil.rmtree(folder / f".{name}.removed")
        except OSError as error:
            get_logger().warning(f"--save-total-limit {limit}: {folder / name} cannot be removed ({error})")
            continue
        removed.append(iteration)
    return removed
