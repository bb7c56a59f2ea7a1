"""What normalisation, augmentation, separation and fits share: images in parts, the stains that they have, and the
policy for images without.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ernet_fast.stain import operators
from ernet_fast.stain.collection import Collection, Part, read_collection
from ernet_fast.stain.options import Options
from ernet_fast.stain.result import OK, RANK_TOLERANCE, MacenkoFit, check_fit, describe_failures, expand_fit
from ernet_fast.stain.tissue_mask import fit_inside
from ernet_fast.stain.upload import is_readable, to_device


def read(images: Any, options: Options) -> Collection:
    """See images as parts, of values that `options.range` can stand for."""
    collection = read_collection(images, options.layout)
    check_range(collection, options.range)
    return collection


def fit(collection: Collection, options: Options, mask: Any = None) -> MacenkoFit:
    """The stains of every image, of the pixels in its mask."""
    if mask is not None:
        return fit_inside(collection, mask, options)
    return collection.gather_fit([operators.fit(part.pixels, options) for part in collection.parts])


class Sources(NamedTuple):
    """Stains of every image of a collection, on its device."""

    known: MacenkoFit  # as given or estimated
    usable: MacenkoFit  # the same, with the stains of `reference` where the status is not OK
    reference: MacenkoFit


def sources(
    collection: Collection, source: MacenkoFit | None, mask: Any, reference: MacenkoFit, options: Options
) -> Sources:
    """The stains that images have, or are taken to have: ValueError where they cannot, or the policy is "raise"."""
    reference = check_fit(reference, collection.count, "target")
    check_target(reference)
    if source is None:
        known = fit(collection, options, mask)
    else:
        check_no_mask(mask)
        source = check_fit(source, collection.count, "source")
        check_source(source)
        known = on_device(expand_fit(source, collection.count, "source"), collection.device)
    refuse_failures(known.status, options.on_degenerate)
    reference = on_device(expand_fit(reference, collection.count, "target"), collection.device)
    return Sources(known, usable_source(known, reference), reference)


def changed(
    collection: Collection,
    source: MacenkoFit | None,
    mask: Any,
    reference: MacenkoFit,
    options: Options,
    fused: Callable[[Part], tuple[torch.Tensor, MacenkoFit] | None],
    apart: Callable[[Part, MacenkoFit, MacenkoFit], torch.Tensor],
    kept: Callable[[torch.Tensor], torch.Tensor] = lambda pixels: pixels,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Results of every part, and the status of all images.

    `fused(part)` fits and reconstructs in one operator; it is not asked where stains are given or looked for in a mask,
    or the policy has to see the status first. There, and where it gives None, it is `apart(part, its stains, the
    reference's)`, and under the policy "identity" `kept(pixels)` for images without a fit.
    """
    if source is None and mask is None and options.on_degenerate != "raise":
        done = []
        for part in collection.parts:
            result = fused(part)
            if result is None:
                break
            done.append(result)
        else:
            return [out for out, _ in done], collection.gather_fit([fit for _, fit in done]).status
    found = sources(collection, source, mask, reference, options)
    results = []
    for part in collection.parts:
        out = apart(part, part.take_fit(found.usable), part.take_fit(found.reference))
        if options.identity:
            out = keep_degenerate(out, kept(part.pixels), part.take(found.known.status))
        results.append(out)
    return results, found.known.status


def check_no_mask(mask: Any) -> None:
    """Raise ValueError for a mask beside a given source."""
    if mask is not None:
        raise ValueError("mask says where to look for the source stains, but source gives them; pass one of the two.")


def refuse_failures(status: torch.Tensor, on_degenerate: str) -> None:
    """Raise ValueError under the policy "raise" if an image could not be fitted."""
    if on_degenerate == "raise" and (failures := describe_failures(status)):
        raise ValueError(
            f"these images cannot be normalised: {failures}. "
            "Leave them out, or choose on_degenerate='reference' or 'identity'."
        )


def usable_source(source: MacenkoFit, target: MacenkoFit) -> MacenkoFit:
    """`source`, with the stains of `target` where it has a status other than OK."""
    if is_readable(source.status) and not source.status.any():
        return source
    ok = source.status == OK
    return MacenkoFit(
        torch.where(ok[:, None, None], source.stain_matrix, target.stain_matrix),
        torch.where(ok[:, None], source.max_concentration, target.max_concentration),
        torch.zeros_like(source.status),
    )


def keep_degenerate(out: torch.Tensor, images: torch.Tensor, status: torch.Tensor) -> torch.Tensor:
    """`out` [B, 3, H, W], with the input itself where the status is not OK; `out` is overwritten where it may be."""
    if is_readable(status):
        kept = (status != OK).nonzero().flatten().tolist()
        if not kept:
            return out
        if not out.is_floating_point():  # no derivative is taken of integers, and fresh memory would cost a pass
            for index in kept:
                out[index] = images[index]
            return out
    return torch.where((status == OK)[:, None, None, None], out, images)


def check_target(target: MacenkoFit) -> None:
    """Raise ValueError for stains that are not finite; where they are not readable (a GPU) they are not looked at."""
    for part, name in ((target.stain_matrix, "stain_matrix"), (target.max_concentration, "max_concentration")):
        # Over the few numbers of a target a loop is faster than an operation.
        if is_readable(part) and not all(map(math.isfinite, part.detach().flatten().tolist())):
            raise ValueError(
                f"target.{name} is not finite: {describe_failures(target.status.reshape(-1)) or 'it was not fitted'}. "
                "Fit the target on an image with tissue."
            )


def check_source(source: MacenkoFit) -> None:
    """Raise ValueError for given stains of status OK that no image can have; unreadable ones are not looked at."""
    if not all(is_readable(part) for part in source):
        return
    for i, (stain, maximum, status) in enumerate(zip(*(part.detach().tolist() for part in source), strict=True)):
        if status != OK:
            continue
        h, e = zip(*stain, strict=True)
        hh, ee, he = (sum(map(operator.mul, a, b)) for a, b in ((h, h), (e, e), (h, e)))
        if not all(map(math.isfinite, (*h, *e, *maximum))):
            found = "is not finite, though its status is OK"
        elif min(maximum) <= 0:
            found = f"has max_concentration {tuple(maximum)}; expected positive numbers"
        elif hh * ee - he * he <= RANK_TOLERANCE / 2 * hh * ee:  # half of it leaves room for rounding
            found = "has two columns of one direction in stain_matrix"
        else:
            continue
        raise ValueError(f"source of image {i} {found}. Take it from macenko_fit, or leave source out.")


def check_range(collection: Collection, range: float) -> None:
    """Raise ValueError if readable floating-point values contradict `range`.

    Dark images among brighter ones are dark images, in a list as in a batch.
    """
    largest = 0.0
    for part in collection.parts:
        pixels = part.pixels
        if pixels.dtype == torch.uint8 or not is_readable(pixels) or pixels.numel() == 0:
            continue
        found = float(pixels.detach().amax())  # NaN where any value is; unlike max it copies nothing
        if range >= 2:
            largest = max(largest, found)  # a NaN, which is not larger, says nothing
        elif not found <= 2 * range:
            _check_unit_range(part, range)
    if 0 < largest <= 1:
        raise ValueError(
            f"images hold values up to {largest:.3g}, but range={range:g} was stated; "
            "pass range=1 for images in [0, 1]."
        )


def _check_unit_range(part: Part, range: float) -> None:
    """Raise ValueError for an image that holds finite values far beyond `range`, below 2."""
    finite = part.pixels.detach().nan_to_num(0.0, 0.0, 0.0)
    value, which = finite.flatten(1).amax(dim=1).max(dim=0)
    if float(value) > 2 * range:
        number = int(which) if part.index is None else part.index[int(which)]
        raise ValueError(
            f"image {number} holds values up to {float(value):.4g}, but range={range:g} was stated; "
            "pass range=255 for images in [0, 255]."
        )


def on_device(fit: MacenkoFit, device: torch.device) -> MacenkoFit:
    """`fit` with its tensors on `device`."""
    return MacenkoFit(*(to_device(part, device) for part in fit))
