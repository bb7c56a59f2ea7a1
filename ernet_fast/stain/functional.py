"""Macenko stain normalisation of batches: fit and normalise.

M. Macenko et al., "A method for normalizing histology slides for quantitative analysis", ISBI 2009, with the constants
and conventions of the torchstain package: optical density OD = -ln((I + 1) / Io), tissue = all three ODs at least beta,
stains = the directions at the alpha-th and (100 - alpha)-th percentile of the angle in the plane of the two largest
principal components, haematoxylin the one with more red, concentrations by least squares, scaled by their 99th
percentiles.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch

from ernet_fast.stain import operators
from ernet_fast.stain.collection import Collection, Part, read_collection
from ernet_fast.stain.network_output import NetworkOutput, normalize_scaled, read_output, reconstruct_scaled, scale
from ernet_fast.stain.options import check_parameters, check_policy, is_number
from ernet_fast.stain.result import MacenkoFit, MacenkoStatus, check_fit, describe_failures, expand_fit
from ernet_fast.stain.tissue_mask import fit_pixels_inside, read_masks
from ernet_fast.stain.upload import to_device


def macenko_fit(
    images: Any,
    *,
    Io: float = 240,
    alpha: float = 1,
    beta: float = 0.15,
    percentile: str = "linear",
    range: float = 255,
    layout: str | None = None,
    mask: Any = None,
) -> MacenkoFit:
    """Stain matrix and maximal concentrations of every image.

    Args:
        images: RGB images, torch tensor or NumPy array, uint8 or floating point, [3, H, W], [H, W, 3] or a batch of
            either, or a list of single images of any sizes. They are read in place where they are dense (contiguous or
            channels-last), and never modified; small images of a list are copied once, stacked by shape.
        Io: transmitted light, grey level of an empty slide.
        alpha: percentile of the angles taken as the extreme directions, in percent.
        beta: least optical density (natural logarithm) of a tissue pixel, in each channel.
        percentile: "linear" interpolates between order statistics (torchstain's NumPy backend); "nearest" takes the one
            at k = 1 + round(0.01 q (n - 1)) (its torch backend).
        range: the value that stands for 255 in floating-point images: 255 or, for images in [0, 1], 1. uint8 images
            ignore it.
        layout: "CHW" or "HWC", needed only for shapes that fit both.
        mask: the pixels to look at, booleans [B, H, W] ([H, W] for a single image, a list of them for a list). Others
            count as if the image did not have them, for the stain directions and for the 99th percentiles; `beta`
            applies inside. The masked pixels are copied.

    Returns:
        MacenkoFit of B images on the device of `images`. Images that cannot be fitted have a status other than OK and
        NaN elsewhere; they change nothing for the others.

    Raises:
        TypeError: no array, or a dtype that holds no RGB image or mask.
        ValueError: a shape, a parameter or a stated range that cannot be meant.
    """
    check_parameters(Io, alpha, beta, percentile)
    collection = read_collection(images, layout)
    check_range(collection, range)
    return fit_collection(collection, mask, Io, alpha, beta, percentile, range)


def fit_collection(
    collection: Collection, mask: Any, Io: float, alpha: float, beta: float, percentile: str, range: float
) -> MacenkoFit:
    """`macenko_fit` of images that were read and checked."""
    numbers = float(Io), float(alpha), float(beta), percentile == "nearest", float(range)

    def fit(pixels: torch.Tensor) -> MacenkoFit:
        return operators.fit(pixels, *numbers)

    def fit_inside(pixels: torch.Tensor, inside: torch.Tensor) -> MacenkoFit | None:
        return operators.fit_inside(pixels, inside, *numbers)

    if mask is not None:
        return fit_pixels_inside(collection, read_masks(mask, collection), fit, fit_inside)
    return collection.gather_fit([fit(part.pixels) for part in collection.parts])


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
    mask: Any = None,
    output: str | torch.dtype = "image",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
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
        mask: as in `macenko_fit`: where to look for the source stains. Every pixel is normalised.
        on_degenerate: what to do with an image whose stains cannot be estimated: "reference" takes it to be stained as
            the target, "identity" returns it as it is, "raise" raises.
        output: "image" for images as they came, or torch.float32, bfloat16 or float16 for the input of a network,
            (I' / range - mean) / std, written in the same pass. 8-bit values are truncated first, so that images
            normalised beforehand and stored give the same.
        mean: red, green and blue mean of a network's input, of values in [0, 1]; 0 by default.
        std: its standard deviations; 1 by default.
        return_status: also return the status [B] int32 of the source fit.

    Returns:
        Images of the input's shape, layout, dtype and kind of array, a list for a list; uint8 values are truncated as
        torchstain does. A pixel without a finite optical density comes out as NaN. For a network a torch tensor
        [B, 3, H, W] in channels-last memory ([3, H, W] for a single image, a list of them for a list), whatever the
        input was. With `return_status` a pair (images, status).

    Raises:
        TypeError, ValueError: as in `macenko_fit`; ValueError for a target that is not finite, for a source of status
            OK that no image has (on the CPU, where it can be looked at), and for a mask beside a known source.
        ValueError: `on_degenerate="raise"` and an image cannot be fitted; the message lists all such images and
            reasons.
    """
    check_parameters(Io, alpha, beta, percentile)
    check_policy(on_degenerate)
    network = read_output(output, mean, std)
    collection = read_collection(images, layout)
    check_range(collection, range)
    target = check_fit(target, collection.count, "target")
    if source is None and mask is None and on_degenerate != "raise":
        choices = percentile == "nearest", on_degenerate == "identity"
        numbers = float(Io), float(alpha), float(beta), *choices, float(range)
        served = _fit_and_reconstruct(collection, target, network, numbers)
        if served is not None:
            return _result(collection, *served, return_status, network)
    check_target(target)
    source = known_source(collection, source, mask, Io, alpha, beta, percentile, range)
    refuse_failures(source.status, on_degenerate)
    wanted = on_device(expand_fit(target, collection.count, "target"), collection.device)
    usable = usable_source(source, wanted)
    results = []
    for part in collection.parts:
        arguments = part.pixels, part.take_fit(usable), part.take_fit(wanted), float(Io), float(range)
        out = operators.reconstruct(*arguments) if network is None else reconstruct_scaled(*arguments, network)
        if on_degenerate == "identity":
            unchanged = part.pixels if network is None else scale(part.pixels, network, float(range))
            out = keep_degenerate(out, unchanged, part.take(source.status))
        results.append(out)
    return _result(collection, results, source.status, return_status, network)


def _fit_and_reconstruct(
    collection: Collection, target: MacenkoFit, network: NetworkOutput | None, numbers: tuple[Any, ...]
) -> tuple[list[torch.Tensor], torch.Tensor] | None:
    """Results of every part and the status of all, by one operator a part; None where that operator does not serve."""
    if collection.device.type != "cpu":
        check_target(target)  # before it is on the device, where nobody looks
    results, fits = [], []
    for part in collection.parts:
        theirs = part.take_fit(target)
        try:
            if network is None:
                done = operators.normalize(part.pixels, theirs, *numbers)
            else:
                done = normalize_scaled(part.pixels, theirs, network, *numbers)
        except RuntimeError:
            check_target(target)  # the operator looks before it starts, at less cost, but knows no reason
            raise
        if done is None:
            return None
        results.append(done[0])
        fits.append(done[1])
    return results, collection.gather_fit(fits).status


def known_source(
    collection: Collection,
    source: MacenkoFit | None,
    mask: Any,
    Io: float,
    alpha: float,
    beta: float,
    percentile: str,
    range: float,
) -> MacenkoFit:
    """The stains of every image: `source` where given, else estimated."""
    if source is None:
        return fit_collection(collection, mask, Io, alpha, beta, percentile, range)
    if mask is not None:
        raise ValueError("mask says where to look for the source stains, but source gives them; pass one of the two.")
    else:
        source = check_fit(source, collection.count, "source")
        check_source(source)
    return on_device(expand_fit(source, collection.count, "source"), collection.device)


def refuse_failures(status: torch.Tensor, on_degenerate: str) -> None:
    """Raise ValueError under the policy "raise" if an image could not be fitted."""
    if on_degenerate == "raise" and (failures := describe_failures(status)):
        raise ValueError(
            f"these images cannot be normalised: {failures}. "
            "Leave them out, or choose on_degenerate='reference' or 'identity'."
        )


def usable_source(source: MacenkoFit, target: MacenkoFit) -> MacenkoFit:
    """`source`, with the stains of `target` where it has a status other than OK."""
    if _seen_to_be_fitted(source.status):
        return source
    ok = source.status == MacenkoStatus.OK
    return MacenkoFit(
        torch.where(ok[:, None, None], source.stain_matrix, target.stain_matrix),
        torch.where(ok[:, None], source.max_concentration, target.max_concentration),
        torch.zeros_like(source.status),
    )


def _seen_to_be_fitted(status: torch.Tensor) -> bool:
    """True if all images are known to be fitted; those on a GPU are not looked at, as that would wait for it."""
    return status.device.type == "cpu" and not status.any()


def keep_degenerate(out: torch.Tensor, images: torch.Tensor, status: torch.Tensor) -> torch.Tensor:
    """`out` [B, 3, H, W], with the input itself where the status is not OK."""
    return torch.where((status == MacenkoStatus.OK)[:, None, None, None], out, images)


def check_target(target: MacenkoFit) -> None:
    """Raise ValueError for stains that are not finite; those on a GPU are not looked at, as that would wait for it."""
    for part, name in ((target.stain_matrix, "stain_matrix"), (target.max_concentration, "max_concentration")):
        # Over the few numbers of a target a loop is faster than an operation.
        if part.device.type == "cpu" and not all(map(math.isfinite, part.detach().flatten().tolist())):
            raise ValueError(
                f"target.{name} is not finite: {describe_failures(target.status.reshape(-1)) or 'it was not fitted'}. "
                "Fit the target on an image with tissue."
            )


def check_source(source: MacenkoFit) -> None:
    """Raise ValueError for given stains of status OK that no image can have; those on a GPU are not looked at."""
    if any(part.device.type != "cpu" for part in source):
        return
    for i, (stain, maximum, status) in enumerate(zip(*(part.detach().tolist() for part in source), strict=True)):
        if status != MacenkoStatus.OK:
            continue
        h, e = zip(*stain, strict=True)
        hh, ee, he = (sum(map(operator.mul, a, b)) for a, b in ((h, h), (e, e), (h, e)))
        if not all(map(math.isfinite, (*h, *e, *maximum))):
            found = "is not finite, though its status is OK"
        elif min(maximum) <= 0:
            found = f"has max_concentration {tuple(maximum)}; expected positive numbers"
        elif hh * ee - he * he <= 1e-15 * hh * ee:  # a few roundings of 1
            found = "has two columns of one direction in stain_matrix"
        else:
            continue
        raise ValueError(f"source of image {i} {found}. Take it from macenko_fit, or leave source out.")


def check_range(collection: Collection, range: float) -> None:
    """Raise ValueError if `range` cannot be what was meant for floating-point images.

    Values are looked at on the CPU only. Beyond the range they give images the status NON_FINITE, on every device. Dark
    images among brighter ones are dark images, in a list as in a batch.
    """
    if not is_number(range):
        raise TypeError(f"range is {range!r}; expected a number.")
    if not (math.isfinite(range) and range > 0):
        raise ValueError(f"range={range!r}; expected the positive value that stands for 255.")
    largest = 0.0
    for part in collection.parts:
        pixels = part.pixels
        if pixels.dtype == torch.uint8 or pixels.device.type != "cpu" or pixels.numel() == 0:
            continue
        if range < 2:
            _check_unit_range(part, range)
        else:
            largest = max(largest, float(pixels.detach().amax()))  # a NaN, which is not larger, says nothing
    if 0 < largest <= 1:
        raise ValueError(
            f"images hold values up to {largest:.3g}, but range={range:g} was stated; "
            "pass range=1 for images in [0, 1]."
        )


def _check_unit_range(part: Part, range: float) -> None:
    """Raise ValueError for an image that holds far more than `range`, below 2."""
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


def _result(
    collection: Collection,
    images: list[torch.Tensor],
    status: torch.Tensor,
    return_status: bool,
    network: NetworkOutput | None,
) -> Any:
    restored = collection.restore(images) if network is None else collection.as_tensors(images)
    return (restored, status) if return_status else restored
