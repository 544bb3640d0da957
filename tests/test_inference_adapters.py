"""Adapters of both kinds in one run: a Megatron save cut over TP 2 and PP 2, and a PEFT folder whose q, k, v have matrices of their own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conversion_helpers import TARGETS, random_lora, run_convert, write_megatron_adapter
from helpers import shared_data
from pool import ProcessPool
from test_inference_chat import chat_config, lora, peft_answers
from test_inference_engine import run_infer

from mindspeed_lora.weights.config import Layout
from mindspeed_lora.weights.lora_spec import LoraSpec
from mindspeed_lora.weights.sources import open_base
from mindspeed_lora.weights.table import WeightTable


@pytest.fixture(scope="module")
def folders(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], Path]:
    """The two adapters, and the first as PEFT reads it."""
    import peft
    import transformers

    table, spec, folder = WeightTable(open_base(chat_model).model_config), LoraSpec(4, 8.0, TARGETS), tmp_path_factory.mktemp("both")
    megatron = write_megatron_adapter(folder / "megatron", table, spec, random_lora(table, spec), Layout(2, 2))
    run_convert("mg", "hf", megatron, folder / "exported", save_lora_to_hf=True, hf_cfg_dir=chat_model)
    torch.manual_seed(5)
    base = transformers.AutoModelForCausalLM.from_pretrained(chat_model)
    tuned = peft.get_peft_model(base, peft.LoraConfig(r=3, lora_alpha=12, target_modules=["q_proj", "k_proj", "v_proj", "up_proj"]))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    tuned.save_pretrained(folder / "peft")
    return {"ours": megatron, "theirs": folder / "peft"}, folder / "exported"


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2)])
def test_each_answers_as_in_peft(pool: ProcessPool, chat_model: Path, folders: tuple[dict[str, Path], Path], tp: int, pp: int) -> None:
    import transformers

    adapters, exported = folders
    config: Any = replace(chat_config(chat_model, tp, pp), tasks=("greedy",), prompts=("Once upon a time",), compare_base=True)
    code, text = pool.run(run_infer, tp * pp, replace(config, **lora(adapters, chat_model)))[0]
    assert code == 0, text
    found = [part.split("\n\nYou:")[0].split("\n====")[0] for part in text.split("):\n")[1:]]
    tokenizer = transformers.AutoTokenizer.from_pretrained(shared_data() / "stories260k" / "hf")
    ids = tokenizer.encode("Once upon a time")
    tokens = [peft_answers(chat_model, folder, ids) for folder in (exported, adapters["theirs"], None)]
    expected = [tokenizer.decode(answer, skip_special_tokens=True) for answer in tokens]
    assert found == expected and len(set(expected)) == 3, "the adapters must change the answer"
