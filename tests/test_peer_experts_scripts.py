"""The peer's shipped scripts for models with experts and latent attention, flag by flag, against those models' config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT

from mindspeed_lora.arguments.parser import parse
from mindspeed_lora.checkpoint.resolve import check_architecture
from mindspeed_lora.errors import UsageError
from mindspeed_lora.weights.families import model_config_from_dict

FIXTURE: dict[str, Any] = json.loads((ROOT / "tests" / "fixtures" / "peer_experts_scripts.json").read_text(encoding="utf-8"))
PATHS = {"--load", "--lora-load", "--tokenizer-name-or-path", "--task-data-path", "--data-path", "--save"}

# Refused for reasons that have nothing to do with experts or latent attention; each is refused by name.
OTHER_REASONS = {
    *("--context-parallel-size", "--num-layer-list", "--noop-layers", "--mtp-num-layers", "--mtp-loss-scaling-factor"),
    *("--mtp-mem-efficient-logits", "--alternative-prompt", "--npu-deterministic", "--input-layernorm-in-fp32", "--tokenizer-model"),
}
NOT_THIS_MODEL = {"mixtral/tune_mixtral_8x7b_lora_ptd": "--moe-router-topk 1 contradicts"}  # one expert a token, where the model takes two


def flags_of(text: str) -> list[list[str]]:
    """Each flag with its values."""
    flags: list[list[str]] = []
    for word in text.split():
        if word.startswith("--"):
            flags.append([])
        flags[-1].append(word)
    return flags


def command_line(script: dict[str, Any], folder: Path) -> list[str]:
    """The script's words with paths filled in, less what is refused for other reasons; noop layers are not counted."""
    model, argv = FIXTURE["models"][script["model"]], []
    for flag, *values in flags_of(script["flags"]):
        if flag in OTHER_REASONS:
            continue
        if flag == "--num-layers" and "--noop-layers" in script["flags"]:
            values = [str(model["num_hidden_layers"])]
        argv += [flag, *([str(folder)] if flag in PATHS else values)]
    return argv


def check(name: str, folder: Path, changes: dict[str, Any] | None = None, added: str = "") -> None:
    script = FIXTURE["scripts"][name]
    content = {**FIXTURE["models"][script["model"]], **(changes or {})}
    (folder / "config.json").write_text(json.dumps(content))
    config, _ = parse(script["command"], [*command_line(script, folder), *added.split()])
    check_architecture(model_config_from_dict(content), config.architecture, "config.json")


@pytest.mark.parametrize("name", sorted(set(FIXTURE["scripts"]) - set(NOT_THIS_MODEL)))
def test_the_flags_fit_the_model_they_are_for(name: str, tmp_path: Path) -> None:
    check(name, tmp_path)


@pytest.mark.parametrize("name", sorted(NOT_THIS_MODEL))
def test_a_script_that_changes_its_model_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=NOT_THIS_MODEL[name]):
        check(name, tmp_path)


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("qwen3_moe/tune_qwen3_30b_a3b_4K_lora_ptd", {"num_experts": 64}, "--num-experts 128 .*routed experts 64"),
        ("qwen3_moe/tune_qwen3_30b_a3b_4K_lora_ptd", {"num_experts_per_tok": 4}, "--moe-router-topk 8 .*num_experts_per_tok 4"),
        ("qwen3_moe/tune_qwen3_30b_a3b_4K_lora_ptd", {"moe_intermediate_size": 512}, "--moe-ffn-hidden-size 768 .*512"),
        ("qwen3_moe/tune_qwen3_30b_a3b_4K_lora_ptd", {"norm_topk_prob": False}, "--norm-topk-prob contradicts .*norm_topk_prob False"),
        ("qwen2_moe/generate_qwen2_57b_a14b_ptd", {"shared_expert_intermediate_size": 5120}, "--n-shared-experts 8 .*n_shared_experts 2"),
        (
            "deepseek2_lite/generate_deepseek2_lite_16b_ptd",
            {"first_k_dense_replace": 2},
            "--first-k-dense-replace 1 with --moe-layer-freq 1",
        ),
        ("deepseek2_lite/generate_deepseek2_lite_16b_ptd", {"kv_lora_rank": 256}, "--kv-lora-rank 512 .*kv_lora_rank 256"),
        ("deepseek2_lite/generate_deepseek2_lite_16b_ptd", {"qk_rope_head_dim": 32}, "--qk-pos-emb-head-dim 64 .*qk_rope_head_dim 32"),
        ("deepseek2_lite/generate_deepseek2_lite_16b_ptd", {"v_head_dim": 64}, "--v-head-dim 128 .*v_head_dim 64"),
        ("deepseek3/tune_deepseek3_671b_4k_lora_ptd", {"q_lora_rank": None}, "--q-lora-rank 1536 .*q_lora_rank None"),
        ("deepseek3/tune_deepseek3_671b_4k_lora_ptd", {"qk_nope_head_dim": 64}, "--qk-head-dim 128 .*qk_nope_head_dim 64"),
        ("deepseek3/tune_deepseek3_671b_4k_lora_ptd", {"n_group": 4}, "--moe-router-num-groups 8 .*n_group 4"),
        ("deepseek3/tune_deepseek3_671b_4k_lora_ptd", {"topk_group": 2}, "--moe-router-group-topk 4 .*topk_group 2"),
        ("deepseek3/tune_deepseek3_671b_4k_lora_ptd", {"routed_scaling_factor": 1.0}, "--moe-router-topk-scaling-factor 2.5 .*1.0"),
        ("deepseek3/tune_deepseek3_671b_4k_lora_ptd", {"rope_scaling": {"type": "yarn", "factor": 4}}, "--rope-scaling-factor 40.0 .*4"),
    ],
)
def test_a_value_that_is_not_the_models_is_named(name: str, changes: dict[str, Any], expected: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=expected):
        check(name, tmp_path, changes)


@pytest.mark.parametrize(
    ("name", "added", "expected"),
    [
        ("mixtral/generate_mixtral_8x7b_ptd", "--multi-latent-attention", "--multi-latent-attention contradicts .*latent attention: False"),
        ("mixtral/generate_mixtral_8x7b_ptd", "--kv-lora-rank 512", "--kv-lora-rank 512 .*no latent attention"),
        ("mixtral/generate_mixtral_8x7b_ptd", "--shared-expert-gate", "--shared-expert-gate contradicts"),
        ("mixtral/generate_mixtral_8x7b_ptd", "--moe-router-pre-softmax", "--moe-router-pre-softmax without --norm-topk-prob"),
        ("mixtral/generate_mixtral_8x7b_ptd", "--moe-router-score-function sigmoid", "--moe-router-score-function sigmoid .*softmax"),
        ("mixtral/generate_mixtral_8x7b_ptd", "--moe-router-enable-expert-bias", "--moe-router-enable-expert-bias contradicts"),
        ("mixtral/generate_mixtral_8x7b_ptd", "--moe-shared-expert-intermediate-size 8", "--moe-shared-expert-intermediate-size 8"),
        ("mixtral/generate_mixtral_8x7b_ptd", "--moe-layer-freq 2", r"--moe-layer-freq 2: dense layers \(1, 3"),
        ("mixtral/generate_mixtral_8x7b_ptd", "--moe-layer-freq ([0]*1+[1]*31)", r"dense layers \(0,\)"),
        ("deepseek2_lite/generate_deepseek2_lite_16b_ptd", "--first-k-dense-replace 0", r"dense layers \(\) contradicts .*\(0,\)"),
        ("mixtral/generate_mixtral_8x7b_ptd", "--moe-layer-freq [0]*", "ones and zeros by layer"),
        ("mixtral/generate_mixtral_8x7b_ptd", "--moe-router-dtype fp64", "--moe-router-dtype fp64: .*always in fp32"),
        ("mixtral/generate_mixtral_8x7b_ptd", "--moe-input-jitter-eps 0.01", "--moe-input-jitter-eps 0.01: noise"),
        ("mixtral/generate_mixtral_8x7b_ptd", "--moe-token-dispatcher-type flex", "--moe-token-dispatcher-type flex: .*alltoall"),
        ("mixtral/generate_mixtral_8x7b_ptd", "--moe-router-load-balancing-type sinkhorn", "no family here"),
        ("mixtral/generate_mixtral_8x7b_ptd", "--qk-nope-head-dim 8 --qk-head-dim 9", "contradict each other"),
    ],
)
def test_a_flag_that_the_model_does_not_have_is_named(name: str, added: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=expected):
        check(name, tmp_path, added=added)


@pytest.mark.parametrize(
    ("flag", "value"), [("--num-experts", 8), ("--moe-router-topk", 2), ("--moe-ffn-hidden-size", 8), ("--n-shared-experts", 1)]
)
def test_experts_of_a_dense_model_are_named(flag: str, value: int, tmp_path: Path) -> None:
    content = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config, _ = parse("inference.py", ["--load", str(tmp_path), "--norm-topk-prob", flag, str(value)])
    with pytest.raises(UsageError, match=f"{flag} {value} contradicts .*experts 0"):
        check_architecture(model_config_from_dict({**content, "vocab_size": 8}), config.architecture, "config.json")


def test_an_equivalent_pattern_of_layers_is_no_contradiction(tmp_path: Path) -> None:
    check("deepseek2_lite/generate_deepseek2_lite_16b_ptd", tmp_path, added="--moe-layer-freq ([0]*1+[1]*26)")
