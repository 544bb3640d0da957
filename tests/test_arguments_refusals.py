"""What the command line refuses: each with a message that names the flag, and exit code 2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mindspeed_lora.arguments.flag import COMMANDS, CONVERT, EVALUATE, INFER, PREPROCESS, REFUSED, RUNS, TRAIN
from mindspeed_lora.arguments.parser import parse
from mindspeed_lora.arguments.registry import FLAGS, flags_of
from mindspeed_lora.errors import UsageError
from mindspeed_lora.manifest import Manifest, write_manifest


@pytest.fixture
def minimal(tmp_path: Path) -> dict[str, list[str]]:
    """The shortest good command line of each command, over folders that exist."""
    (tmp_path / "in.jsonl").write_text("{}\n")
    here = str(tmp_path)
    return {
        CONVERT: f"--load-model-type hf --save-model-type mg --load-dir {here} --save-dir {here}/out".split(),
        PREPROCESS: f"--input {here}/in.jsonl --output-prefix {here}/out/x --tokenizer-name-or-path {here}".split(),
        TRAIN: f"--load {here} --data-path {here}/x --train-iters 10".split(),
        INFER: f"--load {here}".split(),
        EVALUATE: f"--load {here} --task mmlu".split(),
    }


def refusal(command: str, argv: list[str]) -> str:
    with pytest.raises(UsageError) as caught:
        parse(command, argv)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize("command", COMMANDS)
def test_minimal_command_lines_are_good(command: str, minimal: dict[str, list[str]]) -> None:
    parse(command, minimal[command])


@pytest.mark.parametrize("command", COMMANDS)
def test_each_required_flag_is_asked_for(command: str, minimal: dict[str, list[str]]) -> None:
    line = minimal[command]
    for place in range(0, len(line), 2):
        assert line[place] in refusal(command, line[:place] + line[place + 2 :])


@pytest.mark.parametrize(
    ("command", "words", "expected"),
    [
        (TRAIN, "--micro-bach-size 1", ["--micro-bach-size", "did you mean --micro-batch-size?"]),
        (TRAIN, "--micro_batch_size 1", ["did you mean --micro-batch-size?"]),
        (TRAIN, "--tensor-model 2", ["--tensor-model"]),  # no abbreviations
        (TRAIN, "--lora-ranks=4", ["--lora-ranks"]),
        (INFER, "--zzzz", ["--zzzz is no flag of inference.py", "--help"]),
        (TRAIN, "--load-dir x", ["--load-dir is a flag of convert_ckpt.py, not of posttrain_gpt.py"]),
        (TRAIN, "--rampup-batch-size 1", ["--rampup-batch-size is known to MindSpeed-LLM, but not supported here"]),
        (TRAIN, "5e-5", ["unrecognized arguments: 5e-5"]),
        (TRAIN, "--lr", ["--lr", "expected one argument"]),
    ],
)
def test_unknown_words(command: str, words: str, expected: list[str], minimal: dict[str, list[str]]) -> None:
    message = refusal(command, minimal[command] + words.split())
    assert all(part in message for part in expected), message


@pytest.mark.parametrize("command", COMMANDS)
def test_every_refused_flag_says_its_reason(command: str, minimal: dict[str, list[str]]) -> None:
    refused = [flag for flag in flags_of(command).values() if flag.status == REFUSED]
    assert refused
    for flag in refused:
        words = [flag.name] if flag.value is None else [flag.name, "2"]
        message = refusal(command, minimal[command] + words)
        assert message.startswith(flag.name) and flag.reason in message


@pytest.mark.parametrize("command", COMMANDS)
def test_every_value_that_is_not_yet_supported_says_so(command: str, minimal: dict[str, list[str]]) -> None:
    for flag in flags_of(command).values():
        for value, sentence in flag.not_yet.items():
            assert sentence in refusal(command, minimal[command] + [flag.name, value])


ACCEPTED_VALUES = [(flag.name, str(value), command) for flag in FLAGS if flag.only for value in flag.only for command in flag.commands]


@pytest.mark.parametrize(("name", "value", "command"), [row for row in ACCEPTED_VALUES if row[0] != "--rope-scaling-type"])
def test_accepted_values_are_checked(name: str, value: str, command: str, minimal: dict[str, list[str]]) -> None:
    flag = flags_of(command)[name]
    parse(command, [*minimal[command], name, value])
    message = refusal(command, [*minimal[command], name, "7" if value.replace(".", "").isdigit() else "nonsense"])
    assert name in message and flag.otherwise in message


@pytest.mark.parametrize(
    ("command", "words", "expected"),
    [
        (TRAIN, "--normalization LayerNorm", ["--normalization LayerNorm", "RMSNorm"]),
        (TRAIN, "--hidden-dropout 0.1", ["--hidden-dropout 0.1", "use 0"]),
        (INFER, "--attention-dropout 0.1", ["--attention-dropout 0.1"]),
        (TRAIN, "--context-parallel-size 2", ["--context-parallel-size 2", "later release"]),
        (TRAIN, "--fp16 --bf16", ["--fp16 and --bf16 contradict"]),
        (TRAIN, "--fp16 --initial-loss-scale 4 --min-loss-scale 8", ["--min-loss-scale 8 is above --initial-loss-scale 4", "smaller"]),
        (TRAIN, "--fp16 --loss-scale 0", ["--loss-scale 0", "above 0"]),
        (TRAIN, "--bf16 --params-dtype fp32", ["--bf16 and --params-dtype contradict"]),
        (TRAIN, "--save-best", ["--save-best needs --save"]),
        (TRAIN, "--save-total-limit 2", ["--save-total-limit needs --save"]),
        (TRAIN, "--save out --save-best", ["--save-best needs validations", "--eval-interval"]),
        (TRAIN, "--padding-free --loss-normalization micro-batch", ["--padding-free", "leave one of them out"]),
        (TRAIN, "--stage dpo --padding-free", ["--padding-free is for single records"]),
        (TRAIN, "--stage ray_grpo", ["--stage ray_grpo", "use sft or dpo"]),
        (TRAIN, "--is-pairwise-dataset", ["--is-pairwise-dataset belongs to --stage dpo"]),
        (TRAIN, "--stage sft --dpo-beta 0.2", ["--dpo-beta belongs to --stage dpo"]),
        (TRAIN, "--stage dpo --dpo-beta 0", ["--dpo-beta 0", "above 0"]),
        (TRAIN, "--stage dpo --dpo-label-smoothing 0.5", ["--dpo-label-smoothing 0.5", "below 0.5"]),
        (TRAIN, "--stage dpo --dpo-loss-type kto", ["--dpo-loss-type kto", "sigmoid or hinge or ipo"]),
        (TRAIN, "--stage dpo --dpo-loss-type ipo --dpo-label-smoothing 0.1", ["--dpo-label-smoothing has no meaning", "sigmoid or simpo"]),
        (TRAIN, "--stage dpo --simpo-gamma 1", ["--simpo-gamma has no meaning with --dpo-loss-type sigmoid"]),
        (TRAIN, "--stage dpo --ref-model /nowhere", ["--ref-model /nowhere", "existing folder"]),
        (TRAIN, "--stage dpo --pack", ["--pack: preference pairs are not packed"]),
        (TRAIN, "--stage dpo --loss-normalization micro-batch", ["mean over the global batch's pairs"]),
        (TRAIN, "--num-zero-experts 8", ["--num-zero-experts 8", "later release"]),
        (TRAIN, "--pack --neat-pack", ["--neat-pack", "add --reset-attention-mask"]),
        (TRAIN, "--handler-name GeneralPretrainHandler", ["is not for this training", "instructions and pairs"]),
        (TRAIN, "--nproc_per_node 2", ["belongs to torchrun"]),
        (TRAIN, "--micro-batch-size 0", ["--micro-batch-size 0", "at least 1"]),
        (TRAIN, "--micro-batch-size two", ["--micro-batch-size two", "whole number"]),
        (TRAIN, "--lr 0", ["--lr 0", "above 0"]),
        (TRAIN, "--lr nan", ["--lr nan"]),
        (TRAIN, "--adam-beta2 1", ["--adam-beta2 1"]),
        (TRAIN, "--split 0,0,1", ["--split 0,0,1", "100,0,0"]),
        (TRAIN, "--split a,b", ["--split a,b"]),
        (TRAIN, "--data-path a b", ["--data-path a b", "give one"]),
        (TRAIN, "--global-batch-size 6 --micro-batch-size 4", ["--global-batch-size 6", "use 4 or 8"]),
        (TRAIN, "--min-lr 1e-2 --lr 1e-3", ["--min-lr 0.01 is above --lr 0.001"]),
        (TRAIN, "--lr-warmup-iters 2 --lr-warmup-fraction 0.1", ["contradict"]),
        (TRAIN, "--lr-warmup-iters 10", ["--lr-warmup-iters 10", "fewer than 10"]),
        (TRAIN, "--lr-warmup-init 1", ["--lr-warmup-init 1"]),
        (TRAIN, "--lr-decay-style WSD", ["--lr-decay-style WSD", "cosine"]),
        (TRAIN, "--recompute-granularity full", ["--recompute-granularity full needs --recompute-method"]),
        (TRAIN, "--recompute-granularity full --recompute-method block", ["needs --recompute-num-layers"]),
        (TRAIN, "--recompute-method block", ["needs --recompute-granularity full"]),
        (TRAIN, "--num-layers-per-virtual-pipeline-stage 1", ["needs --pipeline-model-parallel-size"]),
        (TRAIN, "--calculate-per-token-loss --loss-normalization micro-batch", ["contradict"]),
        (TRAIN, "--lora-ckpt-filter --no-lora-ckpt-filter", ["--lora-ckpt-filter and --no-lora-ckpt-filter contradict"]),
        (TRAIN, "--save-interval 5", ["--save-interval 5 needs --save"]),
        (TRAIN, "--lora-target-modules q_proj", ["--lora-target-modules q_proj", "linear_qkv or linear_proj"]),
        (TRAIN, "--lora-r 8", ["--lora-r without --lora-target-modules"]),
        (TRAIN, "--lora-fusion --lora-alpha 16", ["--lora-fusion and --lora-alpha without --lora-target-modules"]),
        (TRAIN, "--enable-thinking maybe", ["--enable-thinking maybe", "true or false or none"]),
        (TRAIN, "--tokenizer-type Llama2Tokenizer", ["PretrainedFromHF"]),
        (TRAIN, "--rope-scaling-type llama3", ["--rope-scaling-type llama3", "config.json"]),
        (TRAIN, "--distributed-backend mpi", ["--distributed-backend mpi", "gloo"]),
        (INFER, "--top-p 0", ["--top-p 0"]),
        (INFER, "--temperature -1", ["--temperature -1"]),
        (INFER, "--hf-chat-template --prompt-type qwen3", ["contradict"]),
        (EVALUATE, "--hf-chat-template --no-chat-template", ["contradict"]),
        (EVALUATE, "--hf-chat-template --prompt-type qwen3", ["contradict"]),
        (EVALUATE, "--task needlebench", ["--task needlebench", "no such task"]),
        (EVALUATE, "--compare-base", ["--compare-base", "--lora-load"]),
        (EVALUATE, "--eval-language fr", ["--eval-language fr", "use en or zh"]),
        (EVALUATE, "--chain-of-thought", ["--chain-of-thought", "bbh_fewshot"]),
        (CONVERT, "--num-layer-list 1,x", ["--num-layer-list 1,x", "with commas between them"]),
        (CONVERT, "--save-model-type hf --target-tensor-parallel-size 2", ["--target-tensor-parallel-size 2 with --save-model-type hf"]),
        (CONVERT, "--save-model-type hf --target-pipeline-parallel-size 2", ["--target-pipeline-parallel-size 2"]),
        (CONVERT, "--save-lora-to-hf", ["--save-lora-to-hf", "--save-model-type hf"]),
        (CONVERT, "--model-type-hf gemma", ["--model-type-hf gemma", "later release"]),
        (CONVERT, "--model-type BERT", ["--model-type BERT"]),
        (CONVERT, "--num-layers-per-virtual-pipeline-stage 1", ["needs --target-pipeline-parallel-size"]),
        (PREPROCESS, "--handler-name AlpacaInstructionHandler", ["unknown value", "did you mean AlpacaStyleInstructionHandler or"]),
        (PREPROCESS, "--interleave-probs 0.5,0", ["numbers above 0"]),
        (PREPROCESS, "--preview 2 --merge-group-keys text", ["--preview shows records", "keep one of them"]),
        (PREPROCESS, "--neat-pack --seq-length 64", ["--neat-pack", "needs --pack"]),
        (PREPROCESS, "--pack", ["--pack needs --seq-length"]),
    ],
)
def test_refused_values_and_contradictions(command: str, words: str, expected: list[str], minimal: dict[str, list[str]]) -> None:
    message = refusal(command, minimal[command] + words.split())
    assert all(part in message for part in expected), message


@pytest.mark.parametrize(
    ("text", "expected"),
    [('{"prompt": "q",}', "line 1 column 16"), ("{'prompt': 'q'}", "line 1 column 2"), ("[1]", "list where an object")],
)
def test_wrong_json_in_map_keys(text: str, expected: str, minimal: dict[str, list[str]]) -> None:
    message = refusal(PREPROCESS, [*minimal[PREPROCESS], "--map-keys", text])
    assert "--map-keys" in message and expected in message


@pytest.mark.parametrize(
    ("command", "flag"),
    [(command, flag.name) for command in COMMANDS for flag in flags_of(command).values() if flag.must_exist],
)
def test_missing_paths_are_named(command: str, flag: str, minimal: dict[str, list[str]], tmp_path: Path) -> None:
    missing = str(tmp_path / "not" / "here")
    message = refusal(command, [*minimal[command], flag, missing])
    assert f"{flag} {missing}" in message and f"exists as far as {tmp_path}" in message


def test_a_file_is_no_folder_and_a_folder_no_file(minimal: dict[str, list[str]], tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    assert "this is a file" in refusal(INFER, ["--load", str(file)])
    assert "this is a folder" in refusal(INFER, [*minimal[INFER], "--prompt-type-path", str(tmp_path)])


@pytest.mark.parametrize("command", RUNS)
def test_an_adapter_needs_a_base(command: str, tmp_path: Path, minimal: dict[str, list[str]]) -> None:
    message = refusal(command, [*minimal[command][2:], "--lora-load", str(tmp_path)])
    assert "--lora-load" in message and "--load" in message


def test_lora_flags_go_with_a_save_that_holds_an_adapter(tmp_path: Path, minimal: dict[str, list[str]]) -> None:
    (tmp_path / "iter_0000010").mkdir()
    write_manifest(tmp_path / "iter_0000010", Manifest(kind="adapter", lora={"r": 8, "alpha": 16, "targets": ["linear_qkv"]}))
    config, _ = parse(TRAIN, [*minimal[TRAIN], "--lora-fusion"])
    assert config.lora is not None and config.lora.fusion and config.lora.targets is None


def test_rope_scaling_is_compared_with_config_json(tmp_path: Path, minimal: dict[str, list[str]]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}))
    parse(TRAIN, [*minimal[TRAIN], "--rope-scaling-type", "llama3", "--rope-scaling-factor", "8.0"])
    (tmp_path / "config.json").write_text(json.dumps({"rope_parameters": {"rope_type": "default"}}))
    assert "says default" in refusal(TRAIN, [*minimal[TRAIN], "--rope-scaling-type", "llama3"])


def test_converting_onto_the_source_is_refused(tmp_path: Path, minimal: dict[str, list[str]]) -> None:
    assert "--save-dir" in refusal(CONVERT, [*minimal[CONVERT], "--save-dir", str(tmp_path)])
