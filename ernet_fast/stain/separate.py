"""Haematoxylin and eosin of each image: as two images and as concentrations."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from ernet_fast.stain import operators
from ernet_fast.stain.collection import read_collection
from ernet_fast.stain.functional import (
    check_range,
    check_target,
    known_source,
    on_device,
    refuse_failures,
    usable_source,
)
from ernet_fast.stain.options import check_parameters
from ernet_fast.stain.published import published_stains
from ernet_fast.stain.result import MacenkoFit, check_fit, expand_fit
from ernet_fast.stain.torch_backend import concentration_rows


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
    check_parameters(Io, alpha, beta, percentile)
    if on_degenerate not in ("reference", "raise"):
        raise ValueError(
            f"on_degenerate={on_degenerate!r}; separate takes 'reference' or 'raise', as an image is neither of its "
            "stains."
        )
    collection = read_collection(images, layout)
    check_range(collection, range)
    if target is not None:
        check_target(check_fit(target, collection.count, "target"))
    known = known_source(collection, source, mask, Io, alpha, beta, percentile, range)
    refuse_failures(known.status, on_degenerate)
    fallback = expand_fit(published_stains() if target is None else target, collection.count, "target")
    fallback = on_device(fallback, collection.device)
    usable = usable_source(known, fallback)
    drawn = usable if target is None else fallback
    haematoxylin: list[torch.Tensor] = []
    eosin: list[torch.Tensor] = []
    concentrations: list[torch.Tensor] = []
    for part in collection.parts:
        ours, theirs = part.take_fit(usable), part.take_fit(drawn)
        if operators.served_on_cuda(part.pixels) and not any(
            tensor.requires_grad for tensor in (*ours[:2], *theirs[:2])
        ):
            whole = operators.separate(part.pixels, ours, theirs, target is not None, float(Io), float(range))
            for results, result in zip((haematoxylin, eosin, concentrations), whole, strict=True):
                results.append(result)
            continue
        for stain, kept in ((haematoxylin, (1.0, 0.0)), (eosin, (0.0, 1.0))):
            alone = one_stain(theirs, kept)
            stain.append(operators.reconstruct(part.pixels, ours, alone, float(Io), float(range)))
        amounts = _concentrations(part.pixels, ours.stain_matrix, float(Io), float(range))
        gain = theirs.max_concentration / ours.max_concentration
        concentrations.append(amounts if target is None else amounts * gain[:, :, None, None].to(amounts.dtype))
    return Separation(
        collection.restore(haematoxylin), collection.restore(eosin), collection.restore(concentrations), known.status
    )


def one_stain(fit: MacenkoFit, kept: tuple[float, float]) -> MacenkoFit:
    """`fit` with the concentration of the stain that is not kept multiplied by nothing."""
    maxima = [fit.max_concentration[:, i] * share for i, share in enumerate(kept)]
    return fit._replace(max_concentration=torch.stack(maxima, dim=1))


def _concentrations(images: torch.Tensor, stain: torch.Tensor, Io: float, range: float) -> torch.Tensor:
    """pinv(HE) OD of images [b, 3, H, W] and stains [b, 3, 2]: [b, 2, H, W]."""
    dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
    scale = 1.0 if images.dtype == torch.uint8 else 255 / range
    od = -((images.to(dtype) * scale + 1) / Io).log()
    rows = concentration_rows(stain).to(dtype)[..., None, None]
    # Three terms written out: a matrix product may round otherwise for another number of images.
    amounts = rows[:, :, 0] * od[:, :1] + rows[:, :, 1] * od[:, 1:2] + rows[:, :, 2] * od[:, 2:]
    if images.dtype == torch.uint8:
        return amounts
    return amounts.where(od.isfinite().all(dim=1, keepdim=True), math.nan)
