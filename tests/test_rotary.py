"""Rotary frequencies and temperatures against transformers' own functions, and the kinds that are refused."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_config
from packaging.version import Version

from mindspeed_lora.errors import CheckpointError
from mindspeed_lora.model.rotary import inverse_frequencies, rotary_scale, softmax_scale
from mindspeed_lora.weights.families import model_config_from_dict, model_config_from_hf

ORIGINAL = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
CASES: dict[str, dict[str, Any]] = {
    "YaRN": ORIGINAL,
    "DeepSeek's temperatures": {**ORIGINAL, "mscale": 0.707, "mscale_all_dim": 1.5},
    "DeepSeek V3's": {**ORIGINAL, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1},
    "one temperature": {**ORIGINAL, "mscale": 0.5},
    "its own factor": {**ORIGINAL, "attention_factor": 1.3, "beta_fast": 4, "beta_slow": 2},
    "not truncated": {**ORIGINAL, "truncate": False, "original_max_position_embeddings": 4096},
    "an empty ramp": {**ORIGINAL, "beta_fast": 1, "beta_slow": 1, "factor": 0.5},
    "linear": {"rope_type": "linear", "factor": 3.0},
}


@pytest.mark.parametrize("family", ["qwen3", "llama", "deepseek_v3"])
@pytest.mark.parametrize("case", CASES)
def test_frequencies_and_their_scale_equal_transformers(family: str, case: str, tmp_path: Path) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if case in ("not truncated", "an empty ramp") and Version(version("transformers")) < Version("5"):
        pytest.skip("transformers 4 takes YaRN's factor from the lengths, whatever config.json says, and does not know truncate")
    theirs = tiny_config(family, rope_scaling=dict(CASES[case]))
    theirs.save_pretrained(tmp_path)
    config = model_config_from_hf(tmp_path)
    frequencies, scale = ROPE_INIT_FUNCTIONS[CASES[case]["rope_type"]](theirs, torch.device("cpu"))
    torch.testing.assert_close(inverse_frequencies(config), frequencies, rtol=1e-6, atol=0)
    assert rotary_scale(config) == pytest.approx(scale)


@pytest.mark.parametrize("case", ["YaRN", "DeepSeek's temperatures", "DeepSeek V3's", "linear"])
def test_the_scores_scale_is_deepseeks(case: str, tmp_path: Path) -> None:
    modeling = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    theirs = tiny_config("deepseek_v3", rope_scaling=dict(CASES[case]))
    theirs.save_pretrained(tmp_path)
    assert softmax_scale(model_config_from_hf(tmp_path)) == pytest.approx(modeling.DeepseekV3Attention(theirs, 0).scaling)


def test_a_rope_that_is_not_known_is_refused() -> None:
    values = tiny_config("llama").to_dict() | {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}
    with pytest.raises(CheckpointError, match="rope type 'longrope' is not supported; default, linear, llama3 and yarn are"):
        inverse_frequencies(model_config_from_dict(values))
