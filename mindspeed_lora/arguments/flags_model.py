"""Flags that say which weights, model, layout, tokenizer, template, adapter and device: shared by the commands that run a model."""

from __future__ import annotations

from mindspeed_lora.arguments.configs import LATENT_TARGETS, LORA_TARGETS
from mindspeed_lora.arguments.flag import CONVERT, EVALUATE, INFER, PREPROCESS, RUNS, TRAIN, Flag, active
from mindspeed_lora.arguments.values import COUNT, PATH, POSITIVE, TEXT, WHOLE

LOADING = [
    active(
        "--load",
        RUNS,
        "files",
        "checkpoint folder: Hugging Face, or Megatron (ours or MindSpeed-LLM's) at any layout",
        PATH,
        "load.load",
        required=True,
        must_exist="folder",
    ),
    active(
        "--lora-load",
        (TRAIN, EVALUATE),
        "files",
        "adapter folder: ours, MindSpeed-LLM's or PEFT's",
        PATH,
        "load.lora_load",
        must_exist="folder",
    ),
    active("--verify", RUNS, "files", "check the checksum of every file before the run", None, "load.verify"),
    active(
        "--tokenizer-name-or-path",
        RUNS,
        "files",
        "tokenizer folder",
        PATH,
        "tokenizer.name_or_path",
        must_exist="folder",
        default_text="the tokenizer that travels with --load",
    ),
    active(
        "--tokenizer-name-or-path",
        (PREPROCESS,),
        "files",
        "tokenizer folder",
        PATH,
        "tokenizer.name_or_path",
        must_exist="folder",
        default_text="required without --merge-group-keys",
    ),
    active(
        "--tokenizer-not-use-fast",
        (*RUNS, PREPROCESS),
        "files",
        "take the slow tokenizer, where one exists",
        None,
        "tokenizer.use_fast",
        const=False,
    ),
    active(
        "--trust-remote-code",
        (*RUNS, PREPROCESS),
        "files",
        "run Python code that lies in the tokenizer folder",
        None,
        "tokenizer.trust_remote_code",
    ),
]


def _architecture(name: str, help: str, value: object = COUNT, commands: tuple[str, ...] = RUNS) -> Flag:
    dest = "architecture." + name[2:].replace("-", "_")
    return active(name, commands, "model", help, value, dest, default_text="config.json")  # type: ignore[arg-type]


ARCHITECTURE = [
    _architecture("--num-layers", "decoder layers"),
    _architecture("--hidden-size", "width of the residual stream"),
    _architecture("--ffn-hidden-size", "width inside the MLP"),
    _architecture("--num-attention-heads", "query heads"),
    _architecture("--num-query-groups", "query groups (key-value heads)"),
    _architecture("--kv-channels", "size of one head"),
    _architecture("--vocab-size", "tokens in the vocabulary"),
    _architecture("--padded-vocab-size", "rows of the embedding"),
    _architecture("--norm-epsilon", "epsilon of RMSNorm", POSITIVE),
    _architecture("--rotary-base", "base of the rotary embedding (rope theta)", POSITIVE),
    _architecture("--qk-layernorm", "norms on queries and keys (Qwen3)", None),
    _architecture("--untie-embeddings-and-output-weights", "the output layer has its own weights", None),
    _architecture("--add-qkv-bias", "bias on queries, keys and values", None),
    _architecture("--max-position-embeddings", "longest position of the run, in tokens"),
    _architecture("--seq-length", "longest prompt and answer together, in tokens", commands=(INFER, EVALUATE)),
]

LAYOUT = [
    active(
        "--tensor-model-parallel-size",
        RUNS,
        "layout",
        "ranks that share each matrix; divides the query groups",
        COUNT,
        "parallel.tensor_parallel_size",
    ),
    active(
        "--pipeline-model-parallel-size",
        RUNS,
        "layout",
        "stages that share the layers; divides their number",
        COUNT,
        "parallel.pipeline_parallel_size",
    ),
    active(
        "--expert-model-parallel-size",
        RUNS,
        "layout",
        "ranks that share the experts; divides their number",
        COUNT,
        "parallel.expert_parallel_size",
    ),
    active(
        "--expert-tensor-parallel-size",
        RUNS,
        "layout",
        "ranks that share each expert's matrices: 1 or the tensor parallel size",
        COUNT,
        "parallel.expert_tensor_parallel_size",
        default_text="the tensor parallel size",
    ),
    active(
        "--moe-tp-extend-ep",
        RUNS,
        "layout",
        "deal experts out over the tensor ranks too, uncut: over EP x TP ranks",
        None,
        "parallel.experts_over_tensor_ranks",
    ),
    active(
        "--num-layers-per-virtual-pipeline-stage",
        (TRAIN,),
        "layout",
        "interleave: each stage holds several chunks of so many layers",
        COUNT,
        "parallel.layers_per_virtual_stage",
        unit="layers",
        default_text="off",
    ),
    active(
        "--sequence-parallel",
        RUNS,
        "layout",
        "cut activations between the matrices along the sequence too",
        None,
        "parallel.sequence_parallel",
    ),
]

TEMPLATE = [
    active(
        "--prompt-type",
        (*RUNS, PREPROCESS),
        "template",
        "chat template by name: qwen3, llama3, default, ... (docs/templates.md has all 33)",
        TEXT,
        "template.prompt_type",
        default_text="the data's or adapter's own",
    ),
    active(
        "--prompt-type-path",
        (*RUNS, PREPROCESS),
        "template",
        "file of templates",
        PATH,
        "template.prompt_type_path",
        must_exist="file",
        default_text="configs/finetune/templates.json",
    ),
    active(
        "--enable-thinking",
        (*RUNS, PREPROCESS),
        "template",
        "thinking mode of a reasoning template",
        TEXT,
        "template.enable_thinking",
        choices=("true", "false", "none"),
        default_text="the data's or adapter's own, else none",
    ),
    active(
        "--hf-chat-template",
        (*RUNS, PREPROCESS),
        "template",
        "the tokenizer's own chat template, for data as for prompts (not with --prompt-type)",
        None,
        "template.hf_chat_template",
    ),
]

LORA = [
    active(
        "--lora-target-modules",
        (*RUNS, CONVERT),
        "lora",
        "linears that get an adapter: " + " ".join(LORA_TARGETS) + "; with latent attention also " + " ".join(LATENT_TARGETS),
        TEXT,
        "lora.targets",
        many=True,
        choices=(*LORA_TARGETS, *LATENT_TARGETS),
        default_text="the adapter's own; without adapter: none",
    ),
    active("--lora-r", (*RUNS, CONVERT), "lora", "rank of A and B", COUNT, "lora.r", default_text="the adapter's own; new: 16"),
    active(
        "--lora-alpha",
        (*RUNS, CONVERT),
        "lora",
        "the update is scaled by alpha / r",
        POSITIVE,
        "lora.alpha",
        default_text="the adapter's own; new: 32",
    ),
    active(
        "--lora-shared-experts",
        (TRAIN,),
        "lora",
        "one A and B for all routed experts of a layer, in place of one each",
        None,
        "lora.shared_experts",
        default_text="the adapter's own; new: one each",
    ),
    active("--lora-fusion", RUNS, "lora", "fused functions: no communication beyond the frozen model's, same numbers", None, "lora.fusion"),
]

DEVICE = [
    active(
        "--device",
        RUNS,
        "device and dtype",
        "auto takes npu, then cuda, then cpu",
        TEXT,
        "runtime.device",
        choices=("auto", "npu", "cuda", "cpu"),
    ),
    active("--bf16", RUNS, "device and dtype", "compute in bfloat16", None, "runtime.params_dtype", const="bf16"),
    active(
        "--params-dtype",
        RUNS,
        "device and dtype",
        "dtype of weights and activations",
        TEXT,
        "runtime.params_dtype",
        choices=("bf16", "fp16", "fp32"),
        default_text="training: fp32; otherwise the checkpoint's own",
    ),
    active(
        "--qlora",
        RUNS,
        "device and dtype",
        "hold the frozen linear weights in 4 bits (NF4, from bitsandbytes: extra qlora), quantised while they are loaded; CUDA and CPU",
        None,
        "runtime.qlora",
    ),
    active("--seed", RUNS, "device and dtype", "of adapter initialisation, data order and sampling", WHOLE, "runtime.seed"),
    active(
        "--distributed-timeout-minutes",
        RUNS,
        "device and dtype",
        "a collective that takes longer ends the run",
        COUNT,
        "runtime.distributed_timeout_minutes",
        unit="minutes",
    ),
]

FLAGS: list[Flag] = [*LOADING, *ARCHITECTURE, *LAYOUT, *TEMPLATE, *LORA, *DEVICE]
