"""Stain augmentation: random gain and shift of the haematoxylin and eosin concentrations of each image.

D. Tellez et al., "Whole-slide mitosis detection in H&E breast histology using PHH3 as a reference to train distilled
stain-invariant convolutional networks", IEEE TMI 2018, with Macenko's stains and the distribution of the torchstain
package.
"""

from __future__ import annotations

from typing import Any

import torch

from ernet_fast.stain import operators
from ernet_fast.stain.collection import Collection, read_collection
from ernet_fast.stain.functional import (
    check_range,
    keep_degenerate,
    known_source,
    on_device,
    refuse_failures,
    usable_source,
)
from ernet_fast.stain.options import check_parameters, check_policy, is_number
from ernet_fast.stain.published import published_stains
from ernet_fast.stain.result import MacenkoFit, expand_fit
from ernet_fast.stain.torch_backend import PIXELS_AT_A_TIME
from ernet_fast.stain.upload import to_device


def macenko_augment(
    images: Any,
    source: MacenkoFit | None = None,
    *,
    gain: float = 0.2,
    shift: float = 0.2,
    generator: torch.Generator | None = None,
    Io: float = 240,
    alpha: float = 1,
    beta: float = 0.15,
    percentile: str = "linear",
    on_degenerate: str = "reference",
    range: float = 255,
    layout: str | None = None,
    mask: Any = None,
    return_status: bool = False,
) -> Any:
    """Images whose stain concentrations C were changed: I' = Io exp(-HE (g C + s)), g and s drawn anew for each image.

    For each stain of each image, independently and uniformly, g is in [1 - gain, 1 + gain) and s in [-shift, shift), in
    units of optical density. The shift applies to every pixel, so it tints the background too. What no mixture of the
    two stains explains is lost, as in normalisation: with gain = shift = 0 an image is projected onto its stains.

    Four numbers are drawn for each image in the order of the images, so the same generator state gives the same result
    for a batch, for its images one after the other and for a list of them, on every device if the generator is on the
    CPU.

    Args:
        images: as in `macenko_fit`.
        source: stains of the images if they are known, e.g. those of a slide; estimated by default.
        gain: half the width of the distribution of g, in [0, 1).
        shift: half the width of the distribution of s, in [0, 4].
        generator: where the numbers come from; torch's default CPU generator if None.
        Io: as in `macenko_fit`.
        alpha: as in `macenko_fit`.
        beta: as in `macenko_fit`.
        percentile: as in `macenko_fit`.
        range: as in `macenko_fit`.
        layout: as in `macenko_fit`.
        mask: as in `macenko_fit`: where to look for the source stains. Every pixel is changed.
        on_degenerate: what to do with an image whose stains cannot be estimated: "reference" takes it to be stained as
            published with Macenko's method, "identity" returns it as it is, "raise" raises.
        return_status: also return the status [B] int32 of the source fit.

    Returns:
        Images of the input's form; with `return_status` a pair (images, status). Gradients flow to floating-point
        images and to given stains.

    Raises:
        TypeError, ValueError: as in `macenko_normalize`; ValueError for a gain or a shift beyond its interval.
    """
    check_parameters(Io, alpha, beta, percentile)
    check_policy(on_degenerate)
    _check_widths(gain, shift)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator is a {type(generator).__name__}; expected a torch.Generator.")
    collection = read_collection(images, layout)
    check_range(collection, range)
    if source is None and mask is None and on_degenerate != "raise" and _kernels_serve(collection):
        gains, shifts = _changes_of(collection, gain, shift, generator)
        choices = percentile == "nearest", on_degenerate == "identity"
        numbers = float(Io), float(alpha), float(beta), *choices, float(range)
        done = [
            operators.augment(part.pixels, published_stains(), part.take(gains), part.take(shifts), *numbers)
            for part in collection.parts
        ]
        restored = collection.restore([out for out, _ in done])
        return (restored, collection.gather_fit([fit for _, fit in done]).status) if return_status else restored
    known = known_source(collection, source, mask, Io, alpha, beta, percentile, range)
    refuse_failures(known.status, on_degenerate)
    published = expand_fit(published_stains(), collection.count, "published")
    usable = usable_source(known, on_device(published, collection.device))
    gains, shifts = _changes_of(collection, gain, shift, generator)
    results = []
    for part in collection.parts:
        out = _change(part.pixels, part.take_fit(usable), part.take(gains), part.take(shifts), float(Io), float(range))
        if on_degenerate == "identity":
            out = keep_degenerate(out, part.pixels, part.take(known.status))
        results.append(out)
    restored = collection.restore(results)
    return (restored, known.status) if return_status else restored


def _kernels_serve(collection: Collection) -> bool:
    return collection.count > 0 and all(operators.served_on_cuda(part.pixels) for part in collection.parts)


def _changes_of(
    collection: Collection, gain: float, shift: float, generator: torch.Generator | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`draw_changes` on the device of the images."""
    gains, shifts = draw_changes(collection.count, gain, shift, generator)
    return to_device(gains, collection.device), to_device(shifts, collection.device)


def _check_widths(gain: float, shift: float) -> None:
    for name, value in (("gain", gain), ("shift", shift)):
        if not is_number(value):
            raise TypeError(f"{name} is {value!r}; expected a number.")
    if not 0 <= gain < 1:
        raise ValueError(f"gain={gain!r}; concentrations are multiplied by 1 ± gain, expected in [0, 1).")
    if not 0 <= shift <= 4:
        raise ValueError(f"shift={shift!r}; expected an optical density in [0, 4]; 0.2 is usual.")


def draw_changes(
    count: int, gain: float, shift: float, generator: torch.Generator | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gains and shifts [count, 2] float64 of haematoxylin and eosin, on the generator's device."""
    device = torch.device("cpu") if generator is None else generator.device
    unit = torch.rand((count, 2, 2), generator=generator, dtype=torch.float64, device=device) * 2 - 1
    return 1 + gain * unit[:, 0], shift * unit[:, 1]


def _change(
    images: torch.Tensor, source: MacenkoFit, gain: torch.Tensor, shift: torch.Tensor, Io: float, range: float
) -> torch.Tensor:
    """I' of images [b, 3, H, W]. HE (g C + s) are the changed concentrations of the light (I + 1) exp(-HE (s / g))."""
    if operators.served_on_cuda(images) and not any(part.requires_grad for part in source[:2]):
        return operators.change(images, source, gain, shift, Io, range)
    tint = torch.exp(-(source.stain_matrix @ (shift / gain)[:, :, None]))[..., None]
    stronger = source._replace(max_concentration=source.max_concentration * gain)
    group = max(1, PIXELS_AT_A_TIME // max(1, images.shape[2] * images.shape[3]))
    if images.dtype == torch.uint8:
        range = 255.0
    unit = range / 255
    parts = []
    for begin in torch.arange(0, max(1, images.shape[0]), group).tolist():
        rows = slice(begin, begin + group)
        light = images[rows]
        light = light if light.dtype in (torch.float32, torch.float64) else light.float()
        light = (light + unit) * tint[rows].to(light.dtype) - unit
        ours, theirs = (MacenkoFit(*(part[rows] for part in fit)) for fit in (source, stronger))
        parts.append(operators.reconstruct(light, ours, theirs, Io, range).to(images.dtype))
    return parts[0] if len(parts) == 1 else torch.cat(parts)
