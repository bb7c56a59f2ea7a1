"""The Macenko fit of a slide from how often each 8-bit colour occurs in it, in float64 NumPy: oracle and fallback."""

from __future__ import annotations

import numpy as np

from ernet_fast.reference.macenko import canonical_signs, in_order
from ernet_fast.stain.result import MIN_CONCENTRATION, MIN_TISSUE_PIXELS, RANK_TOLERANCE, MacenkoStatus


def fit_colours(
    colours: np.ndarray, counts: np.ndarray, *, Io: float, alpha: float, beta: float, percentile: str
) -> tuple[np.ndarray, np.ndarray, MacenkoStatus]:
    """`fit_pixels` of an image in which the colour [n, 3] number i occurs counts[i] > 0 times."""
    nothing = np.full((3, 2), np.nan), np.full(2, np.nan)
    od = -np.log((colours.astype(np.float64) + 1) / Io)
    is_tissue = ~np.any(od < beta, axis=1)
    tissue, weights = od[is_tissue], counts[is_tissue]
    if weights.sum() < MIN_TISSUE_PIXELS:
        return *nothing, MacenkoStatus.TOO_FEW_TISSUE_PIXELS
    eigenvalues, eigenvectors = np.linalg.eigh(np.cov(tissue.T, fweights=weights))
    mean_square = np.average(np.sum(tissue**2, axis=1), weights=weights)
    if eigenvalues[1] <= RANK_TOLERANCE * mean_square:
        return *nothing, MacenkoStatus.RANK_DEFICIENT
    plane = canonical_signs(eigenvectors[:, 1:3], np.average(tissue, axis=0, weights=weights))
    projected = tissue @ plane
    phi = np.arctan2(projected[:, 1], projected[:, 0])
    angles = [counted_quantile(phi, weights, q, percentile) for q in (alpha, 100 - alpha)]
    extremes = [plane @ [np.cos(angle), np.sin(angle)] for angle in angles]
    stain = in_order(extremes)
    if not np.linalg.det(stain.T @ stain) > RANK_TOLERANCE:
        return *nothing, MacenkoStatus.RANK_DEFICIENT
    concentration = np.linalg.lstsq(stain, od.T, rcond=None)[0]
    maximum = np.array([counted_quantile(row, counts, 99, percentile) for row in concentration])
    if not np.all(maximum > MIN_CONCENTRATION):
        return *nothing, MacenkoStatus.ZERO_CONCENTRATION
    return stain, maximum, MacenkoStatus.OK


def counted_quantile(values: np.ndarray, counts: np.ndarray, percent: float, percentile: str) -> float:
    """The percentile of the numbers in which values[i] occurs counts[i] times, as `quantiles` takes it."""
    order = np.argsort(values)
    ends = np.cumsum(counts[order])  # the value at rank k is the first whose end is beyond k
    last = int(ends[-1]) - 1
    if percentile == "nearest":
        rank = round(0.01 * float(percent) * last)
        return float(values[order[np.searchsorted(ends, rank, side="right")]])
    position = last * (percent / 100)
    lower = min(int(position), last)
    below, above = (
        float(values[order[np.searchsorted(ends, rank, side="right")]]) for rank in (lower, min(lower + 1, last))
    )
    weight = position - lower
    return below + (above - below) * weight if weight < 0.5 else above - (above - below) * (1 - weight)
