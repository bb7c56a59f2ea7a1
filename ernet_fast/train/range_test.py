"""Tukey's range test of several treatments in blocks, with the letters of groups that do not differ.

Treatments are networks or ways of preprocessing; a block is a fold and seed that all treatments share. Duncan's
multiple range test, which the ERNet paper's wording suggests, tests the ends of long ranges at a level that grows with
them: of many treatments that are all the same it calls some different far more often than alpha. Tukey's holds alpha
for all pairs together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import numpy as np

from ernet_fast._optional import require


class Treatment(NamedTuple):
    """Mean and standard deviation over the blocks; treatments that share a letter do not differ."""

    name: str
    mean: float
    deviation: float
    letters: str


class Pair(NamedTuple):
    """Two treatments, the better first: difference of their means, and p-value of no difference among all pairs."""

    first: str
    second: str
    difference: float
    p_value: float


@dataclass(frozen=True)
class RangeTest:
    """Treatments, the largest mean first; means that differ by more than `least` differ at `alpha`."""

    treatments: tuple[Treatment, ...]
    pairs: tuple[Pair, ...]
    least: float
    alpha: float
    blocks: int


def tukey(values: Mapping[str, Sequence[float]], *, alpha: float = 0.05) -> RangeTest:
    """Tukey's test of the treatments `values`: each name has one value for each block, in the same order of blocks.

    A randomised complete block design: the error is the residual of treatment and block means, with
    (treatments - 1)(blocks - 1) degrees of freedom; means differ if they are further apart than
    q(1 - alpha; treatments, df) sqrt(error / blocks), q of the studentised range. Of two treatments it is the paired
    t-test.

    Raises:
        ValueError: fewer than two treatments or blocks, numbers of values that differ, or values that are not finite.
        ImportError: SciPy is missing.
    """
    table = np.array([list(row) for row in values.values()] if len({len(r) for r in values.values()}) == 1 else [])
    if table.ndim != 2 or min(table.shape) < 2 or not np.isfinite(table).all():
        raise ValueError(
            "Tukey's test needs two treatments or more, each with a finite value in the same two blocks or more; found "
            f"{', '.join(f'{name}: {len(row)}' for name, row in values.items()) or 'none'}."
        )
    if not 0 < alpha < 1:
        raise ValueError(f"alpha={alpha!r}; expected a number between 0 and 1.")
    studentized_range = require("scipy.stats", extra="study", purpose="the range test").studentized_range
    count, blocks = table.shape
    residual = table - table.mean(axis=1, keepdims=True) - table.mean(axis=0) + table.mean()
    freedom = (count - 1) * (blocks - 1)
    # residuals of values that are equal but for rounding are no error
    squares = float((residual**2).sum())
    squares = squares if squares > (1e-12 * np.abs(table).max()) ** 2 * table.size else 0.0
    unit = math.sqrt(squares / freedom / blocks)
    least = float(studentized_range.ppf(1 - alpha, count, freedom)) * unit
    names = list(values)
    order = sorted(range(count), key=lambda k: (-table[k].mean(), names[k]))
    means = [float(table[k].mean()) for k in order]
    pairs = []
    for a, b in combinations(range(count), 2):
        difference = means[a] - means[b]
        chance = float(studentized_range.sf(difference / unit, count, freedom)) if unit else float(difference == 0)
        pairs.append(Pair(names[order[a]], names[order[b]], difference, min(1.0, max(0.0, chance))))
    letters = group_letters(means, least)
    treatments = tuple(
        Treatment(names[k], mean, float(table[k].std(ddof=1)), group)
        for k, mean, group in zip(order, means, letters, strict=True)
    )
    return RangeTest(treatments, tuple(pairs), least, alpha, blocks)


def group_letters(means: Sequence[float], least: float) -> list[str]:
    """Letters of means in falling order: two share one if and only if they differ by no more than `least`."""
    runs: list[tuple[int, int]] = []
    for start in range(len(means)):
        end = max(k for k in range(start, len(means)) if means[start] - means[k] <= least)
        if not runs or end > runs[-1][1]:
            runs.append((start, end))
    return ["".join(_letter(n) for n, (start, end) in enumerate(runs) if start <= k <= end) for k in range(len(means))]


def _letter(number: int) -> str:
    return chr(ord("a") + number) if number < 26 else f"({number + 1})"
