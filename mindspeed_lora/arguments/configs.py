"""What a parsed command line becomes: frozen values, grouped as their users need them.

The Namespace ends at the entry point. ``None`` means "the user did not say", and whoever reads the value says what
follows from that (the manifest, ``config.json``, or a default written at the field).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

BASE = "base"  # stands for no adapter, wherever one of several may be named
LORA_TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")  # of every family
LATENT_TARGETS = ("linear_q_up_proj", "linear_kv_up_proj")  # of latent attention besides


@dataclass(frozen=True)
class ExpertFlags:
    """MindSpeed-LLM's words for a mixture of experts. Switches are True when passed."""

    count: int | None = None  # --num-experts
    top_k: int | None = None
    ffn_hidden_size: int | None = None
    shared_ffn_hidden_size: int | None = None
    shared_count: int | None = None  # --n-shared-experts, each of ffn_hidden_size
    shared_gate: bool | None = None
    first_dense: int | None = None  # --first-k-dense-replace; -1: nothing is said
    layer_pattern: int | tuple[int, ...] | None = None  # --moe-layer-freq: every so many layers; -1: nothing; or 1 and 0 by layer
    normalize: bool | None = None
    pre_softmax: bool | None = None
    score: str | None = None
    groups: int | None = None
    top_groups: int | None = None
    scale: float | None = None
    bias: bool | None = None
    balancing: str | None = None  # --moe-router-load-balancing-type

    @property
    def groups_matter(self) -> bool:
        """Whether the peer's kind of routing looks at the groups."""
        return self.balancing not in ("softmax_topk", "pai_megatron_aux_loss")


@dataclass(frozen=True)
class LatentFlags:
    """Multi-head latent attention; ``used`` is True when passed."""

    used: bool | None = None
    q_rank: int | None = None
    kv_rank: int | None = None
    nope_head_dim: int | None = None
    rope_head_dim: int | None = None
    value_head_dim: int | None = None


@dataclass(frozen=True)
class RopeScalingFlags:
    """Numbers of yarn and llama3 rope scaling, by the name that ``config.json`` has for each."""

    factor: float | None = None
    original_max_position_embeddings: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None


@dataclass(frozen=True)
class ArchitectureFlags:
    """Architecture values that the user passed explicitly; compared with ``config.json``, never a source of defaults."""

    num_layers: int | None = None
    hidden_size: int | None = None
    ffn_hidden_size: int | None = None
    num_attention_heads: int | None = None
    num_query_groups: int | None = None
    kv_channels: int | None = None
    padded_vocab_size: int | None = None
    vocab_size: int | None = None
    norm_epsilon: float | None = None
    rotary_base: float | None = None
    qk_layernorm: bool | None = None  # True when passed
    untie_embeddings_and_output_weights: bool | None = None  # True when passed
    add_qkv_bias: bool | None = None
    max_position_embeddings: int | None = None  # a limit of the run, not compared
    seq_length: int | None = None  # likewise
    experts: ExpertFlags = field(default_factory=ExpertFlags)
    latent: LatentFlags = field(default_factory=LatentFlags)
    rope_scaling: RopeScalingFlags = field(default_factory=RopeScalingFlags)


@dataclass(frozen=True)
class ParallelFlags:
    """Sizes of the parallel grid; data parallel size = world size / (tensor x pipeline)."""

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    layers_per_virtual_stage: int | None = None  # --num-layers-per-virtual-pipeline-stage
    sequence_parallel: bool = False
    expert_parallel_size: int = 1
    expert_tensor_parallel_size: int | None = None  # 1, or the tensor parallel size (None)
    experts_over_tensor_ranks: bool = False  # --moe-tp-extend-ep: EP counts groups of tensor ranks, and experts are uncut

    @property
    def expert_grid(self) -> tuple[int, int | None]:
        """Over how many ranks the experts are dealt out, and over how many each is cut (None: the tensor parallel size)."""
        if self.experts_over_tensor_ranks:
            return self.expert_parallel_size * self.tensor_parallel_size, 1
        return self.expert_parallel_size, self.expert_tensor_parallel_size


@dataclass(frozen=True)
class RuntimeFlags:
    """Device, dtype and seed. ``params_dtype``: "bf16", "fp32", or None (training: fp32; elsewhere: the checkpoint's own)."""

    device: str = "auto"  # auto | npu | cuda | cpu
    params_dtype: str | None = None
    seed: int = 1234
    distributed_timeout_minutes: int = 10
    qlora: bool = False  # the base's linear weights in 4 bits, quantised while they are loaded
    moe_grouped_gemm: bool = False  # False: the device's fastest


@dataclass(frozen=True)
class LoraFlags:
    """LoRA values as passed; None where the adapter (or, for a new one, the default r 16, alpha 32) decides."""

    r: int | None = None
    alpha: float | None = None
    targets: tuple[str, ...] | None = None  # of LORA_TARGETS and LATENT_TARGETS
    fusion: bool = False
    shared_experts: bool = False  # one A and B for all routed experts of a layer


@dataclass(frozen=True)
class LoadFlags:
    """Where weights come from. ``load``: Megatron folder (ours or the peer's) or Hugging Face folder."""

    load: Path | None = None
    lora_load: Path | None = None
    finetune: bool = False  # weights only, iteration 0
    load_optim: bool = True
    load_rng: bool = True
    verify: bool = False  # check every part's checksum


@dataclass(frozen=True)
class TokenizerFlags:
    """``name_or_path`` None: the tokenizer that travels with ``--load``."""

    name_or_path: Path | None = None
    use_fast: bool = True
    trust_remote_code: bool = False


@dataclass(frozen=True)
class TemplateFlags:
    """``enable_thinking``: "true" | "false" | "none"; None: not said (then the manifest, else "none")."""

    prompt_type: str | None = None
    prompt_type_path: Path | None = None
    enable_thinking: str | None = None
    hf_chat_template: bool = False  # the tokenizer's own instead of prompt_type


@dataclass(frozen=True)
class DataFlags:
    """Training data. ``split``: train, validation, test shares (any scale)."""

    data_path: str = ""
    split: tuple[float, float, float] = (969.0, 30.0, 1.0)
    seq_length: int = 4096
    pad_to_seq_length: bool = True  # False with --no-pad-to-seq-lengths
    pad_to_multiple_of: int = 8  # tokens
    padding_free: bool = False  # the records of a micro-batch behind one another in one row
    shuffle: bool = True
    reset_attention_mask: bool = False  # the documents of a sample do not see each other
    pack: bool = False
    neat_pack: bool = False  # with segment numbers, which reset_attention_mask reads
    handler_name: str | None = None  # the data is raw, and this is its form; None: prepared data
    map_keys: dict[str, object] | None = None  # of raw data, as are workers and cache_dir
    workers: int = 1
    cache_dir: Path | None = None  # None: data_cache beside save, else ~/.cache/mindspeed_lora/data


@dataclass(frozen=True)
class OptimizerFlags:
    """AdamW and its schedule; warm-up is a fraction of the decay iterations or a count of iterations."""

    lr: float = 1e-4
    min_lr: float = 0.0
    lr_decay_style: str = "linear"  # linear | cosine | constant
    lr_warmup_fraction: float | None = None
    lr_warmup_iters: int = 0
    lr_warmup_init: float = 0.0
    lr_decay_iters: int | None = None  # None: train_iters
    weight_decay: float = 0.01
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    clip_grad: float = 1.0  # 0: off
    use_distributed_optimizer: bool = False


@dataclass(frozen=True)
class LossScaleFlags:
    """The factor of the loss in fp16; ``constant`` None: it adapts itself between steps."""

    constant: float | None = None
    initial: float = 2.0**32
    minimum: float = 1.0
    window: int = 1000  # steps without an overflow until it doubles
    hysteresis: int = 2  # it halves from this overflow on


@dataclass(frozen=True)
class RecomputeFlags:
    """``granularity`` None: off. ``full``: ``method`` block (the first ``num_layers`` of a stage) or uniform (groups of them)."""

    granularity: str | None = None  # None | full | selective
    method: str | None = None  # block | uniform
    num_layers: int | None = None


@dataclass(frozen=True)
class SaveFlags:
    """Where and how often training writes."""

    save: Path | None = None
    save_interval: int | None = None  # iterations; None: at the end only
    save_optim: bool = True
    save_rng: bool = True
    lora_ckpt_filter: bool = True  # False: base and adapter together, in one checkpoint
    save_best: bool = False  # also where the validation loss is the lowest so far
    save_total_limit: int | None = None  # iterations that stay, the best one not counted; None: all
    tensorboard_dir: Path | None = None  # None: <save>/tensorboard


@dataclass(frozen=True)
class PreferenceFlags:
    """Training on preference pairs (``--stage dpo``). ``ref_model`` None: the model that training starts from."""

    loss_type: str = "sigmoid"  # sigmoid | hinge | ipo | simpo | orpo
    beta: float = 0.1
    label_smoothing: float = 0.0  # share of pairs whose labels are thought to be swapped
    pref_ftx: float = 0.0  # factor of the chosen answers' mean -log p
    simpo_gamma: float = 0.5  # margin of simpo
    ref_model: Path | None = None
    ref_iteration: int | None = None  # of a Megatron save folder; None: the newest

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares with a reference model."""
        return self.loss_type not in ("simpo", "orpo")


@dataclass(frozen=True)
class BalanceFlags:
    """What keeps the experts of a trained model evenly used; ``architecture.experts.balancing`` says which loss ``aux`` belongs to."""

    aux: float = 0.0  # coefficients
    z: float = 0.0
    by_row: bool = False  # --seq-aux
    log_layers: bool = False
    bias_rate: float = 0.0  # change of an expert's bias in a step (DeepSeek V3)


@dataclass(frozen=True)
class ProfileFlags:
    """A trace of some training steps (``--profile``)."""

    step_start: int = 10  # first traced iteration, counted from 1
    step_end: int = 12  # the iteration after the last traced one; -1: trace to the run's end
    ranks: tuple[int, ...] = (0,)  # -1: all
    save_path: Path | None = None  # None: <save>/profile, without --save ./profile_dir
    record_shapes: bool = False
    with_memory: bool = False
    with_stack: bool = False


@dataclass(frozen=True)
class TrainConfig:
    """``posttrain_gpt.py``."""

    parallel: ParallelFlags
    runtime: RuntimeFlags
    load: LoadFlags
    tokenizer: TokenizerFlags
    template: TemplateFlags
    data: DataFlags
    optimizer: OptimizerFlags
    recompute: RecomputeFlags
    save: SaveFlags
    loss_scale: LossScaleFlags = field(default_factory=LossScaleFlags)  # with params_dtype fp16
    fsdp_base: bool = False  # the frozen base's linear weights are cut over the data-parallel ranks
    architecture: ArchitectureFlags = field(default_factory=ArchitectureFlags)
    lora: LoraFlags | None = None  # None: full-parameter training
    stage: str = "sft"  # sft | dpo: training on preference pairs
    preference: PreferenceFlags | None = None  # with dpo
    micro_batch_size: int = 1
    global_batch_size: int | None = None  # None: micro_batch_size x data parallel size
    train_iters: int = 0
    loss_normalization: str = "tokens"  # tokens | micro-batch
    balance: BalanceFlags = field(default_factory=BalanceFlags)  # of a model with experts
    eval_interval: int | None = None
    eval_iters: int = 100
    log_interval: int = 1
    log_throughput: bool = False
    pipeline_buffer_fraction: float = 0.05  # of device memory, for receive buffers
    profile: ProfileFlags | None = None
    dry_run: bool = False  # say what memory and time it needs; touch no device, read no data, write nothing
    dry_run_machine: str | None = None  # of training/machines.py
    dry_run_devices: int | None = None  # None: torchrun's processes, else the machine's devices, else TP x PP


@dataclass(frozen=True)
class InferenceConfig:
    """``inference.py``."""

    parallel: ParallelFlags
    runtime: RuntimeFlags
    load: LoadFlags
    tokenizer: TokenizerFlags
    template: TemplateFlags
    architecture: ArchitectureFlags = field(default_factory=ArchitectureFlags)
    lora: LoraFlags | None = None
    adapters: tuple[tuple[str, Path], ...] = ()  # (name, folder) of each; load.lora_load is the first
    tasks: tuple[str, ...] = ("greedy", "do_sample", "beam_search", "beam_search_with_sampling", "chat")
    prompts: tuple[str, ...] = ("how are you?",)  # ("-",): one on each line of standard input
    input_file: Path | None = None
    output_file: Path | None = None  # set where input_file is
    system_prompt: str | None = None
    compare_base: bool = False
    stream: bool = True
    show_thinking: bool = True
    history_turns: int = 3
    num_beams: int = 2
    max_new_tokens: int = 128
    max_length: int | None = None  # tokens of prompt and answer; set only where max_new_tokens was not passed
    top_p: float = 0.95
    top_k: int = 50
    temperature: float = 0.7
    use_kv_cache: bool = True
    add_eos_token: tuple[str, ...] = ()
    micro_batch_size: int = 1


@dataclass(frozen=True)
class EvaluationConfig:
    """``evaluation.py``."""

    parallel: ParallelFlags
    runtime: RuntimeFlags
    load: LoadFlags
    tokenizer: TokenizerFlags
    template: TemplateFlags
    tasks: tuple[str, ...]
    task_data_path: tuple[Path, ...] = ()  # one for all tasks, or one each; none: tasks of lm_eval's from the cache
    architecture: ArchitectureFlags = field(default_factory=ArchitectureFlags)
    lora: LoraFlags | None = None
    num_fewshot: int | None = None  # None: the task's usual number (mmlu: 5)
    max_eval_samples: int | None = None  # per subject
    evaluation_batch_size: int | None = None  # rows; None: as many as fit by our estimate
    max_new_tokens: int | None = None
    output_path: Path | None = None  # folder of results; None: evaluation_results/<checkpoint>-<time>
    log_samples: bool = False  # one jsonl of items per task
    compare_base: bool = False  # score the base as well, and test the difference
    confirm_run_unsafe_code: bool = False  # run programs that the model wrote


@dataclass(frozen=True)
class MixFlags:
    """Several inputs as one stream of records."""

    strategy: str = "concat"  # concat | interleave_under | interleave_over
    interleave_probs: tuple[float, ...] | None = None  # of each input, sum 1; None: in turn
    max_samples: int | None = None  # records of each input that are read
    seed: int = 1234
    dataset_dir: Path | None = None  # where the inputs lie


@dataclass(frozen=True)
class PreprocessConfig:
    """``preprocess_data.py``."""

    input: Path  # or several, with commas between them
    output_prefix: Path | None = None  # None: only with preview
    tokenizer: TokenizerFlags = field(default_factory=TokenizerFlags)
    template: TemplateFlags = field(default_factory=TemplateFlags)
    mix: MixFlags = field(default_factory=MixFlags)
    handler_name: str | None = None  # None: AlpacaStyleInstructionHandler with a template, else GeneralPretrainHandler
    map_keys: dict[str, object] | None = None
    json_keys: tuple[str, ...] | None = None  # columns of plain text; None: the handler's
    additional_keys: tuple[str, ...] = ()  # columns that go beside prompts
    seq_length: int | None = None  # records are cut to fit; None: no cut (100000)
    workers: int = 1
    log_interval: int = 1000
    append_eod: bool = False
    pad_to_multiple_of: int = 1  # tokens; of plain text
    pack: bool = False  # several records in one sample of seq_length tokens
    neat_pack: bool = False  # with pack: number the records of a sample in the attention mask
    preview: int | None = None  # records to show; nothing is written
    merge_group_keys: tuple[str, ...] = ()  # join the file pairs of input whose names hold each of these


@dataclass(frozen=True)
class ConvertConfig:
    """``convert_ckpt.py``. Types are "hf" or "mg"."""

    load_model_type: str
    save_model_type: str
    load_dir: Path
    save_dir: Path
    model_type_hf: str | None = None  # None: from config.json
    target_tensor_parallel_size: int = 1
    target_pipeline_parallel_size: int = 1
    layers_per_virtual_stage: int | None = None
    num_layer_list: tuple[int, ...] | None = None  # layers of each stage
    noop_layers: tuple[int, ...] | None = None  # empty slots, in the numbering that counts them
    target_expert_parallel_size: int = 1
    expert_tensor_parallel_size: int | None = None  # None: the tensor parallel size
    moe_grouped_gemm: bool = False
    moe_tp_extend_ep: bool = False
    first_k_dense_replace: int | None = None  # compared with config.json
    params_dtype: str | None = None  # "bf16" | "fp16" | "fp32"; None: kept
    make_vocab_size_divisible_by: int = 1
    lora_load: Path | None = None
    lora: LoraFlags | None = None
    save_lora_to_hf: bool = False
    hf_cfg_dir: Path | None = None  # where config and tokenizer lie, when not in load_dir or save_dir
    add_qkv_bias: bool | None = None
    verify: bool = False
    dry_run: bool = False  # say what would be written, write nothing


@dataclass(frozen=True)
class InspectConfig:
    """``convert_ckpt.py --inspect``."""

    folder: Path
    verify: bool = False  # compare the checksums of its manifest
