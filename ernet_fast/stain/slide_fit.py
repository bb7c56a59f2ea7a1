"""Where the tissue of a slide is, and the stains of a slide from tiles of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ernet_fast.data.slide_reader import SlideReader
from ernet_fast.stain.tissue import Tissue

FIT_TILES, FIT_TILE = 400, 512
"""Tiles that stains are fitted on at most, and their size in pixels."""

FIT_MPP, FIT_DOWNSAMPLE = 1.0, 4.0
"""Stains are fitted on the smallest level of at most so many micrometres a pixel, in which nuclei are still apart from
what is around them; if the slide says no size, on one that is at most so much smaller than level 0.
"""

_MAP_CELLS = 1 << 20  # of a map of tissue, at most
_MASK_PIXELS = 1 << 24  # of a level that is read to find the tiles to fit
_LEAST_TISSUE = 0.05  # of a tile that is fitted
_TRIES = 4 * FIT_TILES  # tiles that are looked at where no small level says where the tissue is
_STRIPE = 1024  # pixels of a level that are read together, each way


@dataclass(frozen=True)
class TissueMap:
    """How much of a slide is tissue, in square cells.

    Attributes:
        share: [rows, columns] float64, the share of tissue of each cell.
        cell: width of a cell in pixels of level 0.
    """

    share: np.ndarray
    cell: float

    @cached_property
    def _sums(self) -> np.ndarray:
        """[rows + 1, columns + 1]: sums over all cells above and to the left."""
        return np.pad(self.share.cumsum(0).cumsum(1), ((1, 0), (1, 0)))

    def of(self, x: float, y: float, width: float, height: float) -> float:
        """The share of tissue in the cells that a region touches, given in pixels of level 0."""
        rows, columns = self.share.shape
        left, top = min(columns, max(0, int(x / self.cell))), min(rows, max(0, int(y / self.cell)))
        right = min(columns, max(left, math.ceil((x + width) / self.cell)))
        bottom = min(rows, max(top, math.ceil((y + height) / self.cell)))
        area = (right - left) * (bottom - top)
        if area <= 0:
            return 0.0
        s = self._sums
        return float(s[bottom, right] - s[top, right] - s[bottom, left] + s[top, left]) / area


def tissue_map(reader: SlideReader, tissue: Tissue) -> TissueMap:
    """The tissue of a slide, from its smallest level, which is read stripe by stripe."""
    width, height = reader.levels[-1]
    size = max(1, math.ceil(math.sqrt(width * height / _MAP_CELLS)))  # pixels of a cell, each way
    return TissueMap(_cells(reader, size, tissue.mask), size * reader.downsample(len(reader.levels) - 1))


def thumbnail(reader: SlideReader, most: int) -> np.ndarray:
    """A slide as an image uint8 [h, w, 3] of at most `most` pixels each way, from its smallest level."""
    means = _cells(reader, max(1, math.ceil(max(reader.levels[-1]) / most)), lambda pixels: pixels)
    return means.round().astype(np.uint8)


def _cells(reader: SlideReader, size: int, values: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Means of what is made of the smallest level, over squares of size x size, read part by part."""
    level = len(reader.levels) - 1
    width, height = reader.levels[level]
    step = _STRIPE // size * size or size
    rows = []
    for y in range(0, height, step):
        parts = [
            _means(values(reader.read(x, y, min(step, width - x), min(step, height - y), level)), size)
            for x in range(0, width, step)
        ]
        rows.append(np.concatenate(parts, axis=1))
    return np.concatenate(rows)


def _means(values: np.ndarray, size: int) -> np.ndarray:
    """Means over squares of size x size of [h, w, ...]; those at the edges are smaller."""
    rows, columns = (np.arange(0, length, size) for length in values.shape[:2])
    sums = np.add.reduceat(np.add.reduceat(values, rows, axis=0, dtype=np.int64), columns, axis=1)
    heights, widths = (np.diff([*at, length]) for at, length in zip((rows, columns), values.shape[:2], strict=True))
    return sums / np.outer(heights, widths).reshape(len(rows), len(columns), *[1] * (values.ndim - 2))


def fit_tiles(reader: SlideReader, tissue: Tissue) -> Iterator[np.ndarray]:
    """At most `FIT_TILES` tiles [h, w, 3] with tissue, evenly spread, in a level where they say something.

    A slide of no more tiles gives all of them.
    """
    most = FIT_DOWNSAMPLE if reader.mpp is None else 1.001 * FIT_MPP / max(reader.mpp)
    level = max(i for i in range(len(reader.levels)) if reader.downsample(i) <= most or i == 0)
    width, height = reader.levels[level]
    places = [(x, y) for y in range(0, height, FIT_TILE) for x in range(0, width, FIT_TILE)]

    def tile(x: int, y: int) -> np.ndarray:
        return reader.read(x, y, min(FIT_TILE, width - x), min(FIT_TILE, height - y), level)

    small = reader.levels[-1]
    if len(places) > FIT_TILES and small[0] * small[1] > _MASK_PIXELS:
        yield from _tried(places, tile, tissue)
        return
    if len(places) > FIT_TILES:
        cells, scale = tissue_map(reader, tissue), reader.downsample(level)
        found = [
            (x, y) for x, y in places if cells.of(*(scale * n for n in (x, y, FIT_TILE, FIT_TILE))) >= _LEAST_TISSUE
        ]
        places = found or places
    step = max(1.0, len(places) / FIT_TILES)
    for number in range(min(len(places), FIT_TILES)):
        yield tile(*places[int(number * step)])


def _tried(
    places: list[tuple[int, int]], tile: Callable[[int, int], np.ndarray], tissue: Tissue
) -> Iterator[np.ndarray]:
    """Tiles with tissue of a slide without a small level, looked at in an order that spreads them.

    The reader remembers those of one colour: they are not decoded again when the slide is written.
    """
    step = round(len(places) * (math.sqrt(5) - 1) / 2) or 1  # the golden section leaves no part out for long
    while math.gcd(step, len(places)) != 1:
        step += 1
    found = 0
    for number in range(min(len(places), _TRIES)):
        pixels = tile(*places[number * step % len(places)])
        if tissue.share(pixels) >= _LEAST_TISSUE:
            yield pixels
            found += 1
            if found == FIT_TILES:
                return
