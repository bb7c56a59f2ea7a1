"""Reinhard colour normalisation: the mean and standard deviation of L, a and b become those of a target.

E. Reinhard et al., "Color transfer between images", IEEE Computer Graphics and Applications 2001, in CIE L*a*b* as the
torchstain package has it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ernet_fast.stain.collection import Collection, Part
from ernet_fast.stain.lab import lab_of_linear, lab_to_rgb, linear_of_bytes, linear_of_rgb
from ernet_fast.stain.options import Options
from ernet_fast.stain.pipeline import check_no_mask, keep_degenerate, read, refuse_failures
from ernet_fast.stain.result import OK, MacenkoStatus
from ernet_fast.stain.target_module import TargetModule
from ernet_fast.stain.tissue_mask import pixels_of_masks
from ernet_fast.stain.torch_backend import PIXELS_AT_A_TIME
from ernet_fast.stain.torchstain_form import BACKENDS, as_torchstain, check_compat, compat_of_backend, read_torchstain
from ernet_fast.stain.upload import is_readable

METHODS = (None, "modified")

BLOCK_PIXELS = 32768
"""Pixels worked on at a time on the CPU, so that what one step leaves is in the cache for the next."""

FLAT_STD = 1e-3
"""A channel of a smaller standard deviation (in units of L, a, b) is flat: what it deviates by is rounding."""


class ReinhardFit(NamedTuple):
    """Colour statistics of B images.

    Attributes:
        mean: [B, 3] float64, of L (0 to 100), a and b.
        std: [B, 3] float64, of the population.
        status: [B] int32, `MacenkoStatus.OK`, or `NON_FINITE` or (under an empty mask) `TOO_FEW_TISSUE_PIXELS`, where
            the others hold NaN.
    """

    mean: torch.Tensor
    std: torch.Tensor
    status: torch.Tensor


def reinhard_fit(images: Any, *, range: float = 255, layout: str | None = None, mask: Any = None) -> ReinhardFit:
    """Mean and standard deviation of L, a and b of every image, whatever it shows.

    Args:
        images: as in `macenko_fit`.
        range: as in `macenko_fit`.
        layout: as in `macenko_fit`.
        mask: as in `macenko_fit`: the statistics are those of the pixels inside.

    Raises:
        TypeError, ValueError: as in `macenko_fit`.
    """
    collection = read(images, Options(range=range, layout=layout))
    return _fit(collection, range, mask)


def _fit(collection: Collection, range: float, mask: Any) -> ReinhardFit:
    inside = None if mask is None else pixels_of_masks(collection, mask)
    if not collection.parts:
        nothing = torch.empty((0, 3), dtype=torch.float64, device="cpu")
        return ReinhardFit(nothing, nothing, torch.empty((0,), dtype=torch.int32, device="cpu"))
    if inside is not None:
        fits = [_fit_pixels(pixels.detach(), range) for pixels in inside]
        return ReinhardFit(*map(torch.cat, zip(*fits, strict=True)))
    fits = [_fit_pixels(part.pixels.detach(), range) for part in collection.parts]
    return ReinhardFit(*map(collection.gather, zip(*fits, strict=True)))


def _fit_pixels(images: torch.Tensor, range: float) -> ReinhardFit:
    """Statistics of [b, 3, H, W], or of an image without pixels."""
    if images.shape[3] == 0:
        nothing = images.new_full((1, 3), math.nan, dtype=torch.float64)
        status = images.new_full((1,), int(MacenkoStatus.TOO_FEW_TISSUE_PIXELS), dtype=torch.int32)
        return ReinhardFit(nothing, nothing, status)
    results = []
    for part in _groups(images):
        if part.dtype == torch.uint8:
            valid = torch.ones(len(part), dtype=torch.bool, device=part.device)
        else:  # half a grey level outside the range is rounding; the comparison is false for NaN
            levels, half = part.double(), range * 0.5 / 255
            valid = ((levels >= -half) & (levels <= range + half)).flatten(1).all(dim=1)
        lab = _in_blocks(part, lambda pixels: _lab(pixels, range))
        mean = lab.mean(dim=2)
        std = (lab - mean[:, :, None]).square().mean(dim=2).sqrt()
        status = torch.where(valid, int(MacenkoStatus.OK), int(MacenkoStatus.NON_FINITE)).to(torch.int32)
        keep = valid[:, None]
        results.append((mean.where(keep, math.nan), std.where(keep, math.nan), status))
    return ReinhardFit(*map(torch.cat, zip(*results, strict=True)))


def _groups(images: torch.Tensor) -> tuple[torch.Tensor, ...]:
    if images.device.type == "cpu":
        # One by one: torch's powers differ in the last bit between the vectors of an array and its tail, so an
        # image's bits would depend on where it stands in a batch.
        return images.split(1)
    return images.split(max(1, PIXELS_AT_A_TIME // (images.shape[2] * images.shape[3])))


def _in_blocks(images: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """`function` of the pixels of [b, 3, H, W], as [b, 3, H W]; on the CPU block by block."""
    pixels = images.flatten(2)
    if images.device.type != "cpu" or pixels.shape[2] <= BLOCK_PIXELS:
        return function(pixels)
    return torch.cat([function(block) for block in pixels.split(BLOCK_PIXELS, dim=2)], dim=2)


def _lab(pixels: torch.Tensor, range: float) -> torch.Tensor:
    """L, a and b in float64."""
    return lab_of_linear(
        linear_of_bytes(pixels) if pixels.dtype == torch.uint8 else linear_of_rgb(pixels.double() / range)
    )


def reinhard_normalize(
    images: Any,
    target: ReinhardFit,
    source: ReinhardFit | None = None,
    *,
    method: str | None = None,
    on_degenerate: str = "reference",
    range: float = 255,
    layout: str | None = None,
    mask: Any = None,
    return_status: bool = False,
) -> Any:
    """Images with the colour statistics of `target`: x' = (x - mean) / std * std_target + mean_target for L, a and b.

    A flat channel (a standard deviation below 1e-3) has no deviations to scale and becomes the target's mean.
    Gradients flow to floating-point images, with statistics that were estimated held constant.

    Args:
        images: as in `macenko_fit`.
        target: statistics of one image, or of each.
        source: statistics the images have if they are known, e.g. those of a slide; measured by default.
        method: None, or "modified", which keeps L's mean and scales its deviations by 1 + q, q = (std_target - std) /
            std_target, or 1.05 where that is not positive, and only moves a and b.
        on_degenerate: what to do with an image that holds a value which is no grey level, or has an empty mask (nothing
            else is degenerate here): "reference" takes it to have the target's statistics, "identity" returns it as it
            is, "raise" raises.
        range: as in `macenko_fit`.
        layout: as in `macenko_fit`.
        mask: as in `macenko_fit`: where to measure the statistics. Every pixel is normalised.
        return_status: also return the status [B] int32.

    Returns:
        Images of the input's form, uint8 values truncated as torchstain does. With `return_status` a pair (images,
        status).

    Raises:
        TypeError, ValueError: as in `macenko_normalize`.
    """
    check_method(method)
    collection = read(images, Options(on_degenerate=on_degenerate, range=range, layout=layout))
    wanted = _expand(target, collection, "target")
    if is_readable(wanted.mean) and not bool(torch.isfinite(wanted.mean.sum() + wanted.std.sum())):
        raise ValueError("target is not finite; fit it on an image whose values are all grey levels.")
    check_no_mask(None if source is None else mask)
    known = _fit(collection, range, mask) if source is None else _expand(source, collection, "source")
    refuse_failures(known.status, on_degenerate)
    ok = (known.status == OK)[:, None]
    usable = ReinhardFit(known.mean.where(ok, wanted.mean), known.std.where(ok, wanted.std), known.status)
    results = []
    for part in collection.parts:
        out = _normalize(part, usable, wanted, method, range)
        if on_degenerate == "identity":
            out = keep_degenerate(out, part.pixels, part.take(known.status))
        results.append(out)
    restored = collection.restore(results)
    return (restored, known.status) if return_status else restored


def check_method(method: str | None) -> None:
    """Raise ValueError for an unknown method."""
    if method not in METHODS:
        raise ValueError(f"method={method!r}; expected None or 'modified'.")


def _expand(fit: ReinhardFit, collection: Collection, name: str) -> ReinhardFit:
    """`fit` for every image of the collection."""
    if not isinstance(fit, ReinhardFit):
        raise TypeError(f"{name} is a {type(fit).__name__}; expected the ReinhardFit that reinhard_fit returns.")
    size, count, device = fit.mean.shape[0] if fit.mean.ndim == 2 else -1, collection.count, collection.device
    if fit.mean.shape != (size, 3) or fit.std.shape != (size, 3) or fit.status.shape != (size,):
        size = -1
    if size not in (1, count):
        raise ValueError(
            f"{name} has mean {tuple(fit.mean.shape)}, std {tuple(fit.std.shape)} and status "
            f"{tuple(fit.status.shape)}; expected [B, 3], [B, 3] and [B] with B = 1 or {count}."
        )
    mean, std = (part.to(device, torch.float64).expand(count, 3) for part in (fit.mean, fit.std))
    return ReinhardFit(mean, std, fit.status.to(device).expand(count))


def _normalize(part: Part, source: ReinhardFit, target: ReinhardFit, method: str | None, range: float) -> torch.Tensor:
    images = part.pixels
    unit = 255 if images.dtype == torch.uint8 else range
    gain, offset = (part.take(rows).expand(len(images), 3)[:, :, None] for rows in _affine(source, target, method))

    def updated(pixels: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        return (lab_to_rgb(_lab(pixels, range) * scale + shift) * unit).to(images.dtype)

    groups = _groups(images)
    sizes = [len(group) for group in groups]
    rows = zip(groups, gain.split(sizes), offset.split(sizes), strict=True)
    return torch.cat(
        [_in_blocks(group, functools.partial(updated, scale=a, shift=b)).reshape(group.shape) for group, a, b in rows]
    )


def _affine(source: ReinhardFit, target: ReinhardFit, method: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Gain and offset [B, 3] of L, a and b."""
    if method is None:
        flat = source.std < FLAT_STD
        gain = (target.std / source.std.masked_fill(flat, 1.0)).masked_fill(flat, 0.0)
        return gain, target.mean - gain * source.mean
    q = (target.std[:, 0] - source.std[:, 0]) / target.std[:, 0]
    gain = torch.ones_like(source.mean)
    gain[:, 0] = 1 + torch.where(q > 0, q, 0.05)
    mean = torch.cat([source.mean[:, :1], target.mean[:, 1:]], dim=1)
    return gain, mean - gain * source.mean


class ReinhardNormalizer(TargetModule):
    """Gives images the colour statistics of a target, in torchstain's call style and as a module.

    Args:
        method: None or "modified", see `reinhard_normalize`.
        on_degenerate: "reference", "identity" or "raise", see `reinhard_normalize`.
        range: the value that stands for 255 in floating-point images; 1 for images in [0, 1].
        layout: "CHW" or "HWC", needed only for shapes that fit both.
        compat: "torchstain" makes `fit` and `normalize` follow that package's own conventions: torch tensors are
            [3, H, W], NumPy arrays [H, W, 3], integers of any width are taken, and results are uint8 [H, W, 3].
            `forward` is not affected.
        backend: "torch" or "numpy", torchstain's own argument, which may also come first: the same as
            compat="torchstain", whichever of the two is named.

    Attributes:
        target_means: buffer [3] float64, mean L, a and b of the target; NaN before `fit`. Arrays may be assigned.
        target_stds: buffer [3] float64, their standard deviations.

    Raises:
        ValueError: an unknown method, policy, package or backend.
    """

    target_means: torch.Tensor
    target_stds: torch.Tensor

    def __init__(
        self,
        method: str | None = None,
        on_degenerate: str = "reference",
        range: float = 255,
        layout: str | None = None,
        compat: str | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if method in BACKENDS:
            method, backend = None, method
        compat = compat_of_backend(compat, backend)
        Options(on_degenerate=on_degenerate, range=range, layout=layout)
        check_method(method)
        check_compat(compat, "linear", range, layout)
        self.method, self.on_degenerate, self.range, self.layout = method, on_degenerate, range, layout
        self.compat = compat
        self.register_buffer("target_means", torch.full((3,), math.nan, dtype=torch.float64))
        self.register_buffer("target_stds", torch.full((3,), math.nan, dtype=torch.float64))

    def fit(self, target: Any, mask: Any = None) -> ReinhardNormalizer:
        """Take the statistics of one image as target, or of its pixels in `mask`.

        Raises:
            ValueError: several images, a value that is no grey level, or an empty mask.
        """
        layout = self.layout
        if self.compat is not None:
            target, layout = read_torchstain(target), "CHW"
        fit = reinhard_fit(target, range=self.range, layout=layout, mask=mask)
        if len(fit.status) != 1:
            raise ValueError(f"fit takes one target image; got {len(fit.status)}.")
        refuse_failures(fit.status, "raise")
        self.target_means, self.target_stds = fit.mean[0], fit.std[0]
        return self

    def forward(
        self, images: Any, source: ReinhardFit | None = None, mask: Any = None, return_status: bool = False
    ) -> Any:
        """Normalised images, of the input's form; `source` and `mask` as in `reinhard_normalize`.

        With `return_status` a pair of these and the status [B] int32.

        Raises:
            ValueError: before `fit`.
        """
        return self._normalized(images, self.layout, source, mask=mask, return_status=return_status)

    def _normalized(self, images: Any, layout: str | None, source: ReinhardFit | None, **named: Any) -> Any:
        status = torch.zeros(1, dtype=torch.int32, device=self.target_means.device)
        target = ReinhardFit(self.target_means.double()[None], self.target_stds.double()[None], status)
        named |= {"method": self.method, "on_degenerate": self.on_degenerate, "range": self.range, "layout": layout}
        return reinhard_normalize(images, target, source, **named)

    def normalize(self, I: Any, *, source: ReinhardFit | None = None, mask: Any = None) -> Any:  # noqa: E741
        """As `forward`, but in the form of `compat`: torchstain's name."""
        if self.compat is None:
            return self(I, source, mask)
        return as_torchstain(I, (self._normalized(read_torchstain(I), "CHW", source, mask=mask),), torch.uint8)[0]

    def extra_repr(self) -> str:
        """Parameters, as torch shows them."""
        compat = f", compat={self.compat!r}" if self.compat else ""
        return f"method={self.method!r}, on_degenerate={self.on_degenerate!r}{compat}"
