"""Means with their standard errors, and whether two models differ on the same items.

```
standard error of a mean       s / sqrt(n), s with n - 1                     (as lm_eval's)
difference of two models       mean of the items' differences, its own standard error: the items are the same, so they are paired
p, items right or wrong        McNemar's exact test: of the b + c items on which they differ, b ~ Binomial(b + c, 1/2), two-sided
p, other items                 sign-flip test of the mean difference, 10,000 flips, seed 0, two-sided
```
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

FLIPS = 10_000


@dataclass(frozen=True)
class Mean:
    """``stderr`` is nan for fewer than two values."""

    value: float
    stderr: float
    count: int


def mean_of(values: Sequence[float]) -> Mean:
    """Mean, standard error and number of ``values``, which are not empty."""
    count = len(values)
    mean = math.fsum(values) / count
    spread = math.fsum((value - mean) ** 2 for value in values)
    return Mean(mean, math.sqrt(spread / (count - 1) / count) if count > 1 else math.nan, count)


@dataclass(frozen=True)
class Comparison:
    """``gained``: items that the second model has better than the first, ``lost``: worse. ``difference``: second less first."""

    first: Mean
    second: Mean
    difference: Mean
    gained: int
    lost: int
    p_value: float
    test: str


def compare(first: Sequence[float], second: Sequence[float]) -> Comparison:
    """Two models on the same items, in the same order."""
    differences = [b - a for a, b in zip(first, second, strict=True)]
    gained, lost = sum(value > 0 for value in differences), sum(value < 0 for value in differences)
    if all(value in (0.0, 1.0) for value in (*first, *second)):
        p_value, test = mcnemar_exact(gained, lost), "McNemar's exact test"
    else:
        p_value, test = sign_flip(differences), f"sign-flip test, {FLIPS} flips"
    return Comparison(mean_of(first), mean_of(second), mean_of(differences), gained, lost, p_value, test)


def mcnemar_exact(gained: int, lost: int) -> float:
    """Two-sided probability of a split at least as uneven as ``gained`` against ``lost`` by chance."""
    differing = gained + lost
    tail = sum(math.comb(differing, k) for k in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**differing)


def sign_flip(differences: Sequence[float]) -> float:
    """Two-sided share of random signs (and the ones seen) under which the mean is as far from 0 as it is."""
    generator, seen = random.Random(0), abs(math.fsum(differences))
    as_far = sum(abs(sum(value if generator.getrandbits(1) else -value for value in differences)) >= seen - 1e-12 for _ in range(FLIPS))
    return (as_far + 1) / (FLIPS + 1)
