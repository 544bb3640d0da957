"""A single answer's tokens take a path of their own on a CPU (``model/one_row.py``): its logits are those of the layers' own forward."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from engine_helpers import SPEC, build_engine
from helpers import make_model
from pool import ProcessPool

from mindspeed_lora.model import one_row
from mindspeed_lora.model.decode import DecodeState, KVCache
from mindspeed_lora.model.stage import GPTStage
from mindspeed_lora.parallel.context import build_context, single_process_context

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "norms of heads": ("qwen3", {}),
    "biases": ("qwen2", {}),
    "neither": ("llama", {}),
    "window": ("mistral", {"sliding_window": 5}),
    "experts": ("mixtral", {}),
}


@torch.inference_mode()
def logits(stage: GPTStage, steps: int = 6) -> torch.Tensor:
    """Of six tokens, fed one by one behind four: ``[6, v/t]``."""
    cache, found = KVCache(), []
    ids = torch.tensor([[5, 9, 200, 31, *range(60, 60 + steps)]])
    for start, end in [(0, 4), *((position, position + 1) for position in range(4, 4 + steps))]:
        found.append(stage(ids[:, start:end], decode=DecodeState(torch.arange(start, end)[None], cache=cache))[0, -1])
    return torch.stack(found[1:])


def both(folder: Path, adapter: bool, tp: int = 1) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Logits of this path, those of the layers' own forward, and how many tokens took the first."""
    context = single_process_context() if tp == 1 else build_context(torch.device("cpu"), tp, 1)
    stage = build_engine(folder, context, SPEC if adapter else None).stages[0].eval().requires_grad_(False)
    with patch.object(one_row, "run", wraps=one_row.run) as run:
        fast = logits(stage)
    with patch.object(one_row, "applies", return_value=False):
        return fast, logits(stage), run.call_count


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_one_row_is_the_layers_own_forward(tmp_path: Path, kind: str, adapter: bool) -> None:
    family, changes = MODELS[kind]
    fast, slow, taken = both(make_model(tmp_path / "model", family, **changes), adapter and kind != "experts")
    assert taken == 6
    torch.testing.assert_close(fast, slow, rtol=2e-5, atol=2e-5)


def test_one_row_over_tensor_parallel_ranks(pool: ProcessPool, tmp_path: Path) -> None:
    for fast, slow, taken in pool.run(both, 2, make_model(tmp_path / "model", "qwen3"), True, 2):
        assert taken == 6
        torch.testing.assert_close(fast, slow, rtol=2e-5, atol=2e-5)
