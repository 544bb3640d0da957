"""A run loads a Megatron folder of any layout at a layout of its own, to the same parameters as the Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conversion_helpers import run_convert
from engine_helpers import build_engine
from helpers import tiny_qwen3
from pool import ProcessPool

from mindspeed_lora.parallel.context import build_context

FOLDERS: dict[str, dict[str, Any]] = {
    "virtual stages": dict(target_tensor_parallel_size=4, target_pipeline_parallel_size=2, layers_per_virtual_stage=1),
    "layer list": dict(target_pipeline_parallel_size=2, num_layer_list=(1, 3)),
    "empty slots": dict(target_pipeline_parallel_size=3, noop_layers=(0, 4)),
    "padded": dict(target_tensor_parallel_size=2, make_vocab_size_divisible_by=128),
}


def different_cell(hf: Path, folders: dict[str, Path], tp: int, pp: int, virtual: int | None) -> list[str]:
    """Parameters of this rank that are not those of the Hugging Face folder."""
    odd = []
    context = build_context(torch.device("cpu"), tp, pp)
    expected = [dict(stage.named_parameters()) for stage in build_engine(hf, context, layers_per_virtual_stage=virtual).stages]
    assert sum(map(len, expected)) > 4
    for name, folder in folders.items():
        stages = build_engine(folder, context, layers_per_virtual_stage=virtual).stages
        for stage, wanted in zip(stages, expected, strict=True):
            found = dict(stage.named_parameters())
            assert set(found) == set(wanted)
            for key, parameter in found.items():
                rows = min(len(parameter), len(wanted[key]))  # a padded vocabulary has more
                if not torch.equal(parameter[:rows], wanted[key][:rows]):
                    odd.append(f"{name}: {key}")
    return odd


@pytest.mark.parametrize(("tp", "pp", "virtual"), [(2, 1, None), (1, 2, None), (1, 2, 1)])
def test_any_folder_loads_at_another_layout(pool: ProcessPool, tmp_path: Path, tp: int, pp: int, virtual: int | None) -> None:
    hf = tiny_qwen3(tmp_path / "hf")
    for name, options in FOLDERS.items():
        run_convert("hf", "mg", hf, tmp_path / name, **options)
    assert pool.run(different_cell, tp * pp, hf, {name: tmp_path / name for name in FOLDERS}, tp, pp, virtual) == [[], []]
