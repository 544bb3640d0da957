"""Several files that appear together: written in a hidden folder beside their place, then moved there, the manifest last."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mindspeed_lora.errors import DataError, UsageError
from mindspeed_lora.files import fsync_path, temporary_name
from mindspeed_lora.log import get_logger


@contextmanager
def staged(prefix: Path, flag: str) -> Iterator[Path]:
    """Yield a hidden folder beside ``prefix`` that vanishes afterwards; folders made for it vanish too unless something was put there.

    Raises:
        UsageError: ``prefix`` has no name.
        DataError: it cannot be written there, or no more (a full disk).
    """
    if not prefix.name:
        raise UsageError(f"{flag} {prefix}: give a folder and the beginning of a file name, such as dataset/alpaca")
    made = [folder for folder in (prefix.parent, *prefix.parent.parents) if not folder.exists()]
    staging = temporary_name(prefix)
    try:
        staging.mkdir(parents=True)
        yield staging
    except OSError as error:
        raise DataError(f"{flag} {prefix}: cannot write there: {error.strerror or error} ({error.filename or staging})") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        for folder in made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def publish(staging: Path, prefix: Path, names: Sequence[str], manifest: str = "") -> None:
    """Move finished files beside ``prefix``; ``manifest``: one that goes first when it is old and comes last when it is new."""
    if any((prefix.parent / name).exists() for name in names):
        get_logger().info(f"replacing {', '.join(names)} of an earlier run")
    if manifest:
        (prefix.parent / manifest).unlink(missing_ok=True)
    for name in [*names, *([manifest] if manifest else [])]:
        fsync_path(staging / name)
        (staging / name).replace(prefix.parent / name)
    fsync_path(prefix.parent)
