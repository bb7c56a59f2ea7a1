"""Stain augmentation: random gain and shift of the haematoxylin and eosin concentrations of each image.

D. Tellez et al., "Whole-slide mitosis detection in H&E breast histology using PHH3 as a reference to train distilled
stain-invariant convolutional networks", IEEE TMI 2018, with Macenko's stains and the distribution of the torchstain
package.
"""

from __future__ import annotations

from typing import Any

import torch

from ernet_fast.stain import operators, pipeline
from ernet_fast.stain.collection import Part
from ernet_fast.stain.options import Options, is_number
from ernet_fast.stain.result import MacenkoFit, published_stains
from ernet_fast.stain.upload import to_device


def macenko_augment(
    images: Any,
    source: MacenkoFit | None = None,
    *,
    gain: float = 0.2,
    shift: float = 0.2,
    generator: torch.Generator | None = None,
    changes: tuple[torch.Tensor, torch.Tensor] | None = None,
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
        changes: g and s, [B, 2] each of haematoxylin and eosin, to use instead of drawing them by `gain` and `shift`.
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
    options = Options(Io, alpha, beta, percentile, on_degenerate, range, layout)
    check_widths(gain, shift)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator is a {type(generator).__name__}; expected a torch.Generator.")
    collection = pipeline.read(images, options)
    drawn = draw_changes(collection.count, gain, shift, generator) if changes is None else changes
    if any(tuple(values.shape) != (collection.count, 2) for values in drawn):
        raise ValueError(
            f"changes are {[list(values.shape) for values in drawn]}; expected two tensors [{collection.count}, 2]."
        )
    gains, shifts = (to_device(values.double(), collection.device) for values in drawn)

    def fused(part: Part) -> tuple[torch.Tensor, MacenkoFit] | None:
        return operators.augment(part.pixels, published_stains(), part.take(gains), part.take(shifts), options)

    def apart(part: Part, ours: MacenkoFit, _: MacenkoFit) -> torch.Tensor:
        return operators.change(part.pixels, ours, part.take(gains), part.take(shifts), options)

    results, status = pipeline.changed(collection, source, mask, published_stains(), options, fused, apart)
    restored = collection.restore(results)
    return (restored, status) if return_status else restored


def check_widths(gain: float, shift: float) -> None:
    """Raise TypeError or ValueError for a gain or a shift beyond its interval."""
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
