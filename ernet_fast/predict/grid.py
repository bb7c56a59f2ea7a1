"""The places of a slide at which a network looks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple


class Tile(NamedTuple):
    """One look. Pixels of the level that is read; `cell` is the part that the look stands for."""

    row: int
    column: int
    x: int
    y: int
    width: int
    height: int
    cell: tuple[int, int, int, int]  # x, y, width, height


class Grid(NamedTuple):
    """Cells that cover a level of `size` (width, height), and around each a tile of `tile` (width, height).

    Cells lie `step` (x, y) pixels apart, the last ones cut by the border; a tile is centred on its cell, but for the
    border, where it is moved inwards. Where the level is smaller than a tile, tiles are as large as the level.
    """

    size: tuple[int, int]
    tile: tuple[int, int]
    step: tuple[float, float]

    @property
    def columns(self) -> int:
        """Cells of a row."""
        return max(1, math.ceil(self.size[0] / self.step[0] - 1e-6))

    @property
    def rows(self) -> int:
        """Rows of cells."""
        return max(1, math.ceil(self.size[1] / self.step[1] - 1e-6))

    def __len__(self) -> int:
        return self.rows * self.columns

    def tiles(self) -> Iterator[Tile]:
        """Every tile, row by row."""
        for row in range(self.rows):
            y, height, top, tall = self._along(1, row)
            for column in range(self.columns):
                x, width, left, wide = self._along(0, column)
                yield Tile(row, column, x, y, width, height, (left, top, wide, tall))

    def _along(self, axis: int, index: int) -> tuple[int, int, int, int]:
        """Start and length of the tile and of the cell `index` along x (0) or y (1)."""
        size, step = self.size[axis], self.step[axis]
        length = min(self.tile[axis], size)
        begin, end = round(index * step), min(round((index + 1) * step), size)
        start = round((index + 0.5) * step - length / 2)
        return min(max(start, 0), size - length), length, begin, max(end - begin, 1)
