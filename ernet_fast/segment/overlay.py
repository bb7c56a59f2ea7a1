"""Outlines of nuclei, drawn on their image."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ernet_fast._optional import require
from ernet_fast.segment.nuclei import SegmentedNuclei
from ernet_fast.stain.layout import read_images

_COLOUR = (40, 230, 60)
"""Green: H&E has none of it."""
_LEAST_SIDE = 600
"""Smaller images are enlarged, so that outlines one pixel wide do not cover them."""


def draw_outlines(image: Any, found: SegmentedNuclei, *, colour: tuple[int, int, int] = _COLOUR) -> NDArray[np.uint8]:
    """`image`, uint8 [3, H, W] or [H, W, 3], with the outlines of its nuclei: [k H, k W, 3].

    k is 1 for images of 600 pixels or more a side, else the least whole number that makes them so large.

    Raises:
        TypeError, ValueError: no uint8 image, or not of the size of `found.labels`.
    """
    pixels = read_images(image).pixels
    height, width = found.labels.shape
    if str(pixels.dtype) != "torch.uint8" or tuple(pixels.shape) != (1, 3, height, width):
        raise ValueError(
            f"image is {pixels.dtype} of shape {tuple(pixels.shape[1:])}; expected one uint8 image of {height}x{width} "
            "pixels, as the nuclei were found in."
        )
    segmentation = require("skimage.segmentation", extra="segment", purpose="drawing outlines of nuclei")
    scale = -(-_LEAST_SIDE // max(height, width)) if max(height, width) < _LEAST_SIDE else 1
    shown = pixels[0].permute(1, 2, 0).cpu().numpy().repeat(scale, 0).repeat(scale, 1)
    shown[segmentation.find_boundaries(found.labels.repeat(scale, 0).repeat(scale, 1), mode="inner")] = colour
    return shown
