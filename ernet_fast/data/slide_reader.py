"""Whole slides, region by region, by OpenSlide, or tifffile where it is missing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ernet_fast._optional import require
from ernet_fast.data.image_io import ImageReadError
from ernet_fast.data.tiff_slide import TiffSlide

_MOST_BLANK = 1 << 16  # regions that are remembered


class SlideReader:
    """An open slide; regions may be read by several threads.

    Attributes:
        path: the file.
        size: width and height of level 0.
        mpp: micrometres per pixel of level 0 in x and y, or None.
        objective: magnification of the objective, or None.
        reader: which library reads, with its version.
        decoded: how many regions were decoded so far.
    """

    def __init__(self, path: Path) -> None:
        """Open a slide; ImageReadError if that is impossible, ImportError if there is no library for it."""
        opener, self.reader = _opener()
        self.path = path
        try:
            self.slide = opener(str(path))
            self.size: tuple[int, int] = tuple(self.slide.dimensions)
        except Exception as error:  # the libraries raise several kinds, each its own
            raise ImageReadError(f"the slide cannot be read: {error}") from error
        x, y = (_number(self.slide.properties.get(f"openslide.mpp-{axis}")) for axis in "xy")
        self.mpp = (x, y) if x and y else None
        self.objective = _number(self.slide.properties.get("openslide.objective-power"))
        self.decoded = 0
        self._blank: dict[tuple[int, ...], tuple[int, int, int]] = {}

    def close(self) -> None:
        """Close the file."""
        self.slide.close()

    @property
    def levels(self) -> Sequence[tuple[int, int]]:
        """Width and height of every level."""
        return self.slide.level_dimensions

    def downsample(self, level: int) -> float:
        """How much smaller a level is than level 0."""
        return float(self.slide.level_downsamples[level])

    def read(self, x: int, y: int, width: int, height: int, level: int = 0) -> np.ndarray:
        """As `read_at`, with x and y in pixels of the level."""
        scale = self.downsample(level)
        return self.read_at(round(x * scale), round(y * scale), width, height, level)

    def read_at(self, x: int, y: int, width: int, height: int, level: int = 0) -> np.ndarray:
        """Pixels [height, width, 3] uint8 of a level, from (x, y) in level 0; what was not scanned is white.

        A region that was found to be of one colour is not decoded again.

        Raises:
            ImageReadError: the region is damaged.
        """
        place = (x, y, width, height, level)
        if (colour := self._blank.get(place)) is not None:
            return np.full((height, width, 3), colour, np.uint8)
        self.decoded += 1
        try:
            pixels = _without_alpha(np.asarray(self.slide.read_region((x, y), level, (width, height))))
        except Exception as error:
            raise ImageReadError(f"level {level} cannot be read at ({x}, {y}) of level 0: {error}") from error
        if (found := colour_of(pixels)) is not None and len(self._blank) < _MOST_BLANK:
            self._blank[place] = found
        return pixels


def colour_of(pixels: np.ndarray) -> tuple[int, int, int] | None:
    """The colour of an image [H, W, 3] all of whose pixels have one; None for any other."""
    first = pixels[0, 0]
    if (pixels[-1, -1] != first).any() or (pixels[0] != first).any() or (pixels != first).any():
        return None
    red, green, blue = first.tolist()
    return red, green, blue


def _without_alpha(pixels: np.ndarray) -> np.ndarray:
    """RGB of RGBA or RGB, composed on white."""
    if pixels.shape[2] == 3:
        return pixels
    rgb, alpha = pixels[..., :3], pixels[..., 3:]
    if alpha.min() == 255:
        return np.ascontiguousarray(rgb)
    share = alpha.astype(np.float32) / 255
    return (rgb * share + 255 * (1 - share)).round().astype(np.uint8)


def _opener() -> tuple[Any, str]:
    """What opens slides, and its name with the version: OpenSlide, or tifffile where that is missing."""
    try:
        library = require("openslide", extra="slides", purpose="reading whole slides")
    except ImportError:
        try:
            fallback = require("tifffile", extra="slides", purpose="reading whole slides")
        except ImportError:
            pass
        else:
            return TiffSlide, f"tifffile {fallback.__version__}"
        raise
    return library.OpenSlide, f"OpenSlide {library.__library_version__}"


def reader_version() -> str:
    """The library that reads slides, with its version; ImportError if there is none."""
    return _opener()[1]


def _number(text: Any) -> float | None:
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) and value > 0 else None
