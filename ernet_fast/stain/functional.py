"""Macenko stain normalisation of batches: fit and normalise.

M. Macenko et al., "A method for normalizing histology slides for quantitative analysis", ISBI 2009, with the constants
and
conventions of the torchstain package: optical density OD = -ln((I + 1) / Io), tissue = all three ODs at least beta,
stains = the directions at the alpha-th and (100 - alpha)-th percentile of the angle in the plane of the two largest
principal components, haematoxylin the one with more red, concentrations by least squares, scaled by their 99th
percentiles.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ernet_fast.stain import _ops
from ernet_fast.stain.layout import ImageBatch, read_images
from ernet_fast.stain.parameters import check_parameters, check_policy
from ernet_fast.stain.result import MacenkoFit, MacenkoStatus, check_fit, describe_failures, expand_fit


def macenko_fit(
    images: Any,
    *,
    Io: float = 240,
    alpha: float = 1,
    beta: float = 0.15,
    percentile: str = "linear",
    range: float = 255,
    layout: str | None = None,
) -> MacenkoFit:
    """Stain matrix and maximal concentrations of every image.

    Args:
        images: RGB images, torch tensor or NumPy array, uint8 or floating point, [3, H, W], [H, W, 3] or a batch of
            either. They are read in place where they are dense (contiguous or channels-last), and never modified.
        Io: transmitted light, grey level of an empty slide.
        alpha: percentile of the angles taken as the extreme directions, in percent.
        beta: least optical density (natural logarithm) of a tissue pixel, in each channel.
        percentile: "linear" interpolates between order statistics (torchstain's NumPy backend); "nearest" takes the one
            at k = 1 + round(0.01 q (n - 1)) (its torch backend).
        range: the value that stands for 255 in floating-point images: 255 or, for images in [0, 1], 1. uint8 images
            ignore it.
        layout: "CHW" or "HWC", needed only for shapes that fit both.

    Returns:
        MacenkoFit of B images on the device of `images`. Images that cannot be fitted have a status other than OK and
        NaN elsewhere; they change nothing for the others.

    Raises:
        TypeError: no array, or a dtype that holds no RGB image.
        ValueError: a shape, a parameter or a stated range that cannot be meant.
    """
    check_parameters(Io, alpha, beta, percentile)
    batch = read_images(images, layout)
    check_range(batch.pixels, range)
    return _ops.fit(batch.pixels, float(Io), float(alpha), float(beta), percentile == "nearest", float(range))


def macenko_normalize(
    images: Any,
    target: MacenkoFit,
    source: MacenkoFit | None = None,
    *,
    Io: float = 240,
    alpha: float = 1,
    beta: float = 0.15,
    percentile: str = "linear",
    on_degenerate: str = "reference",
    range: float = 255,
    layout: str | None = None,
    return_status: bool = False,
) -> Any:
    """Images with their stains replaced by those of `target`: I' = Io exp(-HE_target diag(max_target / max_source) C).

    Gradients flow to floating-point images through the reconstruction, with stains that were estimated held constant,
    and to stains given as `source` or `target`.

    Args:
        images: as in `macenko_fit`.
        target: the stains to give every image (B = 1) or each (B images).
        source: the stains the images have, if they are known already, e.g. those of a whole slide; estimated by
            default.
        Io: as in `macenko_fit`.
        alpha: as in `macenko_fit`.
        beta: as in `macenko_fit`.
        percentile: as in `macenko_fit`.
        range: as in `macenko_fit`.
        layout: as in `macenko_fit`.
        on_degenerate: what to do with an image whose stains cannot be estimated: "reference" takes it to be stained as
            the target, "identity" returns it as it is, "raise" raises.
        return_status: also return the status [B] int32 of the source fit.

    Returns:
        Images of the input's shape, layout, dtype and kind of array; uint8 values are truncated as torchstain does. A
        pixel without a finite optical density comes out as NaN. With `return_status` a pair (images, status).

    Raises:
        TypeError, ValueError: as in `macenko_fit`; ValueError for a target that is not finite.
        ValueError: `on_degenerate="raise"` and an image cannot be fitted; the message lists all such images and
            reasons.
    """
    check_parameters(Io, alpha, beta, percentile)
    check_policy(on_degenerate)
    batch = read_images(images, layout)
    check_range(batch.pixels, range)
    numbers = float(Io), float(alpha), float(beta), percentile == "nearest"
    count = batch.pixels.shape[0]
    target = check_fit(target, count, "target")
    check_target(target)
    if source is None and on_degenerate != "raise":
        done = _ops.normalize(batch.pixels, target, *numbers, on_degenerate == "identity", float(range))
        if done is not None:
            return _result(batch, done[0], done[1].status, return_status)
    if source is None:
        source = _ops.fit(batch.pixels, *numbers, float(range))
    known = on_device(expand_fit(source, count, "source"), batch.pixels.device)
    if on_degenerate == "raise" and (failures := describe_failures(known.status)):
        raise ValueError(
            f"these images cannot be normalised: {failures}. "
            "Leave them out, or choose on_degenerate='reference' or 'identity'."
        )
    wanted = on_device(expand_fit(target, count, "target"), batch.pixels.device)
    out = _ops.reconstruct(batch.pixels, usable_source(known, wanted), wanted, float(Io), float(range))
    if on_degenerate == "identity":
        out = keep_degenerate(out, batch.pixels, known.status)
    return _result(batch, out, known.status, return_status)


def usable_source(source: MacenkoFit, target: MacenkoFit) -> MacenkoFit:
    """`source`, with the stains of `target` where it has a status other than OK."""
    ok = source.status == MacenkoStatus.OK
    return MacenkoFit(
        torch.where(ok[:, None, None], source.stain_matrix, target.stain_matrix),
        torch.where(ok[:, None], source.max_concentration, target.max_concentration),
        torch.zeros_like(source.status),
    )


def keep_degenerate(out: torch.Tensor, images: torch.Tensor, status: torch.Tensor) -> torch.Tensor:
    """`out` [B, 3, H, W], with the input itself where the status is not OK."""
    return torch.where((status == MacenkoStatus.OK)[:, None, None, None], out, images)


def check_target(target: MacenkoFit) -> None:
    """Raise ValueError for stains that are not finite; those on a GPU are not looked at, as that would wait for it."""
    for part, name in ((target.stain_matrix, "stain_matrix"), (target.max_concentration, "max_concentration")):
        # A sum is not finite if any of its terms is not, and is one operation.
        if part.device.type == "cpu" and not math.isfinite(part.detach().sum().item()):
            raise ValueError(
                f"target.{name} is not finite: {describe_failures(target.status.reshape(-1)) or 'it was not fitted'}. "
                "Fit the target on an image with tissue."
            )


def check_range(pixels: torch.Tensor, range: float) -> None:
    """Raise ValueError if `range` cannot be what was meant for these floating-point pixels [B, 3, H, W].

    Values are looked at on the CPU only. Beyond the range they give images the status NON_FINITE, on every device.
    """
    if isinstance(range, bool) or not isinstance(range, (int, float)):
        raise TypeError(f"range is {range!r}; expected a number.")
    if not (math.isfinite(range) and range > 0):
        raise ValueError(f"range={range!r}; expected the positive value that stands for 255.")
    if pixels.dtype == torch.uint8 or pixels.device.type != "cpu" or pixels.numel() == 0:
        return
    if range >= 2:
        largest = float(pixels.detach().amax())
        if 0 < largest <= 1:
            raise ValueError(
                f"images hold values up to {largest:.3g}, but range={range:g} was stated; "
                "pass range=1 for images in [0, 1]."
            )
    else:
        finite = pixels.detach().nan_to_num(0.0, 0.0, 0.0)
        value, index = finite.flatten(1).amax(dim=1).max(dim=0)
        if float(value) > 2 * range:
            raise ValueError(
                f"image {int(index)} holds values up to {float(value):.4g}, but range={range:g} was stated; "
                "pass range=255 for images in [0, 255]."
            )


def on_device(fit: MacenkoFit, device: torch.device) -> MacenkoFit:
    """`fit` with its tensors on `device`."""
    return MacenkoFit(*(part.to(device) for part in fit))


def _result(batch: ImageBatch, images: torch.Tensor, status: torch.Tensor, return_status: bool) -> Any:
    restored = batch.restore(images)
    return (restored, status) if return_status else restored
