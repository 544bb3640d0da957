"""Everything that can be refused is refused here: before weights are read, processes joined, or anything is written."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mindspeed_lora.arguments.configs import TrainConfig
from mindspeed_lora.checkpoint.reference import ReferencePoint, find_reference
from mindspeed_lora.checkpoint.resolve import check_adapter_base, resolve_lora, resolve_model_config, router_notes, run_layout
from mindspeed_lora.checkpoint.resume import TrainerState, read_trainer_state
from mindspeed_lora.checkpoint.start import StartPoint, check_save_folder, find_start
from mindspeed_lora.data.pairs import PairDataset, open_pair_dataset
from mindspeed_lora.data.preview import log_first_sample
from mindspeed_lora.data.raw import PAIRWISE_SUFFIX, cache_root, is_raw_data, prepare_raw_data, unused_raw_flags
from mindspeed_lora.data.sft_dataset import KEYS, PAIR_KEYS, DocumentRule, SFTDataset, check_data_manifest, open_sft_dataset, split_ranges
from mindspeed_lora.data.tokenizer import load_tokenizer, pad_token_id
from mindspeed_lora.errors import CheckpointError, UsageError
from mindspeed_lora.model.balance import BalanceTerms
from mindspeed_lora.ops.nf4 import check_nf4
from mindspeed_lora.parallel.context import check_expert_grid, data_parallel_size
from mindspeed_lora.training.balance import balance_terms
from mindspeed_lora.training.documents import document_rule
from mindspeed_lora.training.profiling import check_profile
from mindspeed_lora.training.report import check_tensorboard
from mindspeed_lora.training.schedule import LearningRateSchedule, build_schedule
from mindspeed_lora.training.sizes import RunSizes
from mindspeed_lora.weights.config import Layout, ModelConfig
from mindspeed_lora.weights.lora_spec import LoraSpec
from mindspeed_lora.weights.peft_files import peft_gap
from mindspeed_lora.weights.table import WeightTable

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class ModelPlan:
    """What flags and checkpoint say of a run, without its data. ``pad_multiple`` in tokens."""

    config: TrainConfig
    start: StartPoint
    model: ModelConfig
    table: WeightTable
    layout: Layout
    lora: LoraSpec | None
    dtype: torch.dtype
    pad_multiple: int
    dp_size: int
    global_batch_size: int
    schedule: LearningRateSchedule
    notes: list[str]
    balance: BalanceTerms | None

    @property
    def num_micro_batches(self) -> int:
        """Per data-parallel rank and step."""
        return self.global_batch_size // (self.config.micro_batch_size * self.dp_size)

    @property
    def sizes(self) -> RunSizes:
        """The numbers that memory and time depend on."""
        config, parallel = self.config, self.config.parallel
        return RunSizes(
            model=self.model,
            lora=self.lora,
            parameter_bytes=self.dtype.itemsize,
            tp_size=parallel.tensor_parallel_size,
            pp_size=parallel.pipeline_parallel_size,
            dp_size=self.dp_size,
            ep_size=parallel.expert_grid[0],
            expert_tensor_parallel_size=parallel.expert_grid[1],
            layers_per_virtual_stage=parallel.layers_per_virtual_stage,
            sequence_parallel=parallel.sequence_parallel,
            micro_batch_size=config.micro_batch_size,
            num_micro_batches=self.num_micro_batches,
            rows_per_record=1 if config.preference is None else 2,
            reference_copy=config.preference is not None and config.preference.needs_reference and self.lora is None,
            length=-(-config.data.seq_length // self.pad_multiple) * self.pad_multiple,
            recompute=config.recompute,
            fusion=config.lora is not None and config.lora.fusion,
            sharded_optimizer=config.optimizer.use_distributed_optimizer,
            fsdp_base=config.fsdp_base and self.dp_size > 1,
            qlora=config.runtime.qlora,
            pipeline_buffer_fraction=config.pipeline_buffer_fraction,
        )


@dataclass(frozen=True)
class TrainingPlan(ModelPlan):
    """A run that passed all checks. ``splits``: sample numbers of train, validation, test; ``documents``: where the documents of a
    sample end, None where a sample is one; ``reference``: what a preference loss compares with.
    """

    dataset: SFTDataset | PairDataset
    splits: tuple[range, range, range]
    tokenizer_dir: Path | None
    pad_token_id: int
    documents: DocumentRule | None
    state: TrainerState
    reference: ReferencePoint | None


def plan_model(config: TrainConfig, world_size: int, start: StartPoint | None = None) -> ModelPlan:
    """Check flags against each other and against the checkpoint; ``start`` None: what ``--load`` and ``--lora-load`` name.

    Raises:
        UsageError: a flag, or two that contradict each other or the checkpoint.
        CheckpointError: a file is missing, damaged, or does not fit.
    """
    parallel = config.parallel
    dp_size = data_parallel_size(world_size, parallel.tensor_parallel_size, parallel.pipeline_parallel_size)
    global_batch_size = _global_batch_size(config, dp_size)
    if config.train_iters <= 0:
        raise UsageError(f"--train-iters {config.train_iters} must be at least 1")
    schedule = build_schedule(config.optimizer, config.train_iters, global_batch_size)
    start = start or find_start(config.load, config.lora is not None)
    check_save_folder(config.save.save, start)
    check_tensorboard(config.save.tensorboard_dir)
    layout = run_layout(parallel)
    model = resolve_model_config(start.base, config.architecture, layout)
    check_expert_grid(dp_size, parallel.tensor_parallel_size, *parallel.expert_grid)
    table = WeightTable(model)
    table.check_tensor_parallel(parallel.tensor_parallel_size)
    table.check_pipeline(parallel.pipeline_parallel_size, parallel.layers_per_virtual_stage)
    notes = list(start.notes)
    lora = _resolve_lora(config, start, table)
    balance = balance_terms(config, model, lora is not None, notes)
    if model.experts is not None and lora is None and not (balance and balance.aux):
        notes.append("no auxiliary loss balances the experts; --moe-aux-loss-coeff adds one")
    if lora is not None and (gap := peft_gap(table, lora)):
        notes.append(f"peft/ of a save: {gap}")
    dtype = _dtype(config)
    if not config.dry_run:  # which does without weights
        notes += router_notes(start.base, table, dtype)
    _check_base_storage(config, lora, dp_size, notes)
    return ModelPlan(
        config=config,
        start=start,
        model=model,
        table=table,
        layout=layout,
        lora=lora,
        dtype=dtype,
        pad_multiple=_pad_multiple(config, model, notes),
        dp_size=dp_size,
        global_batch_size=global_batch_size,
        schedule=schedule,
        notes=notes,
        balance=balance,
    )


def plan_training(config: TrainConfig, world_size: int) -> TrainingPlan:
    """Check the whole run and resolve what the user left open.

    Raises:
        UsageError, CheckpointError: as :func:`plan_model`.
        DataError: the data is missing, damaged, or does not fit.
    """
    plan = plan_model(config, world_size)
    dataset, splits, tokenizer = _open_data(config, plan.start, plan.model, plan.notes)
    state = _continued_state(config, plan.start, _origin(config, dataset, plan.schedule), plan.notes)
    check_profile(config, state.iteration, world_size)
    return TrainingPlan(
        **vars(plan),
        dataset=dataset,
        splits=splits,
        tokenizer_dir=config.tokenizer.name_or_path or plan.start.base.config_dir,
        pad_token_id=pad_token_id(tokenizer),
        documents=document_rule(config.data, dataset, tokenizer, plan.notes) if isinstance(dataset, SFTDataset) else None,
        state=state,
        reference=_reference(plan, state),
    )


def _global_batch_size(config: TrainConfig, dp_size: int) -> int:
    rows = config.micro_batch_size * dp_size
    size = rows if config.global_batch_size is None else config.global_batch_size
    if config.micro_batch_size <= 0 or size <= 0 or size % rows:
        works = max(size // rows, 1) * rows if rows > 0 else dp_size
        raise UsageError(
            f"--global-batch-size {size} must be a multiple of --micro-batch-size {config.micro_batch_size} "
            f"x data parallel size {dp_size} = {rows}; {works} would work"
        )
    return size


def _dtype(config: TrainConfig) -> torch.dtype:
    name = config.runtime.params_dtype or "fp32"
    if name not in DTYPES:
        raise UsageError(f"training in {name} is not supported; pass --bf16, --fp16, or neither for fp32")
    return DTYPES[name]


def _resolve_lora(config: TrainConfig, start: StartPoint, table: WeightTable) -> LoraSpec | None:
    if start.adapter is not None:
        start.adapter.check_coverage(table)
        check_adapter_base(start.adapter, start.base)
    lora = resolve_lora(config.lora, start.adapter, table)
    if lora is not None:
        table.lora_rows(lora.targets)
    return lora


def _check_base_storage(config: TrainConfig, lora: LoraSpec | None, dp_size: int, notes: list[str]) -> None:
    """``--fsdp-base`` and ``--qlora`` are for a frozen base that no checkpoint is written of."""
    flags = [flag for flag, given in (("--fsdp-base", config.fsdp_base), ("--qlora", config.runtime.qlora)) if given]
    if flags and lora is None:
        raise UsageError(
            f"{' and '.join(flags)} without LoRA: all weights are trained, so none is frozen; add --lora-target-modules, or leave it out"
            + (" (--use-distributed-optimizer cuts the optimizer's state)" if config.fsdp_base else "")
        )
    if flags and not config.save.lora_ckpt_filter:
        raise UsageError(
            f"{' and '.join(flags)} with --no-lora-ckpt-filter: no rank holds the whole base to write it; leave the latter out and "
            "merge with convert_ckpt.py --lora-load"
        )
    if config.runtime.qlora and not config.dry_run:
        check_nf4()
    if dp_size == 1:
        cut = (
            (config.fsdp_base, "--fsdp-base", "base"),
            (config.optimizer.use_distributed_optimizer, "--use-distributed-optimizer", "state"),
        )
        notes += [
            f"{flag} has no effect with one data-parallel rank: there is nothing to cut the {what} over"
            for given, flag, what in cut
            if given
        ]


def _pad_multiple(config: TrainConfig, model: ModelConfig, notes: list[str]) -> int:
    data, tp_size = config.data, config.parallel.tensor_parallel_size
    if data.seq_length < 2:
        raise UsageError(f"--seq-length {data.seq_length} must be at least 2")
    if data.pad_to_multiple_of < 1:
        raise UsageError(f"--pad-to-multiple-of {data.pad_to_multiple_of} must be at least 1")
    if data.pad_to_seq_length and config.parallel.sequence_parallel and data.seq_length % tp_size:
        raise UsageError(
            f"--seq-length {data.seq_length} is not divisible by --tensor-model-parallel-size {tp_size}, which --sequence-parallel needs; "
            f"use {-(-data.seq_length // tp_size) * tp_size}, or --no-pad-to-seq-lengths"
        )
    if model.max_position_embeddings is not None and data.seq_length > model.max_position_embeddings:
        notes.append(f"--seq-length {data.seq_length} is more than the model's max_position_embeddings {model.max_position_embeddings}")
    return math.lcm(data.pad_to_multiple_of, tp_size)


def _open_data(
    config: TrainConfig, start: StartPoint, model: ModelConfig, notes: list[str]
) -> tuple[SFTDataset | PairDataset, tuple[range, range, range], Any]:
    prefix = _prepared(config, start, notes)
    dataset: SFTDataset | PairDataset
    if config.preference is None:
        dataset = open_sft_dataset(prefix)
    else:
        dataset = open_pair_dataset(prefix, config.data.seq_length)
        notes += dataset.notes()
    splits = split_ranges(len(dataset), config.data.split)
    if config.eval_interval and not splits[1]:
        shares = ",".join(f"{share:g}" for share in config.data.split)
        why = f"--split {shares} leaves none of the {len(dataset)} samples for validation; use --split 95,5,0"
        if config.save.save_best:
            raise UsageError(f"--save-best: {why}")
        notes.append(f"--eval-interval {config.eval_interval} has no effect: {why}")
    tokenizer = load_tokenizer(config.tokenizer, start.base.config_dir)
    check_data_manifest(dataset.manifest, tokenizer, config.template)
    if dataset.manifest is None and (unchecked := _of_the_data(config)):
        notes.append(f"{' '.join(unchecked)}: {dataset.prefix} has no manifest that says how it was made, so this is not checked")
    dataset.check_token_ids(model.vocab_size)
    log_first_sample(dataset.prefix, PAIR_KEYS if isinstance(dataset, PairDataset) else KEYS, splits[0][0], tokenizer, config.template)
    return dataset, splits, tokenizer


def _of_the_data(config: TrainConfig) -> list[str]:
    """The passed flags that only say how prepared data was made."""
    template, data = config.template, config.data
    said = (
        ("--prompt-type", template.prompt_type),
        ("--enable-thinking", template.enable_thinking),
        ("--hf-chat-template", template.hf_chat_template),
        ("--pack", data.pack),
    )
    return [flag for flag, value in said if value]


def _prepared(config: TrainConfig, start: StartPoint, notes: list[str]) -> str | Path:
    """``--data-path``, or what it becomes where it is raw; no process group is open yet, so nothing times out."""
    data = config.data
    if is_raw_data(data.data_path):
        _check_handler(config)
        tokenizer = replace(config.tokenizer, name_or_path=config.tokenizer.name_or_path or start.base.config_dir)
        return prepare_raw_data(data, tokenizer, config.template, cache_root(data, config.save.save))
    if unused := unused_raw_flags(data):
        notes.append(f"{' '.join(unused)}: --data-path is preprocessed already, so there is nothing for it to do")
    return data.data_path


def _check_handler(config: TrainConfig) -> None:
    """Raise UsageError where the raw records would not become what the stage trains on."""
    handler = config.data.handler_name
    if handler is not None and handler.endswith(PAIRWISE_SUFFIX) != (config.stage == "dpo"):
        found, other = ("pairs", "dpo") if handler.endswith(PAIRWISE_SUFFIX) else ("single records", "sft")
        raise UsageError(
            f"--handler-name {handler} makes {found}, which --stage {config.stage} does not train on; use --stage {other}, or "
            f"{'AlpacaStylePairwiseHandler or SharegptStylePairwiseHandler' if config.stage == 'dpo' else 'an instruction handler'}"
        )


def _origin(config: TrainConfig, dataset: SFTDataset | PairDataset, schedule: LearningRateSchedule) -> dict[str, Any]:
    return {
        "stage": config.stage,
        "seed": config.runtime.seed,
        "num_samples": len(dataset),
        "split": list(config.data.split),
        "shuffle": config.data.shuffle,
        "schedule": dict(vars(schedule)),
    }


def _reference(plan: ModelPlan, state: TrainerState) -> ReferencePoint | None:
    """The reference of a preference loss; the training state keeps its name for the runs that continue this one."""
    preference = plan.config.preference
    if preference is None:
        return None
    recorded, architecture = state.origin.get("reference"), plan.config.architecture
    reference = find_reference(preference, plan.start, recorded, architecture, plan.model, plan.lora, plan.layout)
    if reference is None:
        plan.notes.append(f"--dpo-loss-type {preference.loss_type} needs no reference model")
        return None
    if preference.ref_iteration is not None and reference.base.kind == "hf":
        plan.notes.append("--refer-model-iter: the reference is a Hugging Face folder, which has no iterations")
    state.origin["reference"] = reference.record
    plan.notes.append(reference.describe())
    return reference


def _continued_state(config: TrainConfig, start: StartPoint, origin: dict[str, Any], notes: list[str]) -> TrainerState:
    """Counters to start from.

    Raises:
        CheckpointError: the data order of this run is another one than the saved position counts in.
    """
    if start.resume is None:
        loads = (("--no-load-optim", config.load.load_optim), ("--no-load-rng", config.load.load_rng))
        if idle := [flag for flag, load in loads if not load]:
            notes.append(f"{' '.join(idle)}: no training state is continued, so there is nothing to leave out")
        return TrainerState(origin=origin)
    state = read_trainer_state(start.resume)
    state.origin.setdefault("stage", "sft")  # of runs before there was another one
    flags = {
        "stage": "--stage",
        "seed": "--seed",
        "num_samples": "the samples of --data-path",
        "split": "--split",
        "shuffle": "--no-shuffle",
    }
    for key, flag in flags.items():
        if key in state.origin and state.origin[key] != origin[key]:
            raise CheckpointError(
                f"{start.resume}: the run was made with {key} {state.origin[key]}, this one has {origin[key]} ({flag}); "
                "its data position means other samples now. Use the same value, or pass --finetune to start from the weights at iteration 0"
            )
    if state.origin.get("schedule") != origin["schedule"]:
        notes.append("the learning-rate schedule differs from the checkpoint's; this run's flags are used")
    state.origin = {key: value for key, value in state.origin.items() if key == "reference"} | origin
    notes.append(f"continuing {start.root} at iteration {state.iteration}")
    return state
