"""Geometric augmentation of a whole batch on its device, from numbers that were drawn before."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ernet_fast.data.augment import affine_matrices, warp_affine

DRAWS = 10
"""Numbers from 0 to 1 that an image takes."""


@dataclass(frozen=True)
class AugmentRanges:
    """What `augment_batch` may do to an image.

    Attributes:
        flips: flip left-right and up-down, each with probability 1/2.
        quarter_turns: turn by a random multiple of 90 degrees, if the images are square.
        rotation: further rotation, uniform in +- this many degrees.
        translation: shift along each side, uniform in +- this share of the side.
        zoom: scale factor, log-uniform between these two; above 1 enlarges.
        crop: cut out a window of a share of both sides, uniform between this and 1, anywhere in the image, and enlarge
            it to the image's size.
    """

    flips: bool = True
    quarter_turns: bool = True
    rotation: float = 15.0
    translation: float = 0.05
    zoom: tuple[float, float] = (0.9, 1.1)
    crop: float = 1.0

    @property
    def resamples(self) -> bool:
        """Whether pixels are interpolated, and not only moved."""
        return bool(self.rotation or self.translation or self.zoom != (1.0, 1.0) or self.crop < 1.0)


def augment_batch(images: Tensor, draws: Tensor, ranges: AugmentRanges) -> Tensor:
    """Images changed each by its own numbers: flips and quarter turns, which are exact, then one bilinear resampling.

    Args:
        images: [B, C, H, W], of any dtype and device; not modified.
        draws: [B, `DRAWS`] float64 on the CPU, uniform from 0 to 1. An image's result depends on its own row alone.
        ranges: how far the changes go.

    Returns:
        float32 [B, C, H, W] in the units of `images`, mirrored beyond the border.
    """
    size = (images.shape[2], images.shape[3])
    if ranges.flips:
        images = _where(draws[:, 0] < 0.5, images.flip(3), images)
        images = _where(draws[:, 1] < 0.5, images.flip(2), images)
    if ranges.quarter_turns and size[0] == size[1]:
        turns = (4 * draws[:, 2]).long()
        images = _where(turns % 2 == 1, images.rot90(1, dims=(2, 3)), images)
        images = _where(turns >= 2, images.flip(2, 3), images)
    images = images.float()
    return warp_affine(images, _matrices(size, draws, ranges).to(images.device)) if ranges.resamples else images


def _where(chosen: Tensor, changed: Tensor, images: Tensor) -> Tensor:
    return torch.where(chosen.to(images.device)[:, None, None, None], changed, images)


def _matrices(size: tuple[int, int], draws: Tensor, ranges: AugmentRanges) -> Tensor:
    """[B, 2, 3] that lead from the result's coordinates to those of the input: the crop's window, then the rest."""
    signed = 2 * draws - 1
    low, high = map(math.log, ranges.zoom)
    matrices = affine_matrices(
        size,
        rotation=signed[:, 3] * ranges.rotation,
        translation=signed[:, 4:6] * ranges.translation,
        zoom=torch.exp(low + draws[:, 6] * (high - low)),
    )
    share = 1 - draws[:, 7] * (1 - ranges.crop)
    offset = signed[:, 8:10] * (1 - share)[:, None]
    linear = matrices[:, :, :2]
    moved = matrices[:, :, 2:] + linear @ offset[..., None].float()
    return torch.cat([linear * share[:, None, None].float(), moved], dim=2)
