"""Nuclei that were found, held against those that are there."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ernet_fast._optional import require


class Detection(NamedTuple):
    """Counts of one image, or sums over several: `found` and `true` nuclei in the field, `matched` pairs of them."""

    found: int
    true: int
    matched: int

    @property
    def f1(self) -> float:
        """2 matched / (found + true); 1 where there is nothing to find and nothing was found."""
        return 2 * self.matched / (self.found + self.true) if self.found + self.true else 1.0

    @property
    def precision(self) -> float:
        """Share of what was found that is there; 1 where nothing was found."""
        return self.matched / self.found if self.found else 1.0

    @property
    def recall(self) -> float:
        """Share of what is there that was found; 1 where nothing is."""
        return self.matched / self.true if self.true else 1.0

    @property
    def count_error(self) -> float:
        """(found - true) / true; NaN where nothing is there."""
        return (self.found - self.true) / self.true if self.true else float("nan")


def compare_nuclei(found: ArrayLike, true: ArrayLike, radius: ArrayLike, size: tuple[int, int]) -> Detection:
    """Match centres one to one within each true nucleus's radius: as many as possible, and then as near as possible.

    Args:
        found: centres (y, x) [m, 2], pixels.
        true: centres (y, x) [n, 2], pixels. Those outside the field may be matched, by what reaches into it, but
            neither they nor their partners count.
        radius: within which a match of each true nucleus lies, pixels: [n], or one number.
        size: height and width of the field, pixels.

    Raises:
        ImportError: SciPy is missing.
    """
    optimize = require("scipy.optimize", extra="segment", purpose="matching nuclei")
    found, true = (np.asarray(points, np.float64).reshape(-1, 2) for points in (found, true))
    limits = np.broadcast_to(np.asarray(radius, np.float64), len(true))
    inside = np.all((true > -0.5) & (true < np.asarray(size) - 0.5), axis=1)
    share = np.linalg.norm(found[:, None] - true[None], axis=2) / limits
    cost = np.where(share <= 1, share - 1e6, 0.0)  # a pair more is worth any distance
    rows, columns = optimize.linear_sum_assignment(cost)
    pairs = share[rows, columns] <= 1
    matched = inside[columns[pairs]]
    return Detection(len(found) - int((~matched).sum()), int(inside.sum()), int(matched.sum()))
