"""A grid of tiles over a slide, at a resolution in micrometres a pixel."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ernet_fast.data.slide_reader import SlideReader
from ernet_fast.stain.slide_fit import tissue_map
from ernet_fast.stain.tissue import Tissue

ALIKE = 1.02
"""A level whose resolution is within this factor of the one wanted is read as it is."""


@dataclass(frozen=True)
class Grid:
    """Where the tiles of a slide lie, and how they are read.

    Attributes:
        level: that is read.
        read: width and height of a tile in pixels of the level.
        extent: the same in pixels of level 0.
        places: [tiles, 2] int64: x and y in pixels of level 0, row by row.
    """

    level: int
    read: tuple[int, int]
    extent: tuple[float, float]
    places: np.ndarray


@dataclass(frozen=True)
class GridForm:
    """What tiles are wanted, see `ernet_fast.stain.SlideTiles`."""

    size: int
    mpp: float | None
    overlap: int
    tissue: float
    slide_mpp: float | None

    def __post_init__(self) -> None:
        if self.size < 1 or not 0 <= self.overlap < self.size:
            raise ValueError(
                f"size={self.size}, overlap={self.overlap}; expected a positive size, and an overlap below it."
            )
        for name in ("mpp", "slide_mpp"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}={value!r}; expected micrometres a pixel, or None.")
        if not 0 <= self.tissue <= 1:
            raise ValueError(f"tissue={self.tissue!r}; expected a share from 0 to 1.")


def grid_of(reader: SlideReader, form: GridForm, tissue: Tissue, places: Any = None) -> Grid:
    """The tiles of a slide that lie wholly in it and have tissue, or those of the given places.

    Raises:
        ValueError: the slide has no such resolution, or a place lies outside of it.
    """
    scale = _scale(reader, form)  # pixels of level 0 for one of a tile, in x and y
    width, height = (form.size * one for one in scale)
    level = max(i for i in range(len(reader.levels)) if reader.downsample(i) <= min(scale) * ALIKE or i == 0)
    down = reader.downsample(level)
    read = [form.size if 1 / ALIKE <= one / down <= ALIKE else round(form.size * one / down) for one in scale]
    found = _places(reader, form, tissue, scale) if places is None else _checked(places, reader, (width, height))
    return Grid(level, (read[0], read[1]), (width, height), found)


def _places(reader: SlideReader, form: GridForm, tissue: Tissue, scale: tuple[float, float]) -> np.ndarray:
    """The tiles of the grid that lie wholly in the slide and have tissue."""
    step, axes = form.size - form.overlap, []
    width, height = (form.size * one for one in scale)
    for length, one in zip(reader.size, scale, strict=True):
        count = max(0, math.floor((length - form.size * one) / (step * one) + 1e-6) + 1)
        axes.append([round(number * step * one) for number in range(count)])
    places = [(x, y) for y in axes[1] for x in axes[0]]
    if form.tissue > 0:
        cells = tissue_map(reader, tissue)
        places = [(x, y) for x, y in places if cells.of(x, y, width, height) >= form.tissue]
    return np.array(places, np.int64).reshape(-1, 2)


def _checked(places: Any, reader: SlideReader, extent: tuple[float, float]) -> np.ndarray:
    """Places that were given, as [tiles, 2] int64."""
    found = np.asarray(places) if len(places) else np.zeros((0, 2), np.int64)
    if found.ndim != 2 or found.shape[1] != 2 or not np.issubdtype(found.dtype, np.integer):
        raise ValueError(
            f"places of {str(reader.path)!r} are {found.dtype} {found.shape}; expected whole numbers [tiles, 2]: x, y."
        )
    if len(found) and (found.min() < 0 or (found + np.floor(extent) > reader.size).any()):
        raise ValueError(f"some places of {str(reader.path)!r} lie outside of its {reader.size[0]}x{reader.size[1]}.")
    return found.astype(np.int64)


def _scale(reader: SlideReader, form: GridForm) -> tuple[float, float]:
    if form.mpp is None:
        return 1.0, 1.0
    mpp = reader.mpp or (None if form.slide_mpp is None else (form.slide_mpp, form.slide_mpp))
    if mpp is None:
        raise ValueError(
            f"{str(reader.path)!r} says no micrometres a pixel; give slide_mpp, or mpp=None for tiles of level 0."
        )
    if form.mpp * ALIKE < max(mpp):
        raise ValueError(
            f"mpp={form.mpp:g} is finer than {str(reader.path)!r}, which has {max(mpp):g} micrometres a pixel; "
            "tiles are not scaled up."
        )
    return form.mpp / mpp[0], form.mpp / mpp[1]
