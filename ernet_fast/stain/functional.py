"""Macenko stain normalisation of batches: fit and normalise.

M. Macenko et al., "A method for normalizing histology slides for quantitative analysis", ISBI 2009, with the constants
and conventions of the torchstain package: optical density OD = -ln((I + 1) / Io), tissue = all three ODs at least beta,
stains = the directions at the alpha-th and (100 - alpha)-th percentile of the angle in the plane of the two largest
principal components, haematoxylin the one with more red, concentrations by least squares, scaled by their 99th
percentiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ernet_fast.stain import operators, pipeline
from ernet_fast.stain.collection import Collection, Part
from ernet_fast.stain.layout import read_images
from ernet_fast.stain.network_output import NetworkOutput, read_output, scale
from ernet_fast.stain.options import Options
from ernet_fast.stain.result import MacenkoFit, check_fit


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
        Io: transmitted intensity, grey level of an empty slide.
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
    options = Options.of(Io, alpha, beta, percentile, "reference", range, layout)
    return pipeline.fit(pipeline.read(images, options), options, mask)


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
    options = Options.of(Io, alpha, beta, percentile, on_degenerate, range, layout)
    network = read_output(output, mean, std)
    if source is None and mask is None and network is None and not return_status:
        done = normalize_directly(images, target, options)
        if done is not None:
            return done
    collection = pipeline.read(images, options)
    results, status = normalize_collection(collection, target, source, mask, options, network)
    restored = collection.restore(results) if network is None else collection.as_tensors(results)
    return (restored, status) if return_status else restored


def normalize_directly(images: Any, target: MacenkoFit, options: Options) -> Any:
    """Normalised images of a batch of 8-bit ones on the CPU, as most calls have; None for any other, of which the
    general way says what is wrong.

    On small images that way would take half as long as the arithmetic.
    """
    if torch.compiler.is_compiling() or options.on_degenerate == "raise":
        return None
    if isinstance(images, (list, tuple)) or type(target) is not MacenkoFit:
        return None
    batch = read_images(images, options.layout)
    result = operators.normalize_bytes(batch.pixels, target, options)
    return None if result is None else batch.restore(result)


def normalize_collection(
    collection: Collection,
    target: MacenkoFit,
    source: MacenkoFit | None,
    mask: Any,
    options: Options,
    network: NetworkOutput | None,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Normalised images of every part, and the status of all."""
    target = check_fit(target, collection.count, "target")
    if not all(part.pixels.is_cpu for part in collection.parts):
        pipeline.check_target(target)  # before it is on the device, where its values are not looked at

    def fused(part: Part) -> tuple[torch.Tensor, MacenkoFit] | None:
        try:
            return operators.normalize(part.pixels, part.take_fit(target), options, network)
        except RuntimeError:
            pipeline.check_target(target)  # the operator looks before it starts, at less cost, but knows no reason
            raise

    def apart(part: Part, ours: MacenkoFit, theirs: MacenkoFit) -> torch.Tensor:
        return operators.reconstruct(part.pixels, ours, theirs, options, network)

    def kept(pixels: torch.Tensor) -> torch.Tensor:
        return pixels if network is None else scale(pixels, network, options.range)

    return pipeline.changed(collection, source, mask, target, options, fused, apart, kept)
