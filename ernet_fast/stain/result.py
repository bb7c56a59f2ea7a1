"""What a Macenko fit returns, and the thresholds below which there is nothing to fit."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import torch

MIN_TISSUE_PIXELS = 10
"""Fewest tissue pixels of a fit: with fewer, a percentile of the angles is just one of the pixels."""

RANK_TOLERANCE = 1e-10
"""A covariance is rank deficient if its second eigenvalue is at most this times the mean squared OD, and two stains are
one if the squared sine of the angle between them is at most this."""

MIN_CONCENTRATION = 1e-6
"""Least 99th percentile of a stain's concentration, in units of optical density: the reconstruction divides by it."""


class MacenkoStatus(IntEnum):
    """Why an image could not be fitted, or OK. The first reason in the order 4, 1, 2, 3 is given."""

    OK = 0
    TOO_FEW_TISSUE_PIXELS = 1
    RANK_DEFICIENT = 2
    ZERO_CONCENTRATION = 3
    NON_FINITE = 4

    @property
    def reason(self) -> str:
        """One phrase for error messages."""
        return _REASONS[self]


_REASONS = {
    MacenkoStatus.OK: "fitted",
    MacenkoStatus.TOO_FEW_TISSUE_PIXELS: f"fewer than {MIN_TISSUE_PIXELS} tissue pixels",
    MacenkoStatus.RANK_DEFICIENT: "the tissue colours lie on one line, so there are no two stains to find",
    MacenkoStatus.ZERO_CONCENTRATION: "a stain's 99th percentile concentration is not positive",
    MacenkoStatus.NON_FINITE: "a pixel value is NaN, infinite or outside the stated range",
}


class MacenkoFit(NamedTuple):
    """Stains of B images.

    Attributes:
        stain_matrix: [B, 3, 2] float64, optical density (natural logarithm) of haematoxylin and eosin, unit columns.
        max_concentration: [B, 2] float64, 99th percentile of the concentration of each.
        status: [B] int32, `MacenkoStatus`. Where it is not OK the other two hold NaN.
    """

    stain_matrix: torch.Tensor
    max_concentration: torch.Tensor
    status: torch.Tensor


def check_fit(fit: MacenkoFit, count: int, name: str) -> MacenkoFit:
    """`fit` with a batch dimension, for one or `count` images.

    Raises:
        TypeError: no MacenkoFit.
        ValueError: a shape that is neither one image's nor `count` images'.
    """
    if not isinstance(fit, tuple) or len(fit) != 3 or not all(isinstance(part, torch.Tensor) for part in fit):
        raise TypeError(f"{name} is a {type(fit).__name__}; expected the MacenkoFit that macenko_fit returns.")
    stain, maximum, status = fit
    stain = stain.unsqueeze(0) if stain.ndim == 2 else stain
    maximum = maximum.unsqueeze(0) if maximum.ndim == 1 else maximum
    status = status.unsqueeze(0) if status.ndim == 0 else status
    size = stain.shape[0] if stain.ndim == 3 else -1
    if stain.shape != (size, 3, 2) or maximum.shape != (size, 2) or status.shape != (size,) or size not in (1, count):
        raise ValueError(
            f"{name} has stain_matrix {tuple(fit[0].shape)}, max_concentration {tuple(fit[1].shape)} and status "
            f"{tuple(fit[2].shape)}; expected [B, 3, 2], [B, 2] and [B] with B = 1 or {count}."
        )
    return MacenkoFit(stain, maximum, status)


def expand_fit(fit: MacenkoFit, count: int, name: str) -> MacenkoFit:
    """`fit` for `count` images, float64: one image's stains serve all. Raises as `check_fit`."""
    stain, maximum, status = check_fit(fit, count, name)
    return MacenkoFit(
        stain.double().expand(count, 3, 2), maximum.double().expand(count, 2), status.to(torch.int32).expand(count)
    )


def describe_failures(status: torch.Tensor) -> str | None:
    """Which images have a status other than OK, and why; None if all are OK. Reads the status from its device."""
    bad = [(i, MacenkoStatus(value)) for i, value in enumerate(status.tolist()) if value != MacenkoStatus.OK]
    if not bad:
        return None
    listed = [f"image {i}: {reason.reason}" for i, reason in bad[:20]]
    if len(bad) > 20:
        listed.append(f"and {len(bad) - 20} more")
    return "; ".join(listed)
