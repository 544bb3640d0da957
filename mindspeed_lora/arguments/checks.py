"""Checks across flags, before anything heavy is imported or read. What needs the model's sizes is checked where they are known."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mindspeed_lora.arguments.checks_asking import check_asking
from mindspeed_lora.arguments.configs import LATENT_TARGETS, LORA_TARGETS, LossScaleFlags, TrainConfig
from mindspeed_lora.arguments.flag import CONVERT, INFER, PREPROCESS, RUNS, TRAIN, Flag
from mindspeed_lora.arguments.idle import idle_notes
from mindspeed_lora.errors import UsageError
from mindspeed_lora.manifest import MANIFEST_NAME, read_manifest

Values = dict[str, Any]
Sources = dict[str, str]

_LOSSES_OF = {
    "preference.label_smoothing": ("sigmoid", "simpo"),
    "preference.simpo_gamma": ("simpo",),
    "preference.ref_model": ("sigmoid", "hinge", "ipo"),
    "preference.ref_iteration": ("sigmoid", "hinge", "ipo"),
}
"""Preference flags that only some values of --dpo-loss-type use."""


def check_paths(given: Iterable[tuple[Flag, Any]]) -> None:
    """Raise UsageError where a path that must exist does not, or is of the other kind."""
    for flag, value in given:
        for path in (value if isinstance(value, tuple) else (value,)) if flag.must_exist else ():
            _check_path(flag, Path(path))


def _check_path(flag: Flag, path: Path) -> None:
    if not path.exists():
        raise UsageError(f"{flag.name} {path}: there is nothing at this path{_nearest_parent(path)}; give an existing {_kind(flag)}")
    if flag.must_exist == "folder" and not path.is_dir():
        raise UsageError(f"{flag.name} {path}: this is a file; give the folder that holds it ({path.parent})")
    if flag.must_exist == "file" and not path.is_file():
        raise UsageError(f"{flag.name} {path}: this is a folder; give a file")


def _kind(flag: Flag) -> str:
    return "file or folder" if flag.must_exist == "any" else flag.must_exist


def _nearest_parent(path: Path) -> str:
    parent = next((parent for parent in path.absolute().parents if parent.exists()), None)
    return f" (the path exists as far as {parent})" if parent is not None else ""


def check_values(command: str, values: Values, sources: Sources) -> list[str]:
    """Check the values of one command against each other; may complete or change ``values``.

    ``values`` and ``sources``: by path into the config; the value, and the flag that gave it.
    Returns notes for the log.

    Raises:
        UsageError: flags contradict each other, or one needs another.
    """
    notes: list[str] = check_asking(values, sources) if command == INFER else []
    _check_lora(command, values, sources)
    if values.get("tokenizer.use_fast") is False:
        notes.append("--tokenizer-not-use-fast: the slow tokenizer is taken where the installed transformers still has one")
    if command in RUNS:
        notes += _check_layout(values)
        _check_rope_scaling(values, sources)
    if command == TRAIN:
        notes += _check_training(values, sources)
    if values.get("template.hf_chat_template") and "template.prompt_type" in values:
        raise UsageError("--hf-chat-template and --prompt-type contradict each other; keep one of them")
    if values.get("compare_base") and "load.lora_load" not in values and not _holds_adapter(values.get("load.load")):
        raise UsageError("--compare-base: there is no adapter to compare with the base; pass --lora-load")
    if command == CONVERT:
        _check_conversion(values, sources)
    if command == PREPROCESS:
        _check_preprocessing(values)
    return notes


def _check_lora(command: str, values: Values, sources: Sources) -> None:
    """Targets in their own order; LoRA flags need a place to act; an adapter needs a base."""
    targets = values.get("lora.targets")
    if targets is not None:
        values["lora.targets"] = tuple(target for target in (*LORA_TARGETS, *LATENT_TARGETS) if target in targets)
    adapter = values.get("load.lora_load") or values.get("lora_load")
    if adapter is not None:
        values.setdefault("lora", True)  # the group exists, even where every value of it is left to the adapter
    if command != TRAIN or targets is not None or adapter is not None:
        return
    flags = [sources[path] for path in values if path.startswith("lora.")]
    if flags and not _holds_adapter(values.get("load.load")):
        raise UsageError(
            f"{' and '.join(flags)} without --lora-target-modules: nothing would get an adapter; "
            f"add --lora-target-modules {' '.join(LORA_TARGETS)} (or some of them), or --lora-load ADAPTER to continue one"
        )


def _holds_adapter(folder: Path | None) -> bool:
    """Whether ``folder`` is a save of ours with an adapter in it, which then says its targets."""
    manifests = [read_manifest(place) for place in _manifest_folders(folder)] if folder is not None else []
    return any(manifest is not None and manifest.lora for manifest in manifests)


def _manifest_folders(folder: Path) -> list[Path]:
    """The folder and its newest iteration: a save of ours has its manifest in the latter."""
    return [folder, *sorted(folder.glob("iter_*"))[-1:]]


def _check_layout(values: Values) -> list[str]:
    if values.get("parallel.sequence_parallel") and values.get("parallel.tensor_parallel_size", 1) == 1:
        values["parallel.sequence_parallel"] = False
        return ["--sequence-parallel has no effect with --tensor-model-parallel-size 1: there is nothing to cut the sequence over"]
    return []


def _check_rope_scaling(values: Values, sources: Sources) -> None:
    """``--rope-scaling-type`` is accepted because config.json says it; so it must, and the same."""
    passed = values.pop("rope_scaling_type", None)
    sources.pop("rope_scaling_type", None)
    if passed is None:
        return
    folder: Path = values["load.load"]
    config = folder / "config.json"
    if not config.is_file():
        if any((place / MANIFEST_NAME).is_file() for place in _manifest_folders(folder)):
            return  # a save of ours: its base has the config.json
        raise UsageError(
            f"--rope-scaling-type {passed}: rope scaling is read from config.json, and {folder} has none; put the model's config.json there"
        )
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"--rope-scaling-type {passed}: {config} cannot be read ({error}); put the model's config.json there") from error
    scaling = content.get("rope_parameters") or content.get("rope_scaling") or {}
    found = scaling.get("rope_type", scaling.get("type", "default"))
    if found != passed:
        raise UsageError(
            f"--rope-scaling-type {passed} contradicts {config}, which says {found}; leave the flag out, or correct config.json"
        )


def _check_training(values: Values, sources: Sources) -> list[str]:
    _check_stage(values, sources)
    _check_schedule(values)
    for path in ("dry_run_machine", "dry_run_devices"):
        if path in values and not values.get("dry_run"):
            raise UsageError(f"{sources[path]} {values[path]} needs --dry-run; a real run uses the devices it finds")
    for path in values:
        if path.startswith("profile.") and not values.get("profile"):
            raise UsageError(f"{sources[path]} needs --profile; without it no trace is written")
    _check_recompute(values)
    if values.get("data.neat_pack") and not values.get("data.reset_attention_mask"):
        raise UsageError("--neat-pack numbers the records of a pack for --reset-attention-mask; add --reset-attention-mask")
    if values.get("data.padding_free") and values.get("loss_normalization") == "micro-batch":
        raise UsageError(
            "--padding-free puts records into micro-batches by their lengths, so that --loss-normalization micro-batch has no meaning; "
            "leave one of them out"
        )
    if values.pop("per_token_loss", False) and values.get("loss_normalization") == "micro-batch":
        raise UsageError("--calculate-per-token-loss and --loss-normalization micro-batch contradict each other; keep one of them")
    sources.pop("per_token_loss", None)
    micro, total = values.get("micro_batch_size", 1), values.get("global_batch_size")
    if total is not None and total % micro:
        raise UsageError(
            f"--global-batch-size {total} is not a multiple of --micro-batch-size {micro}; use {_nearby_multiples(total, micro)}"
        )
    if values.get("parallel.layers_per_virtual_stage") and values.get("parallel.pipeline_parallel_size", 1) == 1:
        raise UsageError(
            f"--num-layers-per-virtual-pipeline-stage {values['parallel.layers_per_virtual_stage']} needs --pipeline-model-parallel-size "
            "of at least 2; "
            "with one stage there is nothing to interleave"
        )
    notes = _check_loss_scale(values, sources) + idle_notes(values, sources)
    if "save.save" not in values:
        notes.append("--save is absent: this run writes no checkpoint")
        if "save.save_interval" in values:
            raise UsageError(f"--save-interval {values['save.save_interval']} needs --save, the folder to write to")
        for path in ("save.save_best", "save.save_total_limit"):
            if path in values:
                raise UsageError(f"{sources[path]} needs --save, the folder to write to")
    if values.get("save.save_best") and (not values.get("eval_interval") or values.get("eval_iters") == 0):
        raise UsageError("--save-best needs validations to compare: --eval-interval, and --eval-iters above 0")
    return notes


def _check_stage(values: Values, sources: Sources) -> None:
    """``--stage`` decides whether there are preference flags; each loss has its own."""
    stage, pairwise = values.get("stage", "sft"), values.pop("pairwise", False)
    sources.pop("pairwise", None)
    given = {path: flag for path, flag in sources.items() if path.startswith("preference.")}
    if stage == "sft":
        if pairwise or given:
            raise UsageError(
                f"{'--is-pairwise-dataset' if pairwise else next(iter(given.values()))} belongs to --stage dpo; add --stage dpo"
            )
        return
    values["preference"] = True
    kind = values.get("preference.loss_type", "sigmoid")
    for path, kinds in _LOSSES_OF.items():
        if path in given and kind not in kinds:
            raise UsageError(f"{given[path]} has no meaning with --dpo-loss-type {kind}, only with {' or '.join(kinds)}; leave it out")
    for path in ("data.pack", "data.neat_pack", "data.reset_attention_mask"):
        if values.get(path):
            raise UsageError(f"{sources[path]}: preference pairs are not packed; leave it out")
    if values.get("data.padding_free"):
        raise UsageError("--padding-free is for single records, and --stage dpo trains on pairs; leave it out")
    if values.get("loss_normalization") == "micro-batch":
        raise UsageError(
            "--loss-normalization micro-batch: the loss of --stage dpo is the mean over the global batch's pairs; leave it out"
        )


def _check_schedule(values: Values) -> None:
    lr, min_lr = values.get("optimizer.lr", 1e-4), values.get("optimizer.min_lr", 0.0)
    if min_lr > lr:
        raise UsageError(f"--min-lr {min_lr:g} is above --lr {lr:g}; the decay goes down to --min-lr, so use a smaller one")
    if values.get("optimizer.lr_warmup_init", 0.0) > lr:
        raise UsageError(f"--lr-warmup-init {values['optimizer.lr_warmup_init']:g} is above --lr {lr:g}; the warm-up goes up to --lr")
    warmup = values.get("optimizer.lr_warmup_iters", 0)
    if warmup and values.get("optimizer.lr_warmup_fraction"):
        raise UsageError("--lr-warmup-fraction and --lr-warmup-iters contradict each other; keep one of them")
    decay = values.get("optimizer.lr_decay_iters", values["train_iters"])
    if warmup and warmup >= decay:
        raise UsageError(f"--lr-warmup-iters {warmup} leaves nothing of the {decay} iterations of the decay; use fewer than {decay}")


def _check_loss_scale(values: Values, sources: Sources) -> list[str]:
    """The scale is fp16's; a constant one makes the other flags idle, otherwise it starts at its minimum or above."""
    given = [flag for path, flag in sources.items() if path.startswith("loss_scale.")]
    if not given:
        return []
    if values.get("runtime.params_dtype") != "fp16":
        return [f"{' '.join(given)}: bf16 and fp32 need no loss scale; only --fp16 has one"]
    if "loss_scale.constant" in values:
        idle = [flag for flag in given if flag != "--loss-scale"]
        return [f"{' '.join(idle)}: --loss-scale {values['loss_scale.constant']:g} is constant"] if idle else []
    initial, minimum = values.get("loss_scale.initial", LossScaleFlags.initial), values.get("loss_scale.minimum", LossScaleFlags.minimum)
    if minimum > initial:
        raise UsageError(
            f"--min-loss-scale {minimum:g} is above --initial-loss-scale {initial:g}; the scale falls towards it, so use a smaller one"
        )
    return []


def _check_recompute(values: Values) -> None:
    granularity, method, layers = (values.get(f"recompute.{name}") for name in ("granularity", "method", "num_layers"))
    if granularity == "full" and (method is None or layers is None):
        missing = "--recompute-method block or uniform" if method is None else "--recompute-num-layers"
        raise UsageError(f"--recompute-granularity full needs {missing}")
    if granularity != "full" and (method is not None or layers is not None):
        flag = f"--recompute-method {method}" if method is not None else f"--recompute-num-layers {layers}"
        raise UsageError(f"{flag} needs --recompute-granularity full (found: {granularity or 'none'})")


def _check_preprocessing(values: Values) -> None:
    if values.get("neat_pack") and not values.get("pack"):
        raise UsageError("--neat-pack numbers the records of a pack and needs --pack; add --pack")
    if values.get("pack") and "seq_length" not in values:
        raise UsageError("--pack needs --seq-length, the tokens of a pack; give the one of training, such as --seq-length 4096")
    merges = bool(values.get("merge_group_keys"))
    needed = {"output_prefix": not values.get("preview"), "tokenizer.name_or_path": not merges}
    names = {"output_prefix": "--output-prefix", "tokenizer.name_or_path": "--tokenizer-name-or-path"}
    missing = [names[path] for path, needs in needed.items() if needs and path not in values]
    if missing:
        raise UsageError(f"preprocess_data.py needs {' and '.join(missing)}; python preprocess_data.py --help has an example")
    if merges and values.get("preview"):
        raise UsageError("--preview shows records, and --merge-group-keys joins files without reading records; keep one of them")


def _check_conversion(values: Values, sources: Sources) -> None:
    if values["save_model_type"] == "hf" and not values.get("save_lora_to_hf"):
        neutral = {"target_tensor_parallel_size": 1, "target_pipeline_parallel_size": 1, "layers_per_virtual_stage": None}
        for path, value in neutral.items():
            if values.get(path, value) != value:
                raise UsageError(
                    f"{sources[path]} {values[path]} with --save-model-type hf: Hugging Face files are not cut into shards; use 1 or "
                    "leave it out"
                )
    if values["load_dir"].resolve() == values["save_dir"].resolve() and values["save_model_type"] != "hf":
        raise UsageError(f"--save-dir {values['save_dir']} is --load-dir as well; give another folder to write to")
    if values.get("save_lora_to_hf") and values["save_model_type"] != "hf":
        raise UsageError(
            f"--save-lora-to-hf writes PEFT's files, but --save-model-type is {values['save_model_type']}; use --save-model-type hf"
        )
    if values.get("layers_per_virtual_stage") and values.get("target_pipeline_parallel_size", 1) == 1:
        raise UsageError("--num-layers-per-virtual-pipeline-stage needs --target-pipeline-parallel-size of at least 2")


def _nearby_multiples(value: int, unit: int) -> str:
    below = value // unit * unit
    return " or ".join(str(multiple) for multiple in (below, below + unit) if multiple > 0)


def resolve_global_batch_size(config: TrainConfig, data_parallel_size: int) -> int:
    """Records per optimizer step: ``--global-batch-size``, else one micro-batch per replica.

    Raises:
        UsageError: it is not a multiple of micro batch size x data parallel size.
    """
    unit = config.micro_batch_size * data_parallel_size
    total = config.global_batch_size or unit
    if total % unit:
        raise UsageError(
            f"--global-batch-size {total} is not a multiple of --micro-batch-size {config.micro_batch_size} x data parallel size "
            f"{data_parallel_size} "
            f"= {unit}; use {_nearby_multiples(total, unit)}"
        )
    return total
