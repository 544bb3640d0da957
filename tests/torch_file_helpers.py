"""Rank files and pickles made by hand, for tests of reading."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch


def save_rank(folder: Path, content: dict[str, Any]) -> Path:
    rank = folder / "iter_0000001/mp_rank_00"
    rank.mkdir(parents=True, exist_ok=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("1")
    torch.save(content, rank / "model_optim_rng.pt")
    return rank / "model_optim_rng.pt"


class Runs:
    """Pickles as a call of ``os.system(command)``."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)
