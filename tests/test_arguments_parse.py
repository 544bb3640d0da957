"""Command lines that are good: MindSpeed-LLM's Qwen3 flags, what each becomes in the config, and the notes."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT

from mindspeed_lora.arguments import help_texts
from mindspeed_lora.arguments.checks import resolve_global_batch_size
from mindspeed_lora.arguments.configs import (
    LATENT_TARGETS,
    LORA_TARGETS,
    ConvertConfig,
    EvaluationConfig,
    InferenceConfig,
    PreprocessConfig,
    TrainConfig,
)
from mindspeed_lora.arguments.flag import COMMANDS, CONVERT, EVALUATE, INFER, PREPROCESS, REFUSED, TRAIN
from mindspeed_lora.arguments.parser import parse
from mindspeed_lora.arguments.registry import flags_of
from mindspeed_lora.errors import UsageError

QWEN3_FLAGS: dict[str, list[str]] = json.loads((ROOT / "tests" / "fixtures" / "qwen3_flags.json").read_text())
SHARED_FLAGS = ROOT.parent / "shared" / "design" / "flags" / "qwen3_flags.json"

# What MindSpeed-LLM's Qwen3-8B scripts pass (folders are made by the fixture).
MODEL = """--use-mcore-models --spec mindspeed_llm.tasks.models.spec.qwen3_spec layer_spec --qk-layernorm --num-layers 36 --hidden-size 4096
    --num-attention-heads 32 --ffn-hidden-size 12288 --max-position-embeddings 32768 --seq-length 4096 --disable-bias-linear
    --group-query-attention --num-query-groups 8 --swiglu --use-fused-swiglu --normalization RMSNorm --norm-epsilon 1e-6
    --use-fused-rmsnorm --position-embedding-type rope --rotary-base 1000000 --use-rotary-position-embeddings --use-fused-rotary-pos-emb
    --kv-channels 128
    --untie-embeddings-and-output-weights --padded-vocab-size 151936 --make-vocab-size-divisible-by 1 --transformer-impl local
    --attention-softmax-in-fp32 --no-gradient-accumulation-fusion --no-masked-softmax-fusion --attention-dropout 0.0 --hidden-dropout 0.0
    --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --micro-batch-size 1 --bf16 --seed 42 --exit-on-missing-checkpoint
    --tokenizer-type PretrainedFromHF --tokenizer-name-or-path ./hf --tokenizer-not-use-fast --load ./base"""
LINES = {
    CONVERT: """--use-mcore-models --model-type GPT --load-model-type mg --save-model-type hf --target-tensor-parallel-size 1
        --target-pipeline-parallel-size 1 --spec mindspeed_llm.tasks.models.spec.qwen3_spec layer_spec --load-dir ./base --lora-load ./lora
        --lora-r 8 --lora-alpha 16 --lora-target-modules linear_qkv linear_proj linear_fc1 linear_fc2 --model-type-hf qwen3 --save-dir ./hf
        --hf-cfg-dir ./hf""",
    PREPROCESS: """--input ./alpaca.parquet --tokenizer-name-or-path ./hf --output-prefix ./out/alpaca
        --handler-name AlpacaStyleInstructionHandler
        --tokenizer-type PretrainedFromHF --workers 4 --log-interval 1000 --enable-thinking none --prompt-type qwen3 --json-keys text""",
    TRAIN: f"""{MODEL} --no-shared-storage --use-flash-attn --coc-fused-kernel --use-ascend-coc --use-ascend-mc2 --sequence-parallel
        --use-distributed-optimizer --context-parallel-algo megatron_cp_algo --context-parallel-size 1 --attention-mask-type causal
        --num-layers-per-virtual-pipeline-stage 3 --global-batch-size 8 --train-iters 2000 --lr 1.25e-6 --lr-decay-style cosine
        --min-lr 1.25e-7
        --lr-warmup-fraction 0.01 --weight-decay 1e-1 --clip-grad 1.0 --adam-beta1 0.9 --adam-beta2 0.95 --initial-loss-scale 4096
        --init-method-std 0.01 --no-load-optim --no-load-rng --finetune --stage sft --is-instruction-dataset --prompt-type qwen3
        --enable-thinking true --no-pad-to-seq-lengths --lora-r 8 --lora-alpha 16 --lora-fusion --lora-target-modules linear_qkv linear_proj
        --recompute-granularity full --recompute-method block --recompute-num-layers 18 --data-path ./out/alpaca --split 100,0,0
        --log-interval 1 --save-interval 2000 --eval-interval 2000 --eval-iters 0 --save ./ckpt --log-throughput --distributed-backend nccl
        --enable-hf2mg-convert --model-type-hf qwen3 --workers 4 --handler-name AlpacaStyleInstructionHandler
        --pack --neat-pack --reset-attention-mask --reset-position-ids""",
    INFER: f"{MODEL} --max-new-tokens 256 --expert-model-parallel-size 1",
    EVALUATE: f"{MODEL} --task-data-path ./mmlu/test --task mmlu --max-new-tokens 1 --no-chat-template --no-load-optim --no-load-rng "
    "--norm-topk-prob --use-flash-attn --expert-model-parallel-size 1",
}


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folders that the command lines name."""
    for name in ("hf", "base", "lora", "mmlu/test", "dataset", "model_weights/qwen3_mcore", "model_from_hf/qwen3_hf", "ckpt/lora"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("alpaca.parquet", "dataset/alpaca.parquet", "dataset/mine.jsonl"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)


def qwen3_flags(command: str) -> set[str]:
    """The flags of the peer's Qwen3 scripts for our command (its two converters are one here)."""
    names = set(QWEN3_FLAGS[command])
    return names | set(QWEN3_FLAGS["convert_ckpt_v2.py"]) if command == CONVERT else names


def test_the_bundled_list_is_the_shared_one() -> None:
    if not SHARED_FLAGS.is_file():
        pytest.skip(f"{SHARED_FLAGS} is absent")
    assert {command: sorted(flags) for command, flags in json.loads(SHARED_FLAGS.read_text()).items()} == QWEN3_FLAGS


@pytest.mark.parametrize("command", COMMANDS)
def test_every_qwen3_flag_of_the_peer_works_or_is_accepted(command: str) -> None:
    refused = {name for name in qwen3_flags(command) if flags_of(command)[name].status == REFUSED}
    assert refused == set()
    words = set(LINES[command].split())
    assert qwen3_flags(command) - words == refused  # the line below passes all of them
    config, notes = parse(command, LINES[command].split())
    assert command not in (CONVERT, TRAIN) or config.lora is not None
    if command != PREPROCESS:
        assert "accepted flags that have nothing to do here:" in notes


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_that_help_ends_with_parse(command: str) -> None:
    for example in help_texts.EXAMPLES[command]:
        words = shlex.split(example)
        parse(command, words[words.index(command) + 1 :])


def test_training_values_reach_the_config() -> None:
    config, _ = parse(TRAIN, LINES[TRAIN].split())
    assert isinstance(config, TrainConfig)
    assert (config.parallel.tensor_parallel_size, config.parallel.pipeline_parallel_size) == (2, 2)
    assert config.parallel.sequence_parallel and config.parallel.layers_per_virtual_stage == 3
    assert config.runtime.params_dtype == "bf16" and config.runtime.seed == 42
    assert config.load.load == Path("base") and config.load.finetune and not config.load.load_optim and not config.load.load_rng
    assert config.tokenizer.name_or_path == Path("hf") and not config.tokenizer.use_fast and not config.tokenizer.trust_remote_code
    assert (config.template.prompt_type, config.template.enable_thinking) == ("qwen3", "true")
    assert config.data.data_path == "./out/alpaca" and config.data.split == (100.0, 0.0, 0.0)
    assert config.data.seq_length == config.architecture.seq_length == 4096 and not config.data.pad_to_seq_length
    assert (config.optimizer.lr, config.optimizer.min_lr, config.optimizer.lr_decay_style) == (1.25e-6, 1.25e-7, "cosine")
    assert (
        config.optimizer.lr_warmup_fraction == 0.01 and config.optimizer.adam_beta2 == 0.95 and config.optimizer.use_distributed_optimizer
    )
    assert (config.recompute.granularity, config.recompute.method, config.recompute.num_layers) == ("full", "block", 18)
    assert config.save.save == Path("ckpt") and config.save.save_interval == 2000 and config.save.lora_ckpt_filter
    assert config.architecture.num_layers == 36 and config.architecture.rotary_base == 1e6 and config.architecture.qk_layernorm
    assert config.architecture.untie_embeddings_and_output_weights and config.architecture.add_qkv_bias is None
    assert config.lora is not None and (config.lora.r, config.lora.alpha, config.lora.fusion) == (8, 16.0, True)
    assert config.lora.targets == ("linear_qkv", "linear_proj")
    assert (config.micro_batch_size, config.global_batch_size, config.train_iters, config.log_throughput) == (1, 8, 2000, True)


def test_what_is_not_said_keeps_its_default() -> None:
    config, notes = parse(TRAIN, ["--load", "base", "--data-path", "x", "--train-iters", "3"])
    assert config.lora is None and config.runtime.params_dtype is None and config.global_batch_size is None
    assert config.architecture.num_layers is None and config.save.save is None
    assert notes == ["--save is absent: this run writes no checkpoint"]


def test_the_other_commands_become_their_configs() -> None:
    convert, _ = parse(CONVERT, LINES[CONVERT].split())
    assert isinstance(convert, ConvertConfig) and convert.lora_load == Path("lora") and convert.save_model_type == "hf"
    assert convert.lora is not None and convert.lora.targets == LORA_TARGETS and convert.hf_cfg_dir == Path("hf")
    data, _ = parse(PREPROCESS, [*LINES[PREPROCESS].split(), "--map-keys", '{"prompt": "q", "history": "h"}'])
    assert isinstance(data, PreprocessConfig) and data.output_prefix == Path("out/alpaca") and data.workers == 4
    assert data.map_keys == {"prompt": "q", "history": "h"} and data.template.enable_thinking == "none"
    infer, _ = parse(
        INFER, [*LINES[INFER].split(), "--task", "greedy", "--prompt", "Who are you?", "And I?", "--add-eos-token", "<|im_end|>"]
    )
    assert isinstance(infer, InferenceConfig) and infer.tasks == ("greedy",) and infer.prompts == ("Who are you?", "And I?")
    assert infer.max_new_tokens == 256 and infer.add_eos_token == ("<|im_end|>",) and infer.use_kv_cache
    score, _ = parse(EVALUATE, LINES[EVALUATE].split())
    assert isinstance(score, EvaluationConfig) and score.tasks == ("mmlu",) and score.task_data_path == (Path("mmlu/test"),)


def test_lora_load_alone_leaves_all_values_to_the_adapter() -> None:
    config, _ = parse(INFER, ["--load", "base", "--lora-load", "lora"])
    assert config.lora is not None and config.lora.r is config.lora.alpha is config.lora.targets is None
    config, _ = parse(
        CONVERT, ["--load-model-type", "mg", "--save-model-type", "hf", "--load-dir", "base", "--lora-load", "lora", "--save-dir", "hf"]
    )
    assert config.lora is not None and config.lora_load == Path("lora")


def test_lora_targets_are_kept_in_one_order() -> None:
    line = "--load base --data-path x --train-iters 3 --lora-target-modules linear_fc1 linear_qkv linear_fc1"
    config, _ = parse(TRAIN, line.split())
    assert config.lora.targets == ("linear_qkv", "linear_fc1") and config.lora.r is None
    config, _ = parse(TRAIN, [*LINES[TRAIN].split(), "--lora-target-modules", *LATENT_TARGETS, *LORA_TARGETS])
    assert isinstance(config, TrainConfig) and config.lora is not None and config.lora.targets == (*LORA_TARGETS, *LATENT_TARGETS)


@pytest.mark.parametrize(
    ("words", "path", "value"),
    [
        ("--no-lora-ckpt-filter", "save.lora_ckpt_filter", False),
        ("--lora-ckpt-filter", "save.lora_ckpt_filter", True),
        ("--params-dtype fp32", "runtime.params_dtype", "fp32"),
        ("--split 969,30,1", "data.split", (969.0, 30.0, 1.0)),
        ("--split 1", "data.split", (1.0, 0.0, 0.0)),
        ("--no-shuffle", "data.shuffle", False),
        ("--pad-to-multiple-of 16", "data.pad_to_multiple_of", 16),
        ("--loss-normalization micro-batch", "loss_normalization", "micro-batch"),
        ("--recompute-granularity selective", "recompute.granularity", "selective"),
        ("--tensorboard-dir tb", "save.tensorboard_dir", Path("tb")),
        ("--pipeline-buffer-fraction=0.1", "pipeline_buffer_fraction", 0.1),
        ("--lr-warmup-iters 1 --lr-warmup-init 1e-6", "optimizer.lr_warmup_init", 1e-6),
        ("--handler-name SharegptStyleInstructionHandler", "data.handler_name", "SharegptStyleInstructionHandler"),
        ("--cache-dir cache", "data.cache_dir", Path("cache")),
        ("--verify", "load.verify", True),
        ("--device cpu", "runtime.device", "cpu"),
        ("--data-path y --no-save-optim", "data.data_path", "y"),
    ],
)
def test_single_flags(words: str, path: str, value: Any) -> None:
    config, _ = parse(TRAIN, ["--load", "base", "--data-path", "x", "--train-iters", "3", *words.split()])
    for name in path.split("."):
        config = getattr(config, name)
    assert config == value


def test_sequence_parallel_without_tensor_parallel_is_a_note() -> None:
    config, notes = parse(TRAIN, ["--load", "base", "--data-path", "x", "--train-iters", "3", "--save", "s", "--sequence-parallel"])
    assert not config.parallel.sequence_parallel
    assert len(notes) == 1 and notes[0].startswith("--sequence-parallel has no effect")


@pytest.mark.parametrize(
    ("words", "named", "reason"),
    [
        ("--max-position-embeddings 64", "--max-position-embeddings", "--seq-length alone"),
        ("--padding-free --no-pad-to-seq-lengths", "--no-pad-to-seq-lengths", "pads nothing"),
        ("--pad-to-multiple-of 16", "--pad-to-multiple-of", "--no-pad-to-seq-lengths"),
        ("--lr-decay-style constant --min-lr 0 --lr-decay-iters 9", "--min-lr --lr-decay-iters", "decays nothing"),
        ("--lr-decay-style constant --min-lr 0 --lr-decay-iters 9 --lr-warmup-fraction 0.1", "--min-lr", "decays nothing"),
        ("--lr-warmup-init 1e-6", "--lr-warmup-init", "no warm-up"),
        ("--eval-interval 5 --eval-iters 0", "--eval-interval", "validates nothing"),
        ("--pipeline-buffer-fraction 0.1", "--pipeline-buffer-fraction", "one pipeline stage"),
    ],
)
def test_flags_that_change_nothing_are_named(words: str, named: str, reason: str) -> None:
    line = "--load base --data-path x --train-iters 3 --save s"
    (note,) = parse(TRAIN, [*line.split(), *words.split()])[1]
    assert note.startswith(f"{named}: ") and reason in note and note.endswith("nothing for it to do")


@pytest.mark.parametrize(
    "words",
    [
        "--no-pad-to-seq-lengths --pad-to-multiple-of 16",
        "--padding-free --pad-to-multiple-of 16",
        "--lr-decay-style cosine --min-lr 0 --lr-decay-iters 9",
        "--lr-warmup-iters 1 --lr-warmup-init 1e-6",
        "--lr-warmup-fraction 0.1 --lr-warmup-init 1e-6",
        "--eval-interval 5 --eval-iters 1",
        "--pipeline-model-parallel-size 2 --pipeline-buffer-fraction 0.1",
        "--no-save-optim --no-save-rng",
    ],
)
def test_flags_that_change_something_are_not(words: str) -> None:
    assert parse(TRAIN, ["--load", "base", "--data-path", "x", "--train-iters", "3", "--save", "s", *words.split()])[1] == []


def test_what_is_saved_has_no_meaning_where_nothing_is() -> None:
    _, notes = parse(TRAIN, ["--load", "base", "--data-path", "x", "--train-iters", "3", "--no-save-optim", "--lora-ckpt-filter"])
    assert "--no-save-optim --lora-ckpt-filter: nothing is saved, so there is nothing for it to do" in notes


def test_notes_group_accepted_flags_by_reason_and_name_each_once() -> None:
    line = "--load base --context-parallel-algo a --context-parallel-algo a --attention-mask-type general --distributed-backend nccl"
    _, notes = parse(INFER, [*line.split(), "--seed", "1", "--seed", "2"])
    assert notes[0] == "--seed was given twice, with 1 and 2: the last one counts"
    assert "  --context-parallel-algo --attention-mask-type: it belongs to context parallelism, whose size is 1" in notes
    assert sum("device's own backend" in note for note in notes) == 1


def test_the_last_of_two_values_counts_and_does_not_contradict_itself() -> None:
    config, _ = parse(INFER, ["--load", "base", "--seed", "1", "--seed", "2"])
    assert config.runtime.seed == 2


def test_global_batch_size_goes_with_the_world() -> None:
    config, _ = parse(
        TRAIN, ["--load", "base", "--data-path", "x", "--train-iters", "3", "--micro-batch-size", "2", "--global-batch-size", "12"]
    )
    assert resolve_global_batch_size(config, 3) == 12
    with pytest.raises(UsageError, match=r"--global-batch-size 12 .* data parallel size 4 = 8; use 8 or 16"):
        resolve_global_batch_size(config, 4)
    config, _ = parse(TRAIN, ["--load", "base", "--data-path", "x", "--train-iters", "3", "--micro-batch-size", "2"])
    assert resolve_global_batch_size(config, 4) == 8


def test_home_is_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config, _ = parse(INFER, ["--load", "~/base"])
    assert config.load.load == tmp_path / "base"
