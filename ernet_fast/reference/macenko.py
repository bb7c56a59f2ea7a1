"""Macenko stain normalisation, word for word, in float64 NumPy: the oracle of the tests and the fallback.

M. Macenko et al., "A method for normalizing histology slides for quantitative analysis", ISBI 2009, with the constants
and conventions of the torchstain package (NumPy backend), whose uint8 results it equals bit for bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ernet_fast.stain.layout import read_images
from ernet_fast.stain.options import Options
from ernet_fast.stain.result import (
    EQUAL_COMPONENTS,
    MIN_CONCENTRATION,
    MIN_TISSUE_PIXELS,
    RANK_TOLERANCE,
    MacenkoFit,
    MacenkoStatus,
    describe_failures,
    expand_fit,
)


def macenko_fit(images: Any, *, layout: str | None = None, **options: Any) -> MacenkoFit:
    """As `ernet_fast.stain.macenko_fit`, without its lists and masks."""
    return fit_images(read_images(images, layout).pixels, Options(layout=layout, **options))


def fit_images(images: torch.Tensor, options: Options) -> MacenkoFit:
    """As `macenko_fit` of [B, 3, H, W], on the CPU."""
    o = options
    return as_fit(
        [
            fit_pixels(grey_levels(image, o.range), Io=o.Io, alpha=o.alpha, beta=o.beta, percentile=o.percentile)
            for image in images
        ]
    )


def as_fit(fits: list[tuple[np.ndarray, np.ndarray, MacenkoStatus]]) -> MacenkoFit:
    """The fits of single images as one."""
    count = len(fits)
    return MacenkoFit(
        torch.from_numpy(np.array([fit[0] for fit in fits]).reshape(count, 3, 2)),
        torch.from_numpy(np.array([fit[1] for fit in fits]).reshape(count, 2)),
        torch.tensor([fit[2] for fit in fits], dtype=torch.int32, device="cpu"),
    )


def macenko_normalize(
    images: Any,
    target: MacenkoFit,
    source: MacenkoFit | None = None,
    *,
    layout: str | None = None,
    return_status: bool = False,
    **options: Any,
) -> Any:
    """As `ernet_fast.stain.macenko_normalize`, without its lists, masks and network output."""
    o = Options(layout=layout, **options)
    batch = read_images(images, layout)
    source = fit_images(batch.pixels, o) if source is None else source
    count = len(batch.pixels)
    source, target = expand_fit(source, count, "source"), expand_fit(target, count, "target")
    failures = describe_failures(source.status)
    if failures and o.on_degenerate == "raise":
        raise ValueError(f"these images cannot be normalised: {failures}")
    out = torch.empty_like(batch.pixels)
    for i, image in enumerate(batch.pixels):
        target_stain, target_max = target.stain_matrix[i].numpy(), target.max_concentration[i].numpy()
        stain, maximum = source.stain_matrix[i].numpy(), source.max_concentration[i].numpy()
        if source.status[i] != MacenkoStatus.OK:
            if o.identity:
                out[i] = image
                continue
            stain, maximum = target_stain, target_max
        levels = reconstruct_pixels(grey_levels(image, o.range), stain, maximum, target_stain, target_max, Io=o.Io)
        levels = levels.reshape(image.shape)
        if image.dtype == torch.uint8:
            out[i] = torch.from_numpy(levels.astype(np.uint8))
        else:
            out[i] = torch.from_numpy(levels * (o.range / 255)).to(image.dtype)
    result = batch.restore(out)
    return (result, source.status) if return_status else result


def grey_levels(image: torch.Tensor, range: float) -> np.ndarray:
    """Pixels of a [3, H, W] image as float64 [H W, 3] on the scale 0 to 255."""
    scale = 1.0 if image.dtype == torch.uint8 else 255 / range
    return image.detach().cpu().double().reshape(3, -1).T.contiguous().numpy() * scale


def fit_pixels(
    pixels: np.ndarray, counts: np.ndarray | None = None, *, Io: float, alpha: float, beta: float, percentile: str
) -> tuple[np.ndarray, np.ndarray, MacenkoStatus]:
    """Stain matrix [3, 2], maximal concentrations [2] and status of the grey levels [n, 3] of one image.

    With `counts` pixel i occurs counts[i] > 0 times, else once.
    """
    nothing = np.full((3, 2), np.nan), np.full(2, np.nan)
    # Half a level of overshoot is rounding; the comparison is false for NaN.
    if not np.all((pixels >= -0.5) & (pixels <= 255.5)):
        return *nothing, MacenkoStatus.NON_FINITE
    od = -np.log((pixels + 1) / Io)
    is_tissue = ~np.any(od < beta, axis=1)
    tissue, weights = od[is_tissue], None if counts is None else counts[is_tissue]
    if (len(tissue) if weights is None else weights.sum()) < MIN_TISSUE_PIXELS:
        return *nothing, MacenkoStatus.TOO_FEW_TISSUE_PIXELS
    eigenvalues, eigenvectors = np.linalg.eigh(np.cov(tissue.T, fweights=weights))
    if eigenvalues[1] <= RANK_TOLERANCE * np.average(np.sum(tissue**2, axis=1), weights=weights):
        return *nothing, MacenkoStatus.RANK_DEFICIENT
    plane = canonical_signs(eigenvectors[:, 1:3], np.average(tissue, axis=0, weights=weights))
    projected = tissue @ plane
    phi = np.arctan2(projected[:, 1], projected[:, 0])
    angles = quantiles(phi, (alpha, 100 - alpha), percentile, weights)
    stain = in_order([plane @ [np.cos(angle), np.sin(angle)] for angle in angles])
    if not np.linalg.det(stain.T @ stain) > RANK_TOLERANCE:
        return *nothing, MacenkoStatus.RANK_DEFICIENT
    concentration = np.linalg.lstsq(stain, od.T, rcond=None)[0]
    maximum = np.array([quantiles(row, (99,), percentile, counts)[0] for row in concentration])
    if not np.all(maximum > MIN_CONCENTRATION):
        return *nothing, MacenkoStatus.ZERO_CONCENTRATION
    return stain, maximum, MacenkoStatus.OK


def in_order(pair: list[np.ndarray]) -> np.ndarray:
    """Two stain vectors as columns [3, 2], haematoxylin first.

    It absorbs more red; of two that absorb as much red it absorbs less green; then more blue.
    """
    red, green, blue = pair[0] - pair[1]
    without_red = green < 0 if abs(green) > EQUAL_COMPONENTS else blue > 0
    first = red > 0 if abs(red) > EQUAL_COMPONENTS else without_red
    return np.array(pair if first else pair[::-1]).T


def canonical_signs(plane: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Eigenvectors [3, 2] of ascending eigenvalue with signs such that the angles of tissue keep off the cut of atan2.

    The second column points towards the mean optical density, so angles lie around +π/2; the first has a red component
    that is not negative.
    """
    first = -1.0 if plane[0, 0] < 0 else 1.0
    second = -1.0 if mean @ plane[:, 1] < 0 else 1.0
    return plane * np.array([first, second])


def quantiles(
    values: np.ndarray, percents: tuple[float, ...], percentile: str, counts: np.ndarray | None = None
) -> list[float]:
    """Percentiles, interpolated as NumPy does ("linear") or by the rule k = 1 + round(0.01 q (n - 1)) ("nearest").

    With `counts` of the numbers in which values[i] occurs counts[i] times.
    """
    if counts is not None:
        return [_counted_quantile(values, counts, q, percentile) for q in percents]
    if percentile == "linear":
        return [float(np.percentile(values, q)) for q in percents]
    ranks = [round(0.01 * float(q) * (len(values) - 1)) for q in percents]
    ordered = np.partition(values, ranks)
    return [float(ordered[rank]) for rank in ranks]


def _counted_quantile(values: np.ndarray, counts: np.ndarray, percent: float, percentile: str) -> float:
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


def reconstruct_pixels(
    pixels: np.ndarray,
    source_stain: np.ndarray,
    source_max: np.ndarray,
    target_stain: np.ndarray,
    target_max: np.ndarray,
    *,
    Io: float,
) -> np.ndarray:
    """Grey levels [3, n] of the pixels [n, 3] with the source's stains replaced by the target's.

    A pixel without a finite optical density comes out as NaN and touches no other.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        od = -np.log((pixels + 1) / Io)
    defined = np.all(np.isfinite(od), axis=1)
    concentration = np.linalg.lstsq(source_stain, od[defined].T, rcond=None)[0]
    concentration /= (source_max / target_max)[:, None]
    levels = np.full((3, len(pixels)), np.nan)
    levels[:, defined] = np.minimum(Io * np.exp(-target_stain @ concentration), 255)
    return levels
