"""Flags of MindSpeed-LLM's scripts that change the result and are not supported: each with the sentence that says so."""

from __future__ import annotations

from mindspeed_lora.arguments.flag import COMMANDS, CONVERT, EVALUATE, PREPROCESS, RUNS, Flag, refused
from mindspeed_lora.arguments.values import TEXT

MODELS = (*RUNS, CONVERT)
SPARSE = "sparse attention and scaled latents (DeepSeek-V3.2, LongCat) are not supported; DeepSeek-V2 and V3 work"
MTP = "multi-token prediction comes with a later release; leave it out"
FAMILY = "the families that need it (Gemma, GLM, MiniCPM, Phi and others) come with a later release; Qwen3 dense and Llama work"
LINEAR_ATTENTION = "linear attention (Qwen3-Next, Mamba) is not supported; Qwen3 dense and Llama work"
PLACEMENT = "uneven and empty layers come with a later release; use a pipeline size that divides the number of layers"
TORCHRUN = "this flag belongs to torchrun: put it before the name of the program"

LATENT_FLAGS = [
    *refused("index-topk index-n-heads", MODELS, SPARSE, TEXT),
    *refused("enable-dsa-indexer use-fused-lightning-indexer enable-mla-scale-q-lora enable-mla-scale-kv-lora", MODELS, SPARSE),
    *refused(
        "mla-mm-split",
        (*RUNS, CONVERT),
        "latent attention's up-projections are written whole, as without this flag; leave it out here and in training",
    ),
    *refused("mtp-num-layers", RUNS, MTP, TEXT),
    *refused("mtp-loss-scaling-factor", MODELS, MTP, TEXT),
    *refused("mtp-mem-efficient-logits", MODELS, MTP),
]

FAMILY_FLAGS = [
    *refused(
        "query-pre-attn-scalar interleave-sliding-window output-logit-softcapping attn-logit-softcapping fc-type partial-rotary-factor "
        "longrope-freqs-type "
        "long-factor short-factor long-mscale short-mscale dynamic-factor",
        MODELS,
        FAMILY,
        TEXT,
    ),
    *refused(
        "add-rmsnorm-offset gelu-tanh post-norm input-embeds-norm squared-relu add-dense-bias add-output-layer-bias rmsnorm-weight-in-fp32 "
        "init-norm-weight-in-fp32 input-layernorm-in-fp32",
        MODELS,
        FAMILY,
    ),
    *refused(
        "full-attention-interval linear-key-head-dim linear-num-key-heads linear-num-value-heads linear-value-head-dim mamba-chunk-size "
        "mamba-d-conv mamba-expand "
        "mamba-head-dim mamba-num-groups mamba-state-dim",
        MODELS,
        LINEAR_ATTENTION,
        TEXT,
    ),
    *refused("no-enable-linear-qkv use-triton-gdn", MODELS, LINEAR_ATTENTION),
]

DATA_FLAGS = [
    *refused("tokenizer-model", (*RUNS, PREPROCESS), "tokenizers are Hugging Face folders; use --tokenizer-name-or-path", TEXT),
]

RUN_FLAGS = [
    *refused("num-layer-list noop-layers", RUNS, PLACEMENT, TEXT),
    *refused(
        "schedules-method", MODELS, "this pipeline schedule is not supported; leave it out: one-forward-one-backward, or interleaved", TEXT
    ),
    *refused("qlora", (CONVERT,), "conversion keeps weights whole; training and inference take --qlora and quantise as they load"),
    *refused("qlora-nf4", RUNS, "this flag belongs to convert_ckpt.py; use --qlora"),
    *refused("lu-lora-lr lu-lora-lr-ratio lu-lora-final-layer-index", RUNS, "LU-LoRA is not supported; leave it out", TEXT),
    *refused("npu-deterministic", RUNS, "deterministic kernels cannot be promised on NPU yet; leave it out"),
    *refused("alternative-prompt origin-postprocess", (EVALUATE,), "prompts and scores are lm-evaluation-harness's own; leave it out"),
    *refused("instruction-template", (EVALUATE,), "prompts are lm-evaluation-harness's own; --prompt-type wraps them in a template", TEXT),
    *refused(
        "chain-of-thought",
        (EVALUATE,),
        "the task's name says it: bbh reasons step by step (bbh_fewshot does not), gsm8k_cot is lm-evaluation-harness's; leave it out",
    ),
    *refused("load-checkpoint-loosely", RUNS, "a missing or unknown tensor is always an error; leave it out"),
    *refused("hidden-size num-layers", (CONVERT,), "the model's sizes come from config.json; leave it out", TEXT),
    *refused("nproc_per_node nnodes node_rank master_addr master_port local-rank local_rank", COMMANDS, TORCHRUN, TEXT),
]

FLAGS: list[Flag] = [*LATENT_FLAGS, *FAMILY_FLAGS, *DATA_FLAGS, *RUN_FLAGS]
