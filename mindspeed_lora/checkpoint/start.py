"""Where a run starts: which base, which adapter, and whether an earlier run is continued; decided before weights are read."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from mindspeed_lora.arguments.configs import LoadFlags
from mindspeed_lora.checkpoint.resume import RESUME_FOLDER, has_training_state
from mindspeed_lora.errors import CheckpointError, UsageError
from mindspeed_lora.manifest import read_manifest, verify_parts
from mindspeed_lora.weights.adapters import Adapter
from mindspeed_lora.weights.megatron_files import TRACKER_NAME
from mindspeed_lora.weights.megatron_folder import find_iteration, is_megatron_folder
from mindspeed_lora.weights.sources import Base, open_adapter, open_base


@dataclass(frozen=True)
class StartPoint:
    """``resume``: folder of the training state to continue, None for iteration 0; ``root``: the save folder it lies in.

    ``notes``: what was decided without being said, for the start report.
    """

    base: Base
    adapter: Adapter | None
    resume: Path | None = None
    root: Path | None = None
    notes: list[str] = field(default_factory=list)


def find_start(load: LoadFlags, lora: bool) -> StartPoint:
    """Open what ``--load`` and ``--lora-load`` name. ``lora``: LoRA flags were given.

    ``--load`` alone may be a save folder that holds an adapter only: its manifest names the base.

    Raises:
        UsageError: ``--load`` is missing.
        CheckpointError: a folder is missing, is not what the flag wants, or cannot be continued as asked.
    """
    if load.load is None:
        raise UsageError(
            "--load is missing; give the base model, a Hugging Face or Megatron checkpoint folder"
            + (f" (--lora-load {load.lora_load} holds an adapter only)" if load.lora_load else "")
        )
    notes: list[str] = []
    base_path, adapter_path = load.load, load.lora_load
    if adapter_path is None and (known := adapter_only_base(load.load)) is not None:
        base_path, adapter_path = known, load.load
        notes.append(f"--load {load.load} holds an adapter; its base is {base_path}")
    if load.verify and os.environ.get("LOCAL_RANK", "0") == "0":  # once per machine: it reads every byte
        for folder in filter(None, (base_path, adapter_path)):
            notes.append(verify_folder(folder))
    base = open_base(base_path)
    if adapter_path is None and base.unified:
        adapter_path = base_path
        notes.append(f"--load {load.load} holds base and adapter together; both are used")
    adapter = open_adapter(adapter_path) if adapter_path is not None else None
    if load.finetune:
        return StartPoint(base, adapter, notes=notes)
    continued = adapter_path if adapter_path is not None else (None if lora else base_path)
    resume = _training_state(continued, adapter is not None, notes) if continued is not None else None
    return StartPoint(base, adapter, resume, continued if resume else None, notes)


def verify_folder(folder: Path) -> str:
    """Compare every file of a checkpoint with the size and checksum in its manifest; returns a note.

    Raises:
        CheckpointError: a file is missing, has another size, or other bytes.
    """
    iteration = [find_iteration(folder)[0]] if is_megatron_folder(folder) else []
    places = [folder, *iteration, *(place / RESUME_FOLDER for place in iteration)]
    verified = 0
    for place in places:
        manifest = read_manifest(place)
        if manifest is not None:
            verify_parts(place, manifest)
            verified += len(manifest.parts)
    if not verified:
        return f"--verify: {folder} has no manifest to compare with"
    return f"--verify: {verified} files of {folder} have their checksums"


def adapter_only_base(folder: Path, flag: str = "--load") -> Path | None:
    """The base that an adapter-only save folder records; None for any other folder. ``flag`` gave the folder.

    Raises:
        CheckpointError: the recorded base is not there any more.
    """
    if not is_megatron_folder(folder):
        return None
    manifest = read_manifest(find_iteration(folder)[0])
    if manifest is None or manifest.kind != "adapter":
        return None
    path = Path((manifest.base or {}).get("path", ""))
    if not path.is_dir():
        raise CheckpointError(
            f"{flag} {folder}: holds an adapter only, and its base {path} is not there; "
            + (f"pass --load BASE --lora-load {folder}" if flag == "--load" else "put it there again")
        )
    return path


def _training_state(folder: Path, is_adapter: bool, notes: list[str]) -> Path | None:
    """The resume folder of the newest iteration."""
    if not is_megatron_folder(folder):
        if is_adapter:
            notes.append(f"{folder} is a PEFT adapter without training state: its weights are used from iteration 0")
        return None
    iteration_folder, iteration = find_iteration(folder)
    if has_training_state(iteration_folder):
        return iteration_folder / RESUME_FOLDER
    if is_adapter:
        raise CheckpointError(
            f"{iteration_folder}: holds no training state to continue iteration {iteration} from; "
            "pass --finetune to start from its weights at iteration 0"
        )
    notes.append(f"{iteration_folder} holds weights without training state: starting at iteration 0")
    return None


def check_save_folder(save: Path | None, start: StartPoint) -> None:
    """Refuse to write into a save folder in use, unless this run continues that very folder.

    Raises:
        UsageError: the folder belongs to another run, is a file, or cannot be written.
    """
    if save is None:
        return
    if save.exists() and not save.is_dir():
        raise UsageError(f"--save {save} is a file; give a folder")
    existing = next(folder for folder in (save.absolute(), *save.absolute().parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f"--save {save}: nothing can be written into {existing}; give a folder that you may write to")
    tracker = save / TRACKER_NAME
    if not tracker.is_file():
        return
    if start.root is not None and start.root.resolve() == save.resolve():
        return
    raise UsageError(
        f"--save {save} already holds a checkpoint (iteration {tracker.read_text(encoding='utf-8').strip()}) "
        f"that this run does not continue; to continue it pass --load {save} without --finetune, "
        "to start anew give another --save or remove the folder"
    )
