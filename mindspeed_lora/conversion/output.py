"""Where a conversion writes: into a folder that appears whole, never over somebody's model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mindspeed_lora.errors import CheckpointError
from mindspeed_lora.files import fsync_path, temporary_name, write_json
from mindspeed_lora.weights.megatron_files import TRACKER_NAME

MERGED_FOLDER_NAME = "mg2hg"
# What makes a folder usable besides its weights; nothing that could be run is copied.
TRAVELLING_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
)
_MODEL_PATTERNS = ("*.safetensors", "*.bin", TRACKER_NAME, "iter_*", "release")


def hf_target(save_dir: Path) -> Path:
    """``save_dir``, or its ``mg2hg/`` where ``save_dir`` already holds a Hugging Face model.

    Raises:
        CheckpointError: the target is occupied.
    """
    target = save_dir / MERGED_FOLDER_NAME if (save_dir / "config.json").is_file() else save_dir
    _refuse_occupied(target)
    return target


def megatron_target(save_dir: Path) -> Path:
    """``save_dir``; Raises CheckpointError when it is occupied."""
    _refuse_occupied(save_dir)
    return save_dir


def _refuse_occupied(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"--save-dir {target}: exists and is no folder; choose another")
    found = [path.name for pattern in _MODEL_PATTERNS for path in sorted(target.glob(pattern))]
    if found:
        raise CheckpointError(
            f"--save-dir {target}: already holds {', '.join(found[:3])}; nothing is overwritten, remove it or choose another folder"
        )


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder inside ``target``; on success its entries move up, the tracker last, on any error all of it goes.

    Raises:
        CheckpointError: the disk is full, or the folder cannot be written.
    """
    created, moved = _missing_parents(target), []
    staging = temporary_name(target / "convert")
    try:
        staging.mkdir(parents=True)
        yield staging
        _refuse_other_contents(staging, target)
        for entry in sorted(staging.iterdir(), key=lambda path: path.name == TRACKER_NAME):
            fsync_path(entry)
            place = target / entry.name
            moved += [] if place.exists() else [place]
            entry.replace(place)
        fsync_path(target)
        created, moved = [], []
    except OSError as error:
        raise CheckpointError(
            f"--save-dir {target}: cannot be written ({error}); nothing of it is left. Free disk space (--dry-run says how much) or choose "
            "another folder"
        ) from error
    finally:
        for place in (staging, *moved):
            _remove(place)
        for folder in created:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def _refuse_other_contents(staging: Path, target: Path) -> None:
    """A file that is there already is left alone only where it is the same."""
    for entry in staging.iterdir():
        existing = target / entry.name
        if existing.exists() and not (entry.is_file() and existing.is_file() and entry.read_bytes() == existing.read_bytes()):
            raise CheckpointError(f"--save-dir {target}: already holds another {entry.name}; nothing is overwritten, choose another folder")


def _remove(place: Path) -> None:
    if place.is_dir():
        shutil.rmtree(place, ignore_errors=True)
    else:
        place.unlink(missing_ok=True)


def _missing_parents(target: Path) -> list[Path]:
    """The folders that making ``target`` will make, innermost first."""
    missing = []
    for folder in (target, *target.parents):
        if folder.exists():
            break
        missing.append(folder)
    return missing


def copy_model_files(source: Path, target: Path, dtype: str | None) -> list[str]:
    """Copy configuration and tokenizer (contents, also of links); ``dtype`` is written into config.json where it changed.

    Returns the names copied.
    """
    copied = []
    for name in TRAVELLING_FILES:
        path = source / name
        if not path.is_file():
            continue
        shutil.copyfile(path, target / name)
        copied.append(name)
    if dtype is not None and "config.json" in copied:
        values = json.loads((target / "config.json").read_text(encoding="utf-8"))
        key = "dtype" if "dtype" in values else "torch_dtype"
        write_json(target / "config.json", {**values, key: dtype})
    return copied
