"""A band-pass filter in the frequency domain, of many images at once."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def band_pass(values: Tensor, mpp: tuple[float, float], finest: float, coarsest: float) -> Tensor:
    """Keep what is larger than `finest` and smaller than `coarsest`: v - mean about v, without the noise.

    With f the frequency in cycles a micrometre, the spectrum is multiplied by ``exp(-2 (pi finest f)^2) -
    exp(-2 (pi coarsest f)^2)``, the difference of two Gaussians of these standard deviations. It is 0 at f = 0. Images
    are mirrored beyond their border as far as the wider Gaussian reaches, since a spectrum is that of a periodic image.

    Args:
        values: [B, H, W], float32 or float64, finite.
        mpp: micrometres a pixel along y and x.
        finest: standard deviation of the narrower Gaussian in micrometres, 0 for none.
        coarsest: that of the wider one, above `finest`.

    Returns:
        [B, H, W] of the dtype of `values`.

    Raises:
        ValueError: 0 <= finest < coarsest does not hold.
    """
    if not 0 <= finest < coarsest < math.inf:
        raise ValueError(f"finest={finest}, coarsest={coarsest}; expected micrometres with 0 <= finest < coarsest.")
    height, width = values.shape[1:]
    down, across = (
        min(math.ceil(3 * coarsest / pixel), side - 1) for pixel, side in zip(mpp, (height, width), strict=True)
    )
    padded = F.pad(values[:, None], (across, across, down, down), mode="reflect")[:, 0]
    squared = _squared_frequencies(tuple(padded.shape[1:]), mpp, values)
    gain = torch.exp(-2 * (math.pi * finest) ** 2 * squared) - torch.exp(-2 * (math.pi * coarsest) ** 2 * squared)
    filtered = torch.fft.irfft2(torch.fft.rfft2(padded) * gain, s=padded.shape[1:])
    return filtered[:, down : down + height, across : across + width]


def _squared_frequencies(size: tuple[int, ...], mpp: tuple[float, float], like: Tensor) -> Tensor:
    """|f|^2 [H, W // 2 + 1] of the spectrum that `rfft2` gives, in cycles a micrometre."""
    kind = {"dtype": like.dtype, "device": like.device}
    rows = torch.fft.fftfreq(size[0], d=mpp[0], **kind)
    columns = torch.fft.rfftfreq(size[1], d=mpp[1], **kind)
    return rows[:, None] ** 2 + columns**2
