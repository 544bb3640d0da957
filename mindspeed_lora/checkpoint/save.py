"""Writes one iteration: all ranks into a hidden folder, renamed when complete, the tracker last.

::

    <save>/config.json, tokenizer files
    <save>/iter_0000010/mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt    Megatron names, stage-local layers, experts of the rank from 0
    <save>/iter_0000010/peft/                                  the adapter as PEFT and vLLM read it
    <save>/iter_0000010/resume/                                see mindspeed_lora.checkpoint.resume; a manifest of its own
    <save>/iter_0000010/mindspeed_lora.json                    manifest
    <save>/latest_checkpointed_iteration.txt                   written last

A crash at any moment leaves the previous iteration, and the tracker that names it, as they were. All ranks must see one
file system.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from mindspeed_lora.checkpoint.adapter_files import SavedStage, rank_models, write_peft_folder
from mindspeed_lora.checkpoint.companions import copy_companions
from mindspeed_lora.checkpoint.resume import RESUME_FOLDER, OptimizerState, TrainerState, write_resume
from mindspeed_lora.checkpoint.retention import remove_old, write_best
from mindspeed_lora.checkpoint.together import gather_from_all, together
from mindspeed_lora.files import fsync_path
from mindspeed_lora.log import get_logger
from mindspeed_lora.manifest import Manifest, Part, part_of, write_manifest
from mindspeed_lora.parallel.context import ParallelContext
from mindspeed_lora.weights.config import Layout, ModelConfig
from mindspeed_lora.weights.lora_spec import LoraSpec
from mindspeed_lora.weights.megatron_files import iteration_directory_name, megatron_args, write_rank_file, write_tracker
from mindspeed_lora.weights.sources import open_base
from mindspeed_lora.weights.table import WeightTable

PEFT_FOLDER = "peft"


@dataclass(frozen=True)
class SaveTarget:
    """What does not change from save to save.

    ``lora`` None: full-parameter training. ``lora_only``: the adapter without the base. ``base``: path and fingerprint
    for the manifest. ``described``: tokenizer and template as the data's manifest has them.
    """

    folder: Path
    config: ModelConfig
    layout: Layout
    dtype: torch.dtype
    lora: LoraSpec | None
    lora_only: bool
    base: dict[str, Any]
    config_dir: Path | None = None
    tokenizer_dir: Path | None = None
    described: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    save_optim: bool = True
    save_rng: bool = True
    total_limit: int | None = None  # iterations that stay; None: all


def save_checkpoint(
    target: SaveTarget, context: ParallelContext, stages: Sequence[SavedStage], state: TrainerState, optimizer: OptimizerState
) -> Path:
    """Write ``state.iteration`` and return its folder. Collective over all ranks.

    Raises:
        CheckpointError: a rank could not write; nothing is left behind, the previous iteration stays the current one.
    """
    logger = get_logger()
    logger.info(f"saving checkpoint at iteration {state.iteration:7d} to {target.folder} in torch format")
    table = WeightTable(target.config)
    name = iteration_directory_name(state.iteration)
    staging = target.folder / f".{name}.tmp"
    try:
        with together(context, f"making {staging}"):
            if context.rank == 0:
                _prepare(staging, name)
        with together(context, "saving the model"):
            own = _write_model(target, staging / name, context, stages, state)
        write_resume(staging / name / RESUME_FOLDER, state, optimizer if target.save_optim else None, table, context, target.save_rng)
        with together(context, "describing the training state"):
            own_state = _own_parts(staging / name / RESUME_FOLDER, context)
        parts, state_parts = (list(chain.from_iterable(gather_from_all(one, context))) for one in (own, own_state))
        with together(context, "completing the checkpoint"):
            if context.rank == 0:
                _finish(target, staging, state, table, parts, state_parts)
    except BaseException:
        if context.rank == 0:
            shutil.rmtree(staging, ignore_errors=True)
        raise
    logger.info(f"  successfully saved checkpoint from iteration {state.iteration:7d} to {target.folder}")
    return target.folder / name


def _prepare(staging: Path, name: str) -> None:
    """A new folder to write into; what an earlier run that was killed left of its own (or of a removal) goes."""
    for left in staging.parent.glob(".iter_*"):
        shutil.rmtree(left, ignore_errors=True)
    (staging / name / RESUME_FOLDER).mkdir(parents=True)


def _write_model(
    target: SaveTarget, folder: Path, context: ParallelContext, stages: Sequence[SavedStage], state: TrainerState
) -> list[Part]:
    """The first ranks with each part of the model and of its experts write; the others hold the same values."""
    if not context.has_first_copy:
        return []
    args = megatron_args(target.config, target.layout, target.dtype, target.lora, state.iteration)
    args.consumed_train_samples = state.consumed_samples
    args.skipped_train_samples = state.skipped_samples
    models = rank_models(stages, target.lora_only)
    place = (context.tp_rank, context.pp_rank, context.tp_size, context.pp_size)
    ep_size = target.layout.expert_parallel_size  # of EP x TP ranks with --moe-tp-extend-ep, whose folders name both
    experts = (context.experts.ep_rank * ep_size // context.experts.ep_size, ep_size)
    path = write_rank_file(folder, *place, models, args, state.iteration, expert=experts)
    return [part_of(folder, path)]


def _own_parts(folder: Path, context: ParallelContext) -> list[Part]:
    """Some of a folder's files, which all ranks share out among them: to take a checksum is to read."""
    return [part_of(folder, path) for path in sorted(folder.iterdir())[context.rank :: context.world_size]]


def _finish(target: SaveTarget, staging: Path, state: TrainerState, table: WeightTable, parts: list[Part], state_parts: list[Part]) -> None:
    """Companions, PEFT folder, manifests (the training state's is its own, for that may be removed); the renames, and the tracker."""
    name = iteration_directory_name(state.iteration)
    folder = staging / name
    companions = copy_companions(target.config_dir, target.tokenizer_dir, staging)
    manifest = _manifest(target, folder, state, table)
    if target.lora is not None:
        peft = folder / PEFT_FOLDER
        write_peft_folder(peft, folder, table, target.lora, Path(target.base["path"]))
        own = [part_of(peft, path) for path in sorted(peft.iterdir())]
        write_manifest(peft, replace(manifest, kind="adapter", layout=None, fingerprint=None, parts=own))
        parts = parts + [part_of(folder, path) for path in sorted(peft.iterdir())]
    state_parts = sorted(state_parts, key=lambda part: part.file)
    write_manifest(folder / RESUME_FOLDER, Manifest(kind="resume", iteration=state.iteration, parts=state_parts))
    write_manifest(folder, replace(manifest, parts=sorted(parts, key=lambda part: part.file)))
    for companion in companions:
        if not (target.folder / companion).exists():
            (staging / companion).replace(target.folder / companion)
    final = target.folder / name
    if final.exists():  # written after the checkpoint that this run continues
        final.replace(staging / f"{name}.old")
    for written in (*folder.rglob("*"), folder):  # files of every rank, and the folders that name them
        fsync_path(written)
    folder.replace(final)
    fsync_path(target.folder)
    write_tracker(target.folder, state.iteration)
    shutil.rmtree(staging)
    if state.best_iteration == state.iteration:
        write_best(target.folder, state.iteration)
    if target.total_limit is not None:
        remove_old(target.folder, state.iteration, target.total_limit, state.best_iteration)


def _manifest(target: SaveTarget, folder: Path, state: TrainerState, table: WeightTable) -> Manifest:
    """Without the parts."""
    return Manifest(
        kind="adapter" if target.lora_only else "base",
        model=asdict(target.config),
        layout=asdict(target.layout),
        dtype=str(target.dtype).removeprefix("torch."),
        lora=target.lora.entry() if target.lora else None,
        base=target.base,
        fingerprint=None if target.lora_only else open_base(folder).fingerprint(table),
        iteration=state.iteration,
        counts={"consumed_samples": state.consumed_samples, "skipped_samples": state.skipped_samples},
        **target.described,  # type: ignore[arg-type]
    )
