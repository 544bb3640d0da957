"""Flags of MindSpeed-LLM's scripts that are valid here and have nothing to do: each with its reason, and the values it may have."""

from __future__ import annotations

from mindspeed_lora.arguments.flag import EVALUATE, INFER, RUNS, TRAIN, Flag, accepted
from mindspeed_lora.arguments.flags_tools import FAMILIES, LATER_FAMILY
from mindspeed_lora.arguments.values import COUNT, COUNT_OR_ZERO, NUMBER, TEXT, WHOLE

ASKING = (INFER, EVALUATE)
T = (TRAIN,)
LATER_CONTEXT_PARALLEL = "context parallelism comes with a later release; use 1"
NO_DROPOUT = "dropout makes results depend on the parallel layout and is refused; use 0"

MODEL = [
    *accepted("use-mcore-models", RUNS, "there is one implementation of the model here"),
    *accepted("spec", RUNS, "the family comes from config.json", TEXT, many=True),
    *accepted(
        "transformer-impl",
        RUNS,
        "there is one implementation of the model here",
        TEXT,
        only=("local", "transformer_engine"),
        otherwise="use local",
    ),
    *accepted("swiglu", RUNS, "every family here has it"),
    *accepted("disable-bias-linear", RUNS, "no family here has biases on its linears, but qkv's by config.json"),
    *accepted("group-query-attention", RUNS, "config.json says how many query groups there are"),
    *accepted(
        "normalization", RUNS, "every family here has it", TEXT, only=("RMSNorm",), otherwise="the families here have RMSNorm; use RMSNorm"
    ),
    *accepted(
        "position-embedding-type", RUNS, "every family here has it", TEXT, only=("rope",), otherwise="the families here have rope; use rope"
    ),
    *accepted("use-rotary-position-embeddings", RUNS, "every family here has them"),
    *accepted("no-position-embedding", RUNS, "no family here has learned positions"),
    *accepted(
        "rotary-percent",
        RUNS,
        "every family here rotates whole heads",
        NUMBER,
        only=(1.0,),
        otherwise="partly rotated heads come with a later release",
    ),
    *accepted("hidden-dropout attention-dropout lora-dropout", RUNS, "the rate is 0", NUMBER, only=(0.0,), otherwise=NO_DROPOUT),
    *accepted("make-vocab-size-divisible-by", RUNS, "the checkpoint says how many rows the embedding has", COUNT),
    *accepted("init-method-std", RUNS, "weights come from --load; a new adapter starts from Kaiming-uniform A and zero B", NUMBER),
    *accepted(
        "rope-scaling-type",
        RUNS,
        "rope scaling is read from config.json",
        TEXT,
        only=("llama3", "yarn"),
        otherwise="this rope scaling comes with a later release",
        dest=("rope_scaling_type",),
    ),
    *accepted(
        "model-type-hf",
        RUNS,
        "the family comes from config.json",
        TEXT,
        only=FAMILIES,
        otherwise=LATER_FAMILY,
    ),
    *accepted(
        "tokenizer-type",
        (*RUNS, "preprocess_data.py"),
        "tokenizers are Hugging Face folders",
        TEXT,
        only=("PretrainedFromHF",),
        otherwise="tokenizers are Hugging Face folders; use PretrainedFromHF and --tokenizer-name-or-path",
    ),
    *accepted(
        "tokenizer-padding-side",
        RUNS,
        "training pads on the right",
        TEXT,
        only=("right",),
        otherwise="training pads on the right; use right",
    ),
]

KERNELS = [
    *accepted(
        "use-flash-attn use-fused-rmsnorm use-fused-rotary-pos-emb use-fused-swiglu no-rope-fusion no-bias-swiglu-fusion "
        "no-bias-dropout-fusion "
        "no-masked-softmax-fusion use-fusion-attn-v2",
        RUNS,
        "the fastest kernel of the device is always taken",
    ),
    *accepted(
        "shape-order",
        RUNS,
        "the attention kernel's layout is chosen here",
        TEXT,
        only=("SBH", "BSH", "BSND", "BNSD"),
        otherwise="unknown layout",
    ),
    *accepted("attention-softmax-in-fp32", RUNS, "softmax is always in fp32"),
    *accepted(
        "no-gradient-accumulation-fusion gemm-gradient-accumulation-fusion accumulate-allreduce-grads-in-fp32",
        RUNS,
        "gradients are always summed in fp32",
    ),
    *accepted(
        "use-ascend-coc coc-fused-kernel use-ascend-mc2",
        RUNS,
        "overlapped matmul kernels change speed only; --lora-fusion removes the collectives",
    ),
]

PARALLEL = [
    *accepted(
        "distributed-backend",
        RUNS,
        "always the device's own backend: hccl on NPU, nccl on CUDA, gloo on CPU",
        TEXT,
        only=("nccl", "hccl", "gloo"),
        otherwise="use nccl, hccl or gloo; it is always the device's own backend",
    ),
    *accepted("context-parallel-size", RUNS, "the size is 1", COUNT, only=(1,), otherwise=LATER_CONTEXT_PARALLEL),
    *accepted("ulysses-degree-in-cp", RUNS, "the size is 1", COUNT, only=(1,), otherwise=LATER_CONTEXT_PARALLEL),
    *accepted("cp-window-size", RUNS, "the size is 1", COUNT, only=(1,), otherwise=LATER_CONTEXT_PARALLEL),
    *accepted(
        "context-parallel-algo cp-attention-mask-type attention-mask-type", RUNS, "it belongs to context parallelism, whose size is 1", TEXT
    ),
    *accepted("use-cp-send-recv-overlap", RUNS, "it belongs to context parallelism, whose size is 1"),
    *accepted("exit-on-missing-checkpoint", RUNS, "a missing checkpoint always ends the run"),
    *accepted("no-shared-storage", RUNS, "each machine reads the checkpoint at the path it was given; nothing is converted on the way"),
    *accepted("ckpt-format", RUNS, "checkpoints are Megatron's .pt files", TEXT, only=("torch",), otherwise="use torch"),
    *accepted("overlap-grad-reduce overlap-param-gather", RUNS, "gradients are reduced once per step, in one flat buffer"),
]

TRAINING = [
    *accepted("is-instruction-dataset", T, "--stage says what the data is"),
    *accepted("is-pairwise-dataset", T, "--stage dpo says it, which the flag belongs to", dest=("pairwise",)),
    *accepted("variable-seq-lengths", T, "lengths may always differ from step to step"),
    *accepted("calculate-per-token-loss", T, "already so (--loss-normalization tokens)", dest=("per_token_loss",)),
    *accepted("enable-hf2mg-convert", T, "--load takes Hugging Face folders directly"),
    *accepted("num-workers", T, "each rank reads its rows from a memory map, which needs no further processes", COUNT_OR_ZERO),
    *accepted(
        "reset-position-ids",
        T,
        "rotary embeddings are relative: within a document nothing changes, and --reset-attention-mask keeps documents apart",
    ),
    *accepted("no-check-for-nan-in-loss-and-grad", T, "a loss that is not finite always ends the run"),
    *accepted("padded-samples", T, "epochs follow each other without a gap, so no batch is short"),
    *accepted(
        "dataloader-type",
        T,
        "--no-shuffle decides",
        TEXT,
        only=("single", "cyclic"),
        otherwise="other loaders are not supported; use cyclic",
    ),
    *accepted("optimizer", T, "AdamW is the optimizer", TEXT, only=("adam",), otherwise="other optimizers are not supported; use adam"),
    *accepted("reuse-fp32-param", RUNS, "a memory option of MindSpeed's optimizer; results are the same"),
    *accepted(
        "swap-attention swap-optimizer recompute-activation-function",
        RUNS,
        "nothing is moved to the host; where memory is short: --recompute-granularity full",
    ),
    *accepted("use-pytorch-profiler", T, "--profile takes torch's profiler, on an NPU torch_npu's"),
    *accepted("profile-with-cpu profile-data-simplification", T, "a trace always has the host's part, and is one file"),
    *accepted("profile-export-type", T, "a trace is a JSON file", TEXT, only=("text",), otherwise="a database is not written; use text"),
    *accepted("profile-level", T, "a trace has operators, kernels and collectives, no hardware counters", TEXT),
    *accepted("manual-gc", T, "Python's collector runs as usual"),
    *accepted("manual-gc-interval", T, "Python's collector runs as usual", COUNT_OR_ZERO),
    *accepted(
        "loss-compute-mode", T, "logits never leave the loss head", TEXT, only=("default", "chunk"), otherwise="use default or chunk"
    ),
    *accepted("loss-chunk-size", T, "logits never leave the loss head", COUNT_OR_ZERO),
]

RUNNING = [
    *accepted("finetune no-load-optim no-load-rng", ASKING, "only weights are read"),
    *accepted("global-batch-size train-iters", ASKING, "it belongs to training", COUNT),
    *accepted("lr min-lr lr-warmup-fraction weight-decay adam-beta1 adam-beta2 clip-grad", ASKING, "it belongs to training", NUMBER),
    *accepted("lr-decay-style", ASKING, "it belongs to training", TEXT),
    *accepted("use-distributed-optimizer", ASKING, "it belongs to training"),
    *accepted("num-layers-per-virtual-pipeline-stage", ASKING, "answers need no interleaving", WHOLE),
]

FLAGS: list[Flag] = [*MODEL, *KERNELS, *PARALLEL, *TRAINING, *RUNNING]
