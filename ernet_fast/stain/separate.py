"""Haematoxylin and eosin of each image: as two images and as concentrations."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from ernet_fast.stain import operators, pipeline
from ernet_fast.stain.collection import Part
from ernet_fast.stain.options import Options
from ernet_fast.stain.result import MacenkoFit, published_stains
from ernet_fast.stain.torch_backend import concentration_rows
from ernet_fast.stain.upload import is_readable


class Separation(NamedTuple):
    """What `separate` finds in B images; a list each where a list was given.

    Attributes:
        haematoxylin: images of the input's form with haematoxylin alone.
        eosin: images of the input's form with eosin alone.
        concentrations: [B, 2, H, W], haematoxylin and eosin in units of optical density; [B, H, W, 2] for images
            [B, H, W, 3], without B for a single image. float64 for float64 images, else float32.
        status: [B] int32, `MacenkoStatus` of the fit.
    """

    haematoxylin: Any
    eosin: Any
    concentrations: Any
    status: torch.Tensor


def separate(
    images: Any,
    source: MacenkoFit | None = None,
    *,
    target: MacenkoFit | None = None,
    Io: float = 240,
    alpha: float = 1,
    beta: float = 0.15,
    percentile: str = "linear",
    on_degenerate: str = "reference",
    range: float = 255,
    layout: str | None = None,
    mask: Any = None,
) -> Separation:
    """Split images into their two stains: C = pinv(HE) OD, and I_s = Io exp(-HE_s C_s) for either stain s.

    Args:
        images: as in `macenko_fit`.
        source: stains of the images if they are known; estimated by default.
        target: draw both images with these stains, and scale the concentrations to their maxima, C max_target /
            max_source, as normalisation does. By default images keep their own stains and concentrations.
        Io: as in `macenko_fit`.
        alpha: as in `macenko_fit`.
        beta: as in `macenko_fit`.
        percentile: as in `macenko_fit`.
        range: as in `macenko_fit`.
        layout: as in `macenko_fit`.
        mask: as in `macenko_fit`: where to look for the source stains. Every pixel is separated.
        on_degenerate: "reference" takes an image whose stains cannot be estimated to be stained as `target`, or as
            published with Macenko's method without one; "raise" raises.

    Returns:
        Separation. A pixel without a finite optical density holds NaN where the dtype has it. Gradients flow to
        floating-point images and to given stains.

    Raises:
        TypeError, ValueError: as in `macenko_normalize`.
    """
    options = Options(Io, alpha, beta, percentile, on_degenerate, range, layout)
    if options.identity:
        raise ValueError(
            f"on_degenerate={on_degenerate!r}; separate takes 'reference' or 'raise', as an image is neither of its "
            "stains."
        )
    collection = pipeline.read(images, options)
    found = pipeline.sources(collection, source, mask, published_stains() if target is None else target, options)
    drawn = found.usable if target is None else found.reference
    whole = [
        _separate(part, part.take_fit(found.usable), part.take_fit(drawn), target is not None, options)
        for part in collection.parts
    ]
    haematoxylin, eosin, concentrations = collection.restore_each(whole, 3)
    return Separation(haematoxylin, eosin, concentrations, found.known.status)


def _separate(
    part: Part, source: MacenkoFit, drawn: MacenkoFit, scaled: bool, options: Options
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    done = operators.separate(part.pixels, source, drawn, scaled, options)
    if done is not None:
        return done
    amounts = _concentrations(part.pixels, source.stain_matrix, options.Io, options.range)
    if scaled:
        gain = drawn.max_concentration / source.max_concentration
        amounts = amounts * gain[:, :, None, None].to(amounts.dtype)
    return (*operators.stains_alone(part.pixels, source, drawn, options), amounts)


LARGE_ROWS = 64.0
"""Above it the terms of a concentration cancel too far for float32: stains of nearly one direction."""


def _concentrations(images: torch.Tensor, stain: torch.Tensor, Io: float, range: float) -> torch.Tensor:
    """pinv(HE) OD of images [b, 3, H, W] and stains [b, 3, 2]: [b, 2, H, W]."""
    dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
    rows = concentration_rows(stain)
    amounts = _products(images, rows, Io, range, dtype)
    large = rows.detach().abs().amax(dim=(1, 2)) > LARGE_ROWS
    # on a device the host does not wait for the answer and computes both
    if dtype == torch.float32 and is_readable(large) and (operators.is_composed(images) or large.any()):
        # of each image by itself, whose bits do not depend on the others
        amounts = torch.where(large[:, None, None, None], _products(images, rows, Io, range, torch.float64), amounts)
    return amounts.to(dtype)


def _products(images: torch.Tensor, rows: torch.Tensor, Io: float, range: float, dtype: torch.dtype) -> torch.Tensor:
    scale = 1.0 if images.dtype == torch.uint8 else 255 / range
    od = -((images.to(dtype) * scale + 1) / Io).log()
    rows = rows.to(dtype)[..., None, None]
    # Three terms written out: a matrix product may round otherwise for another number of images.
    amounts = rows[:, :, 0] * od[:, :1] + rows[:, :, 1] * od[:, 1:2] + rows[:, :, 2] * od[:, 2:]
    if images.dtype == torch.uint8:
        return amounts
    return amounts.where(od.isfinite().all(dim=1, keepdim=True), math.nan)
