"""What a run prints at its start and its end: settings without those that nobody made, and commands that the parser takes."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from training_helpers import make_config

from mindspeed_lora.arguments.configs import TemplateFlags
from mindspeed_lora.arguments.parser import parse
from mindspeed_lora.parallel.context import ExpertGrid, ParallelContext
from mindspeed_lora.training.ending import next_commands
from mindspeed_lora.training.starting import describe_config

LAYOUTS = {
    "one process": (
        ParallelContext(torch.device("cpu")),
        "python inference.py --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1",
    ),
    "TP2 PP2": (
        ParallelContext(torch.device("cpu"), tp_size=2, pp_size=2),
        "torchrun --nproc_per_node 4 inference.py --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2",
    ),
    "EP4": (
        ParallelContext(torch.device("cpu"), dp_size=8, expert_grid=ExpertGrid(4, 0, None, 1, 0, None, 2, 0, None)),
        "torchrun --nproc_per_node 4 inference.py --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1 "
        "--expert-model-parallel-size 4",
    ),
    "TP2 EP4 ETP1": (
        ParallelContext(torch.device("cpu"), tp_size=2, dp_size=2, expert_grid=ExpertGrid(4, 0, None, 1, 0, None, 1, 0, None)),
        "torchrun --nproc_per_node 4 inference.py --tensor-model-parallel-size 2 --pipeline-model-parallel-size 1 "
        "--expert-model-parallel-size 4 --expert-tensor-parallel-size 1",
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_next_commands_ask_at_the_run_s_layout(layout: str, tmp_path: Path) -> None:
    context, expected = LAYOUTS[layout]
    for name in ("base", "saved"):
        (tmp_path / name).mkdir()
    plan: Any = SimpleNamespace(
        config=SimpleNamespace(save=SimpleNamespace(save=tmp_path / "saved", lora_ckpt_filter=True), template=TemplateFlags("qwen3")),
        lora=object(),
        start=SimpleNamespace(base=SimpleNamespace(path=tmp_path / "base", kind="mg")),
        dataset=SimpleNamespace(manifest=None),
    )
    ask, export = next_commands(plan, context)
    assert expected in ask and "--prompt-type qwen3" in ask, "data without a manifest has the template of the flags"
    for command in (ask, export):
        words = shlex.split(command.partition(":")[2])
        place = next(index for index, word in enumerate(words) if word.endswith(".py"))
        parse(words[place], words[place + 1 :])


def test_settings_that_nobody_made_are_not_printed(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    lines = describe_config(config)
    assert f"train_iters: {config.train_iters}" in lines
    assert not [line for line in lines if "None" in line]
    experts = replace(config.architecture.experts, count=8)
    assert "architecture.experts.count: 8" in describe_config(replace(config, architecture=replace(config.architecture, experts=experts)))
