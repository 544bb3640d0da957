"""Flags of ``posttrain_gpt.py`` alone: data, batches, optimizer, evaluation, saving, memory."""

from __future__ import annotations

from mindspeed_lora.arguments.flag import TRAIN, Flag, active
from mindspeed_lora.arguments.flags_tools import OTHER_HANDLERS, TRAINED_HANDLERS
from mindspeed_lora.arguments.values import (
    BELOW_HALF,
    COUNT,
    COUNT_OR_ZERO,
    DECAY,
    FRACTION,
    JSON_OBJECT,
    NOT_NEGATIVE,
    PATH,
    POSITIVE,
    SHARE,
    SPLIT,
    TEXT,
    WHOLE,
)

T = (TRAIN,)
LATER_SCHEDULE = "this schedule comes with a later release; use linear, cosine or constant"

RESUMING = [
    active("--finetune", T, "files", "take weights only and start at iteration 0", None, "load.finetune"),
    active("--no-load-optim", T, "files", "resume without the optimizer's state", None, "load.load_optim", const=False),
    active("--no-load-rng", T, "files", "resume without the random state", None, "load.load_rng", const=False),
]

DATA = [
    active(
        "--data-path",
        T,
        "data",
        "what preprocess_data.py wrote: the value of --output-prefix, or any longer form down to a file name; or, with --handler-name, raw "
        "records, which are preprocessed first",
        TEXT,
        "data.data_path",
        one_only="mixing several data sets comes with a later release; give one",
        required=True,
    ),
    active("--split", T, "data", "shares of training, validation and test", SPLIT, "data.split", default_text="969,30,1"),
    active(
        "--reset-attention-mask",
        T,
        "data",
        "the documents of a sample do not see each other: the records of a pack made with --neat-pack, else what ends in an eos token",
        None,
        "data.reset_attention_mask",
    ),
    active(
        "--pack", T, "data", "several records share a sample of --seq-length tokens; of prepared data, it must be so", None, "data.pack"
    ),
    active(
        "--neat-pack",
        T,
        "data",
        "with numbered records, so that --reset-attention-mask keeps them apart; of prepared data, it must be so",
        None,
        "data.neat_pack",
    ),
    active(
        "--handler-name",
        T,
        "data",
        "form of the records, where --data-path is a raw parquet, json, jsonl or csv file or a folder of them",
        TEXT,
        "data.handler_name",
        choices=TRAINED_HANDLERS,
        not_yet=dict.fromkeys(
            OTHER_HANDLERS, "its data (prompts, plain text) is not for this training, which reads instructions and pairs"
        ),
        default_text="--data-path is prepared",
    ),
    active(
        "--map-keys",
        T,
        "data",
        "of raw data: names of the columns, where they differ (see preprocess_data.py)",
        JSON_OBJECT,
        "data.map_keys",
        default_text="the handler's",
    ),
    active("--workers", T, "data", "of raw data: processes that preprocess it", COUNT, "data.workers"),
    active(
        "--cache-dir",
        T,
        "data",
        "of raw data: where its preprocessed form is kept and found again",
        PATH,
        "data.cache_dir",
        default_text="data_cache beside --save, else ~/.cache/mindspeed_lora/data",
    ),
    active("--no-shuffle", T, "data", "take the records in their own order", None, "data.shuffle", const=False),
]

PREFERENCE = [
    active(
        "--stage",
        T,
        "data",
        "sft: supervised fine-tuning; dpo: training on preference pairs, with the loss of --dpo-loss-type",
        TEXT,
        "stage",
        choices=("sft", "dpo"),
        not_yet=dict.fromkeys(("ray_ppo", "ray_online_dpo", "ray_grpo"), "reinforcement learning is not supported; use sft or dpo"),
    ),
    active(
        "--dpo-loss-type",
        T,
        "preference pairs",
        "the loss: sigmoid (DPO), hinge, ipo; simpo and orpo need no reference model",
        TEXT,
        "preference.loss_type",
        choices=("sigmoid", "hinge", "ipo", "simpo", "orpo"),
    ),
    active("--dpo-beta", T, "preference pairs", "how much a difference of log-probabilities counts", POSITIVE, "preference.beta"),
    active(
        "--dpo-label-smoothing",
        T,
        "preference pairs",
        "with sigmoid or simpo: share of the pairs whose answers are thought to be swapped",
        BELOW_HALF,
        "preference.label_smoothing",
    ),
    active(
        "--pref-ftx",
        T,
        "preference pairs",
        "add so many times the chosen answers' mean -log p to the loss",
        NOT_NEGATIVE,
        "preference.pref_ftx",
    ),
    active(
        "--simpo-gamma", T, "preference pairs", "with simpo: the margin that a pair should have", NOT_NEGATIVE, "preference.simpo_gamma"
    ),
    active(
        "--ref-model",
        T,
        "preference pairs",
        "reference model: a Hugging Face or Megatron folder, or an adapter's",
        PATH,
        "preference.ref_model",
        must_exist="folder",
        default_text="the model that training starts from",
    ),
    active(
        "--refer-model-iter",
        T,
        "preference pairs",
        "iteration of the reference's Megatron folder",
        COUNT_OR_ZERO,
        "preference.ref_iteration",
        default_text="the newest",
    ),
]

BATCH = [
    active(
        "--seq-length",
        T,
        "batch and length",
        "longest record; longer ones are cut",
        COUNT,
        ("data.seq_length", "architecture.seq_length"),
        unit="tokens",
    ),
    active("--micro-batch-size", T, "batch and length", "records per forward pass and replica", COUNT, "micro_batch_size"),
    active(
        "--global-batch-size",
        T,
        "batch and length",
        "records per optimizer step; a multiple of micro batch size x data parallel size",
        COUNT,
        "global_batch_size",
        default_text="micro batch size x data parallel size",
    ),
    active("--train-iters", T, "batch and length", "optimizer steps in all", COUNT, "train_iters", required=True),
    active(
        "--no-pad-to-seq-lengths",
        T,
        "batch and length",
        "pad to the longest record of the global batch instead of --seq-length",
        None,
        "data.pad_to_seq_length",
        const=False,
    ),
    active(
        "--pad-to-multiple-of",
        T,
        "batch and length",
        "round padded lengths up to a multiple of this",
        COUNT,
        "data.pad_to_multiple_of",
        unit="tokens",
    ),
    active(
        "--padding-free",
        T,
        "batch and length",
        "the records of a micro-batch lie behind one another in one row and do not see each other: nothing is padded, and no offline "
        "pack is needed",
        None,
        "data.padding_free",
    ),
    active(
        "--loss-normalization",
        T,
        "batch and length",
        "tokens: mean over the trained tokens of the global batch; micro-batch: mean of the micro-batches' means (MindSpeed-LLM's default)",
        TEXT,
        "loss_normalization",
        choices=("tokens", "micro-batch"),
    ),
]

OPTIMIZER = [
    active("--lr", T, "optimizer and schedule", "highest learning rate", POSITIVE, "optimizer.lr"),
    active("--min-lr", T, "optimizer and schedule", "learning rate at the end of the decay", NOT_NEGATIVE, "optimizer.min_lr"),
    active(
        "--lr-decay-style",
        T,
        "optimizer and schedule",
        "shape of the decay",
        TEXT,
        "optimizer.lr_decay_style",
        choices=("linear", "cosine", "constant"),
        not_yet={"inverse-square-root": LATER_SCHEDULE, "WSD": LATER_SCHEDULE},
    ),
    active(
        "--lr-decay-iters",
        T,
        "optimizer and schedule",
        "steps until --min-lr",
        COUNT,
        "optimizer.lr_decay_iters",
        unit="steps",
        default_text="--train-iters",
    ),
    active(
        "--lr-warmup-fraction", T, "optimizer and schedule", "warm-up as a fraction of the decay", FRACTION, "optimizer.lr_warmup_fraction"
    ),
    active(
        "--lr-warmup-iters",
        T,
        "optimizer and schedule",
        "warm-up as a number of steps",
        COUNT_OR_ZERO,
        "optimizer.lr_warmup_iters",
        unit="steps",
    ),
    active(
        "--lr-warmup-init",
        T,
        "optimizer and schedule",
        "learning rate at the start of the warm-up",
        NOT_NEGATIVE,
        "optimizer.lr_warmup_init",
    ),
    active("--weight-decay", T, "optimizer and schedule", "decoupled; not on norms and biases", NOT_NEGATIVE, "optimizer.weight_decay"),
    active("--adam-beta1", T, "optimizer and schedule", "decay of the gradient's mean", DECAY, "optimizer.adam_beta1"),
    active("--adam-beta2", T, "optimizer and schedule", "decay of the gradient's square", DECAY, "optimizer.adam_beta2"),
    active("--adam-eps", T, "optimizer and schedule", "added to the denominator", POSITIVE, "optimizer.adam_eps"),
    active(
        "--clip-grad",
        T,
        "optimizer and schedule",
        "largest norm of the whole gradient; 0: no clipping",
        NOT_NEGATIVE,
        "optimizer.clip_grad",
    ),
    active(
        "--use-distributed-optimizer",
        T,
        "optimizer and schedule",
        "cut optimizer state over the data-parallel ranks (ZeRO-1)",
        None,
        "optimizer.use_distributed_optimizer",
    ),
]

EVALUATION = [
    active(
        "--eval-interval",
        T,
        "evaluation while training",
        "validate every so many steps",
        COUNT,
        "eval_interval",
        unit="steps",
        default_text="never",
    ),
    active("--eval-iters", T, "evaluation while training", "global batches per validation; 0: none", COUNT_OR_ZERO, "eval_iters"),
]

SAVING = [
    active(
        "--save",
        T,
        "saving and logging",
        "folder of checkpoints, logs and resume state",
        PATH,
        "save.save",
        default_text="nothing is written",
    ),
    active(
        "--save-interval",
        T,
        "saving and logging",
        "save every so many steps",
        COUNT,
        "save.save_interval",
        unit="steps",
        default_text="at the end only",
    ),
    active(
        "--save-best",
        T,
        "saving and logging",
        "save as well after each validation (--eval-interval) with the lowest loss so far, and name that iteration in "
        "best_checkpointed_iteration.txt",
        None,
        "save.save_best",
    ),
    active(
        "--save-total-limit",
        T,
        "saving and logging",
        "keep so many of the newest iterations, and the best one; older ones are removed once a newer one is complete",
        COUNT,
        "save.save_total_limit",
        unit="iterations",
        default_text="all are kept",
    ),
    active("--no-save-optim", T, "saving and logging", "save no optimizer state", None, "save.save_optim", const=False),
    active("--no-save-rng", T, "saving and logging", "save no random state", None, "save.save_rng", const=False),
    active(
        "--lora-ckpt-filter", T, "saving and logging", "save adapter tensors only (the default)", None, "save.lora_ckpt_filter", const=True
    ),
    active(
        "--no-lora-ckpt-filter",
        T,
        "saving and logging",
        "save base and adapter in one checkpoint",
        None,
        "save.lora_ckpt_filter",
        const=False,
    ),
    active(
        "--tensorboard-dir",
        T,
        "saving and logging",
        "folder of TensorBoard events",
        PATH,
        "save.tensorboard_dir",
        default_text="tensorboard under --save",
    ),
    active("--log-interval", T, "saving and logging", "print every so many steps", COUNT, "log_interval", unit="steps"),
    active("--log-throughput", T, "saving and logging", "add tokens/s and TFLOP/s to the printed line", None, "log_throughput"),
]

PROFILE = [
    active(
        "--profile",
        T,
        "saving and logging",
        "write a trace of some steps (Chrome's JSON, for ui.perfetto.dev), with operators, collectives and the parts of the step",
        None,
        "profile",
        default_text="off",
    ),
    active("--profile-step-start", T, "saving and logging", "first traced iteration, counted from 1", COUNT, "profile.step_start"),
    active(
        "--profile-step-end",
        T,
        "saving and logging",
        "the iteration after the last traced one; -1: trace to the run's end",
        WHOLE,
        "profile.step_end",
    ),
    active("--profile-ranks", T, "saving and logging", "ranks that write a trace; -1: all", WHOLE, "profile.ranks", many=True),
    active(
        "--profile-save-path",
        T,
        "saving and logging",
        "folder of the traces",
        PATH,
        "profile.save_path",
        default_text="profile under --save, else ./profile_dir",
    ),
    active("--profile-record-shapes", T, "saving and logging", "with the operators' shapes", None, "profile.record_shapes"),
    active("--profile-with-memory", T, "saving and logging", "with the memory that operators take", None, "profile.with_memory"),
    active("--profile-with-stack", T, "saving and logging", "with Python's stack of each operator", None, "profile.with_stack"),
]

MEMORY = [
    active(
        "--recompute-granularity",
        T,
        "memory",
        "compute activations again in the backward pass: of whole layers, or of attention only",
        TEXT,
        "recompute.granularity",
        choices=("full", "selective"),
        default_text="off",
    ),
    active(
        "--recompute-method",
        T,
        "memory",
        "with full: the first layers of a stage (block), or groups of layers (uniform)",
        TEXT,
        "recompute.method",
        choices=("block", "uniform"),
    ),
    active(
        "--recompute-num-layers", T, "memory", "with full: layers of the block, or per group", COUNT, "recompute.num_layers", unit="layers"
    ),
    active(
        "--fsdp-base",
        T,
        "memory",
        "with LoRA: each data-parallel rank holds a part of the frozen linear weights, and a layer is gathered while it computes",
        None,
        "fsdp_base",
    ),
    active(
        "--pipeline-buffer-fraction",
        T,
        "memory",
        "share of device memory that pipeline receive buffers may take",
        SHARE,
        "pipeline_buffer_fraction",
    ),
]

DRY_RUN = [
    active(
        "--dry-run",
        T,
        "memory",
        "print memory per device, with --dry-run-machine also the time of a step, and what to change where it does not fit; no device is "
        "touched, no torchrun needed, nothing read but the checkpoint's headers (a folder with a config.json alone will do)",
        None,
        "dry_run",
    ),
    active(
        "--dry-run-machine",
        T,
        "memory",
        "judge the dry run by this machine's memory, FLOP/s and links: atlas-900-a2, h100, h200, rtx4090 or laptop",
        TEXT,
        "dry_run_machine",
        default_text="memory alone is printed",
    ),
    active(
        "--dry-run-devices",
        T,
        "memory",
        "devices of the dry run, over all nodes",
        COUNT,
        "dry_run_devices",
        default_text="torchrun's processes, else the machine's devices, else TP x PP",
    ),
]

FLAGS: list[Flag] = [*RESUMING, *DATA, *PREFERENCE, *BATCH, *OPTIMIZER, *EVALUATION, *SAVING, *PROFILE, *MEMORY, *DRY_RUN]
