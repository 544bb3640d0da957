"""``posttrain_gpt.py``: plan, load, train, save, report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mindspeed_lora.arguments.configs import TrainConfig
from mindspeed_lora.checkpoint.load import LoadReport, load_adapter, load_base
from mindspeed_lora.checkpoint.resume import restore_optimizer, restore_rng
from mindspeed_lora.checkpoint.save import SaveTarget, save_checkpoint
from mindspeed_lora.data.batches import BatchMaker, BatchShape, EvalBatches, StepBatches, make_batch
from mindspeed_lora.data.pairs import make_pair_batch
from mindspeed_lora.errors import CheckpointError
from mindspeed_lora.log import get_logger
from mindspeed_lora.lora.inject import inject_lora
from mindspeed_lora.model.stage import GPTStage, build_stage_modules
from mindspeed_lora.ops.nf4 import Nf4, check_nf4
from mindspeed_lora.parallel.collectives import barrier, broadcast_object
from mindspeed_lora.parallel.context import ParallelContext, initialize, shutdown, world_size_from_environment
from mindspeed_lora.parallel.grouped import choose_products
from mindspeed_lora.parallel.on_demand import BaseStorage, Plain
from mindspeed_lora.parallel.pipeline import PipelineRunner, sum_of_rows
from mindspeed_lora.training.balance import ExpertBalance
from mindspeed_lora.training.dry_run import dry_run
from mindspeed_lora.training.ending import report_end
from mindspeed_lora.training.flat import TrainedParameter
from mindspeed_lora.training.flops import flops_model
from mindspeed_lora.training.guards import check_replicas
from mindspeed_lora.training.loop import Machinery, Trainer
from mindspeed_lora.training.loss_scale import build_scaler
from mindspeed_lora.training.objective import Objective, PairLoss, RecordLoss
from mindspeed_lora.training.optimizer import build_updates
from mindspeed_lora.training.parameters import trained_parameters
from mindspeed_lora.training.preference import PreferenceLoss
from mindspeed_lora.training.preflight import TrainingPlan, plan_training
from mindspeed_lora.training.profiling import step_trace
from mindspeed_lora.training.reference import build_reference
from mindspeed_lora.training.report import Recorder, tensorboard_installed
from mindspeed_lora.training.starting import report_start


def train(config: TrainConfig) -> int:
    """Train as ``config`` says; under torchrun every rank calls it.

    Returns:
        The exit code 0.

    Raises:
        MindSpeedLoraError: what the user can put right (see :func:`~mindspeed_lora.training.preflight.plan_training`).
    """
    if config.dry_run:
        return dry_run(config)
    parallel = config.parallel
    plan = plan_training(config, world_size_from_environment())
    context = initialize(
        config.runtime.device,
        parallel.tensor_parallel_size,
        parallel.pipeline_parallel_size,
        parallel.sequence_parallel,
        config.runtime.distributed_timeout_minutes,
        *parallel.expert_grid,
    )
    try:
        _run(plan, context)
        barrier()  # torch 2.7's gloo loses what is under way when another rank leaves first
    finally:
        shutdown()
    return 0


def _run(plan: TrainingPlan, context: ParallelContext) -> None:
    if plan.state.iteration >= plan.config.train_iters:
        get_logger().info(
            f"{plan.start.root} is at iteration {plan.state.iteration} of --train-iters {plan.config.train_iters}: "
            "nothing to do; raise --train-iters to go on"
        )
        return
    torch.manual_seed(plan.config.runtime.seed)
    stages, loaded = build_model(plan, context)
    trained = trained_parameters(stages, plan.table, context)
    report_start(plan, context, loaded)
    parts = build_machinery(plan, context, stages, trained)
    _continue(plan, context, parts)
    recorder = _recorder(plan) if context.rank == 0 else None
    try:
        trainer = _trainer(plan, context, stages, trained, parts, recorder)
        trainer.run(iter(training_batches(plan, context)))
    finally:
        if recorder is not None:
            recorder.close()
    report_end(plan, context, trained, trainer.totals)


def build_model(plan: TrainingPlan, context: ParallelContext) -> tuple[list[GPTStage], LoadReport]:
    """This rank's stages with the base's weights, and the adapter's or fresh LoRA values."""
    parallel = plan.config.parallel
    virtual, storage = parallel.layers_per_virtual_stage, base_storage(plan.config, context)
    stages = build_stage_modules(plan.model, context, plan.dtype, virtual, plan.config.recompute, storage)
    adapter = plan.start.adapter
    if plan.lora is not None:
        seed = plan.config.runtime.seed if adapter is None else None
        fusion = plan.config.lora is not None and plan.config.lora.fusion
        for stage in stages:
            inject_lora(stage, plan.table, plan.lora, context, fusion, seed)
    products = choose_products(stages, plan.model, plan.config.runtime.moe_grouped_gemm)
    if products is not None:
        get_logger().info(f"experts: {products}")
    loaded = load_base(stages, plan.start.base, plan.table, context)
    if adapter is not None:
        loaded = LoadReport(loaded.base, load_adapter(stages, adapter, plan.table, context).adapter)
    return stages, loaded


def base_storage(config: TrainConfig, context: ParallelContext) -> Callable[[], BaseStorage] | None:
    """What holds a stage's frozen linear weights with ``--fsdp-base`` or ``--qlora``; None: they are plain parameters.

    Raises:
        MindSpeedLoraError: 4-bit weights do not work here.
    """
    if not config.runtime.qlora:
        return partial(BaseStorage, context, Plain(), True) if config.fsdp_base and context.dp_size > 1 else None
    check_nf4(context.device.type)
    return partial(BaseStorage, context, Nf4(), config.fsdp_base)


def build_machinery(plan: TrainingPlan, context: ParallelContext, stages: Sequence[GPTStage], trained: list[TrainedParameter]) -> Machinery:
    """Flat buffers, optimizer, pipeline runner, and what it minimises."""
    flags, preference = plan.config.optimizer, plan.config.preference
    loss = sum_of_rows if preference is None else PreferenceLoss(preference)
    runner = PipelineRunner(stages, context, plan.config.pipeline_buffer_fraction, loss)
    objective = _objective(plan, runner, stages)
    gradients, optimizer = build_updates(trained, context, flags)
    return Machinery(
        runner=runner,
        objective=objective,
        gradients=gradients,
        optimizer=optimizer,
        schedule=plan.schedule,
        flops=flops_model(plan.model, plan.table, plan.lora, plan.reference is not None),
        trains_lora=plan.lora is not None,
        scaler=build_scaler(plan.config.loss_scale, plan.dtype),
        balance=None if plan.balance is None else ExpertBalance(plan.balance, plan.model, stages, context),
    )


def _objective(plan: TrainingPlan, runner: PipelineRunner, stages: Sequence[GPTStage]) -> Objective:
    if not isinstance(runner.loss, PreferenceLoss):
        return RecordLoss(runner.context, plan.config.loss_normalization)
    reference = None
    if plan.reference is not None:
        storage = base_storage(plan.config, runner.context)
        reference = build_reference(plan.reference, plan.config, plan.model, plan.dtype, runner, stages, storage)
    return PairLoss(runner.context, runner.loss, reference)


def _continue(plan: TrainingPlan, context: ParallelContext, parts: Machinery) -> None:
    """Optimizer and random state of the continued run, less what ``--no-load-*`` leaves out."""
    if plan.start.resume is None:
        return
    load = plan.config.load
    if load.load_optim:
        restore_optimizer(plan.start.resume, parts.optimizer, plan.state.optimizer_steps, plan.table, context)
        if parts.scaler is not None:
            parts.scaler.restore(plan.state.loss_scale, plan.start.resume)
    else:
        plan.state.optimizer_steps = 0
        scale = "" if parts.scaler is None else f", loss scale {parts.scaler.scale:g}"
        get_logger().info(f"--no-load-optim: moments start at zero, masters from the loaded weights{scale}")
    if load.load_rng and not restore_rng(plan.start.resume, context):
        get_logger().info("the random state was not saved for this number of processes; seeded anew (training draws no random numbers)")


def training_batches(plan: TrainingPlan, context: ParallelContext) -> StepBatches:
    """This rank's rows of every global batch, from the state's position on."""
    data = plan.config.data
    return StepBatches(
        plan.dataset,
        plan.splits[0],
        plan.config.runtime.seed,
        data.shuffle,
        plan.config.micro_batch_size,
        plan.global_batch_size,
        context.dp_rank,
        context.dp_size,
        data.seq_length,
        data.pad_to_seq_length,
        plan.pad_multiple,
        plan.pad_token_id,
        start_sample=plan.state.consumed_samples,
        documents=plan.documents,
        make=_batch_maker(plan),
        padding_free=data.padding_free,
    )


def _batch_maker(plan: TrainingPlan) -> BatchMaker:
    return make_batch if plan.config.preference is None else make_pair_batch


def _validation_batches(plan: TrainingPlan, context: ParallelContext) -> EvalBatches | None:
    data = plan.config.data
    if not plan.splits[1]:
        return None
    shape = BatchShape(
        plan.config.micro_batch_size,
        plan.global_batch_size,
        context.dp_rank,
        context.dp_size,
        data.seq_length,
        data.pad_to_seq_length,
        plan.pad_multiple,
        plan.pad_token_id,
        plan.documents,
        data.padding_free,
    )
    return EvalBatches(plan.dataset, plan.splits[1], shape, plan.config.eval_iters, _batch_maker(plan))


def _recorder(plan: TrainingPlan) -> Recorder:
    save = plan.config.save
    tensorboard = save.tensorboard_dir
    if tensorboard is None and save.save is not None and tensorboard_installed():
        tensorboard = save.save / "tensorboard"
    return Recorder(save.save, tensorboard, plan.state.iteration)


def _trainer(
    plan: TrainingPlan,
    context: ParallelContext,
    stages: Sequence[GPTStage],
    trained: list[TrainedParameter],
    parts: Machinery,
    recorder: Recorder | None,
) -> Trainer:
    target = _save_target(plan, context) if plan.config.save.save is not None else None

    def save() -> None:
        assert target is not None
        check_replicas(trained, context)
        save_checkpoint(target, context, stages, plan.state, parts.optimizer)

    return Trainer(
        plan.config,
        context,
        parts,
        plan.state,
        _validation_batches(plan, context),
        plan.global_batch_size,
        save if target is not None else None,
        recorder,
        step_trace(plan.config, context.rank, context.device),
    )


def _save_target(plan: TrainingPlan, context: ParallelContext) -> SaveTarget:
    save, base = plan.config.save, plan.start.base
    assert save.save is not None
    manifest = plan.dataset.manifest
    return SaveTarget(
        folder=Path(save.save),
        config=plan.model,
        layout=plan.layout,
        dtype=plan.dtype,
        lora=plan.lora,
        lora_only=plan.lora is not None and save.lora_ckpt_filter,
        base=_base_reference(plan, context),
        config_dir=base.config_dir,
        tokenizer_dir=plan.tokenizer_dir,
        described={"tokenizer": manifest.tokenizer if manifest else None, "template": manifest.template if manifest else None},
        save_optim=save.save_optim,
        save_rng=save.save_rng,
        total_limit=save.save_total_limit,
    )


def _base_reference(plan: TrainingPlan, context: ParallelContext) -> dict[str, Any]:
    """Path and fingerprint of the base, read once by rank 0 of each replica."""
    base = plan.start.base
    value: object = None
    if context.pp_rank == 0 and context.tp_rank == 0:
        try:
            value = {"path": str(Path(base.path).resolve()), "fingerprint": base.fingerprint(plan.table)}
        except (CheckpointError, OSError) as error:
            value = str(error)
    value = broadcast_object(value, 0, context.model_group)
    if not isinstance(value, dict):
        raise CheckpointError(f"the base's fingerprint cannot be taken: {value}")
    return value
