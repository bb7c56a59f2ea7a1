"""What a Macenko fit returns, and the thresholds below which there is nothing to fit."""

from __future__ import annotations

import math
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

EQUAL_COMPONENTS = 1e-6
"""Components of two unit stain vectors that are at most this far apart are equal: they differ by rounding."""

DEFAULT_STAINS = ((0.5626, 0.2159), (0.7201, 0.8012), (0.4062, 0.5581))
DEFAULT_MAXIMA = (1.9705, 1.0308)
"""The stains published with Macenko's method, for images that have none of their own."""


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


OK = int(MacenkoStatus.OK)
"""To compare status tensors with: torch.compile does not trace the comparison with an enumeration."""

_REASONS = {
    MacenkoStatus.OK: "fitted",
    MacenkoStatus.TOO_FEW_TISSUE_PIXELS: f"fewer than {MIN_TISSUE_PIXELS} tissue pixels",
    MacenkoStatus.RANK_DEFICIENT: "the tissue colours lie on one line, so there are no two stains to find",
    MacenkoStatus.ZERO_CONCENTRATION: "a stain's 99th percentile concentration is not positive",
    MacenkoStatus.NON_FINITE: "a pixel value is NaN, infinite or outside the stated range",
}


class MacenkoFit(NamedTuple):
    """Stains of B images.

    Haematoxylin is the stain that absorbs more red. Of two that absorb as much red (to 1e-6) it is the one that absorbs
    less green; of two that absorb as much of both, the one that absorbs more blue.

    Attributes:
        stain_matrix: [B, 3, 2] float64, optical density (natural logarithm) of haematoxylin and eosin, unit columns.
        max_concentration: [B, 2] float64, 99th percentile of the concentration of each.
        status: [B] int32, `MacenkoStatus`. Where it is not OK the other two hold NaN.
    """

    stain_matrix: torch.Tensor
    max_concentration: torch.Tensor
    status: torch.Tensor


def no_fit(count: int, status: MacenkoStatus, device: torch.device | str) -> MacenkoFit:
    """`count` images of this status."""
    stain, maximum = (
        torch.full((count, *size), math.nan, dtype=torch.float64, device=device) for size in ((3, 2), (2,))
    )
    return MacenkoFit(stain, maximum, torch.full((count,), int(status), dtype=torch.int32, device=device))


def check_fit(fit: MacenkoFit, count: int, name: str) -> MacenkoFit:
    """`fit` with a batch dimension; TypeError or ValueError if it is not that of one or `count` images."""
    if not isinstance(fit, tuple) or len(fit) != 3 or not all([isinstance(part, torch.Tensor) for part in fit]):
        raise TypeError(f"{name} is a {type(fit).__name__}; expected the MacenkoFit that macenko_fit returns.")
    stain, maximum, status = fit
    if type(fit) is MacenkoFit and stain.shape == (1, 3, 2) and maximum.shape == (1, 2) and status.shape == (1,):
        return fit  # as nearly all are
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


_PUBLISHED = MacenkoFit(
    torch.tensor([DEFAULT_STAINS], dtype=torch.float64, device="cpu"),
    torch.tensor([DEFAULT_MAXIMA], dtype=torch.float64, device="cpu"),
    torch.zeros(1, dtype=torch.int32, device="cpu"),
)


def published_stains() -> MacenkoFit:
    """As the fit of one image, on the CPU; not to be written to."""
    return _PUBLISHED
