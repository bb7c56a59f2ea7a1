"""Whole slides, region by region, by OpenSlide or tiffslide."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ernet_fast._optional import require
from ernet_fast.data import ImageReadError

FIT_TILES, FIT_TILE = 400, 512
"""Tiles that stains are fitted on at most, and their size in pixels."""

FIT_MPP, FIT_DOWNSAMPLE = 1.0, 4.0
"""Stains are fitted on the smallest level of at most so many micrometres a pixel, in which nuclei are still apart from
what is around them; if the slide says no size, on one that is at most so much smaller than level 0.
"""

_MASK_PIXELS = 1 << 24
_LEAST_TISSUE = 0.05  # of a tile that is fitted


class SlideReader:
    """An open slide; regions may be read by several threads.

    Attributes:
        size: width and height of level 0.
        mpp: micrometres per pixel of level 0 in x and y, or None.
        objective: magnification of the objective, or None.
        reader: which library reads, with its version.
    """

    def __init__(self, path: Path) -> None:
        """Open a slide; ImageReadError if that is impossible, ImportError if there is no library for it."""
        opener, self.reader = _opener()
        try:
            self.slide = opener(str(path))
            self.size: tuple[int, int] = tuple(self.slide.dimensions)
        except Exception as error:  # the libraries raise several kinds, each its own
            raise ImageReadError(f"the slide cannot be read: {error}") from error
        x, y = (_number(self.slide.properties.get(f"openslide.mpp-{axis}")) for axis in "xy")
        self.mpp = (x, y) if x and y else None
        self.objective = _number(self.slide.properties.get("openslide.objective-power"))

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
        """Pixels [height, width, 3] uint8 of a level, from (x, y) in that level; what was not scanned is white.

        Raises:
            ImageReadError: the region is damaged.
        """
        scale = self.downsample(level)
        try:
            found = self.slide.read_region((round(x * scale), round(y * scale)), level, (width, height))
            pixels = np.asarray(found)
        except Exception as error:
            raise ImageReadError(f"level {level} cannot be read at ({x}, {y}): {error}") from error
        if pixels.shape[2] == 3:
            return pixels
        rgb, alpha = pixels[..., :3], pixels[..., 3:]
        if alpha.min() == 255:
            return np.ascontiguousarray(rgb)
        share = alpha.astype(np.float32) / 255
        return (rgb * share + 255 * (1 - share)).round().astype(np.uint8)

    def fit_tiles(self, tissue_share: Any) -> Iterator[np.ndarray]:
        """At most `FIT_TILES` tiles with tissue, evenly spread over the slide, in a level where they say something.

        `tissue_share` gives the share of tissue of an image [H, W, 3].
        """
        most = FIT_DOWNSAMPLE if self.mpp is None else 1.001 * FIT_MPP / max(self.mpp)
        level = max(i for i in range(len(self.levels)) if self.downsample(i) <= most or i == 0)
        width, height = self.levels[level]
        places = [(x, y) for y in range(0, height, FIT_TILE) for x in range(0, width, FIT_TILE)]
        places = self._with_tissue(places, level, tissue_share)
        step = max(1.0, len(places) / FIT_TILES)
        for number in range(min(len(places), FIT_TILES)):
            x, y = places[int(number * step)]
            yield self.read(x, y, min(FIT_TILE, width - x), min(FIT_TILE, height - y), level)

    def _with_tissue(self, places: list[tuple[int, int]], level: int, tissue_share: Any) -> list[tuple[int, int]]:
        """Those tiles of a level in which the smallest level shows tissue; all if it is too large, or shows none."""
        last = len(self.levels) - 1
        width, height = self.levels[last]
        if len(places) <= FIT_TILES or width * height > _MASK_PIXELS:
            return places
        small, scale = self.read(0, 0, width, height, last), self.downsample(last) / self.downsample(level)
        size = max(1, math.ceil(FIT_TILE / scale))
        found = []
        for x, y in places:
            left, top = int(x / scale), int(y / scale)
            part = small[top : top + size, left : left + size]
            if part.size and tissue_share(part) >= _LEAST_TISSUE:
                found.append((x, y))
        return found or places


def _opener() -> tuple[Any, str]:
    try:
        library = require("openslide", extra="slides", purpose="reading whole slides")
    except ImportError:
        try:
            fallback = require("tiffslide", extra="slides", purpose="reading whole slides")
        except ImportError:
            pass
        else:
            return fallback.TiffSlide, f"tiffslide {fallback.__version__}"
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
