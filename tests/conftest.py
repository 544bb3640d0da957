"""Fixtures of all tests."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from helpers import tiny_qwen3
from pool import ProcessPool

if TYPE_CHECKING:
    import torch


@pytest.fixture(autouse=True)
def no_handler_of_another_test() -> Iterator[None]:
    """An entry point's handler writes to the standard output of its own test, which is closed afterwards."""
    yield
    logging.getLogger("mindspeed_lora").handlers.clear()


@pytest.fixture(scope="session")
def pool() -> Iterator[ProcessPool]:
    """Gloo processes for the whole run; none is started before a test asks."""
    processes = ProcessPool()
    yield processes
    processes.remove()


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 for the tokenizer of stories260k."""
    return tiny_qwen3(tmp_path_factory.mktemp("chat"), vocab_size=512)


@pytest.fixture(scope="session")
def two_adapters(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters of PEFT's with other ranks, scales and targets each."""
    import peft
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("adapters")
    specs = {"a": (4, 8, ["q_proj", "k_proj", "v_proj", "o_proj"]), "b": (8, 8, ["gate_proj", "up_proj", "down_proj", "o_proj"])}
    for number, (name, (r, alpha, targets)) in enumerate(specs.items()):
        torch.manual_seed(number)
        base = transformers.AutoModelForCausalLM.from_pretrained(chat_model)
        tuned = peft.get_peft_model(base, peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=targets))
        shared: dict[str, torch.Tensor] = {}
        with torch.no_grad():
            for key, parameter in tuned.named_parameters():
                if "lora_B" in key:
                    parameter.normal_(std=0.3)
                elif "lora_A" in key:  # q, k, v and gate, up share their A, as our fused layers do
                    stem = key.replace("k_proj", "q_proj").replace("v_proj", "q_proj").replace("up_proj", "gate_proj")
                    parameter.copy_(shared.setdefault(stem, parameter.clone()))
        tuned.save_pretrained(folder / name)
    return {name: folder / name for name in specs}
