"""Cutting a conversation that is longer than ``--seq-length``, turn by turn, by the two rules the peer uses.

``proportional`` (LLaMA-Factory 0.8.2): source and target of a turn share what is left in proportion to their lengths.
``halves`` (0.9.4): the shorter side, when it is under half of what is left, is kept whole; one token is kept free.
"""

from __future__ import annotations

from typing import Literal

CutRule = Literal["proportional", "halves"]
Pair = tuple[list[int], list[int]]


def cut_turns(pairs: list[Pair], cutoff: int, rule: CutRule) -> list[Pair]:
    """Cut (source, target) pairs so that their ids number at most ``cutoff`` (``halves``: cutoff - 1); later turns may vanish."""
    left = cutoff - 1 if rule == "halves" else cutoff
    cut: list[Pair] = []
    for source, target in pairs:
        if left <= 0:
            break
        max_source, max_target = (shared_room if rule == "halves" else _proportional)(len(source), len(target), left)
        source, target = source[:max_source], target[:max_target]
        left -= len(source) + len(target)
        cut.append((source, target))
    return cut


def _proportional(source: int, target: int, left: int) -> tuple[int, int]:
    share = int(left * (target / (source + target))) if source + target else 0
    max_target = max(share, 1)
    return left - min(max_target, target), max_target


def shared_room(source: int, target: int, left: int) -> tuple[int, int]:
    """Most tokens of a source and of a target that share room for ``left``, by the rule ``halves``."""
    if target * 2 < left:
        max_target = left
    elif source * 2 < left:
        max_target = left - source
    else:
        max_target = int(left * (target / (source + target)))
    max_target = min(max_target, target)
    return max(left - max_target, 0), max_target
