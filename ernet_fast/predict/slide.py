"""A network's answer for every part of a whole slide, in constant memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from ernet_fast.console.progress import Reporter
from ernet_fast.data import ImageReadError
from ernet_fast.data.pixel_size import BREAKHIS_HEIGHT, breakhis_mpp
from ernet_fast.data.slide_reader import SlideReader
from ernet_fast.predict.grid import Grid, Tile
from ernet_fast.predict.trained import Stains, TrainedNetwork
from ernet_fast.stain.slide_fit import fit_tiles
from ernet_fast.stain.tissue import Tissue

STAINS = ("tile", "slide")

_TISSUE = Tissue()
_PICTURE_SIDE = 1600
"""Pixels of the longer side of a thumbnail, as far as whole pixels a cell allow."""


@dataclass(frozen=True)
class SlidePrediction:
    """What a network says about the tiles of a slide with R x C cells and K classes.

    Attributes:
        slide: the file.
        classes: names of the K classes.
        probabilities: [R, C, K] float32, NaN where there is too little tissue.
        tissue: [R, C], share of tissue of each tile.
        boxes: [R, C, 4] int64: x, y, width and height of each tile in pixels of level 0.
        thumbnail: uint8 [h, w, 3] of the slide, `cell_pixels` a cell.
        cell_pixels: height and width of a cell in the thumbnail.
        settings: how the slide was read, as plain values.
    """

    slide: Path
    classes: tuple[str, ...]
    probabilities: NDArray[np.float32]
    tissue: NDArray[np.float32]
    boxes: NDArray[np.int64]
    thumbnail: NDArray[np.uint8]
    cell_pixels: int
    settings: dict[str, Any]

    @property
    def looked_at(self) -> NDArray[np.bool_]:
        """[R, C], where the network looked."""
        return np.isfinite(self.probabilities[..., 0])

    def mean(self) -> NDArray[np.float64] | None:
        """Mean probability [K] of the tiles with tissue; None if there are none."""
        found = self.probabilities[self.looked_at]
        return found.mean(axis=0, dtype=np.float64) if len(found) else None

    def rows(self) -> Iterator[list[Any]]:
        """Header and one row a tile for a CSV file."""
        yield ["x", "y", "width", "height", "tissue_share", "predicted", *(f"p_{name}" for name in self.classes)]
        for where in np.ndindex(self.tissue.shape):
            values = self.probabilities[where]
            seen = bool(np.isfinite(values[0]))
            guess = self.classes[int(values.argmax())] if seen else ""
            shown = [f"{v:.6f}" if seen else "" for v in values]
            yield [*self.boxes[where].tolist(), f"{self.tissue[where]:.4f}", guess, *shown]


def predict_slide(
    trained: TrainedNetwork,
    slide: str | os.PathLike[str],
    *,
    field: float | None = None,
    mpp: float | None = None,
    overlap: float = 0.0,
    min_tissue: float = 0.1,
    stains: str | None = None,
    batch_size: int | None = None,
    reporter: Reporter | None = None,
) -> SlidePrediction:
    """Run a network over a slide, tile by tile.

    A tile shows as much tissue as a training image did, is read from the smallest level that has the pixels for it,
    and prepared as in training, with the stains of each tile, or of the whole slide if training was so. Memory holds a
    batch of tiles, and for each tile its probabilities and a few pixels of the thumbnail.

    Args:
        trained: the network.
        slide: a file that OpenSlide reads (or tifffile, where it is missing).
        field: height and width of a tile in micrometres; default: those of the BreakHis images that the network was
            trained on, if they were of one magnification (152 um at 200X, see `breakhis_mpp`).
        mpp: micrometres a pixel of level 0, where the slide does not say or is wrong.
        overlap: share of a tile's side by which neighbours overlap, from 0 up to 0.95: a finer map.
        min_tissue: least share of tissue of a tile that is looked at.
        stains: fitted on each ``"tile"``, or on tissue tiles of the whole ``"slide"``; default: as in training.
        batch_size: tiles a step; default: that of the training.
        reporter: where progress goes; default: stderr.

    Raises:
        ImageReadError: the slide cannot be read, or does not say how large its pixels are and `mpp` is not given.
        ValueError: an argument is out of range, or the field is not known.
        ImportError: there is no library to read slides.
    """
    if not 0 <= overlap <= 0.95 or not 0 <= min_tissue <= 1:
        raise ValueError(f"overlap={overlap}, min_tissue={min_tissue}; expected 0 to 0.95, and 0 to 1.")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size={batch_size}; expected a positive number.")
    if stains not in (None, *STAINS):
        raise ValueError(f"stains={stains!r}; expected one of {', '.join(map(repr, STAINS))}.")
    stains = stains or ("slide" if trained.by_slide else "tile")
    field = training_field(trained) if field is None else field
    reporter, reader = reporter or Reporter(), SlideReader(Path(slide))
    try:
        pixel = reader.mpp if mpp is None else (mpp, mpp)
        if pixel is None:
            raise ImageReadError("the slide does not say how large a pixel is; pass mpp (--mpp)")
        if not field > 0 or not min(pixel) > 0:
            raise ValueError(f"field={field}, mpp={pixel}; expected positive micrometres.")
        level = _level(reader, [field / side for side in pixel], trained.config.image_size)
        down = reader.downsample(level)
        wide, tall = (field / side / down for side in pixel)
        tile = max(1, round(wide)), max(1, round(tall))
        step = max(1.0, wide * (1 - overlap)), max(1.0, tall * (1 - overlap))
        grid = Grid((reader.levels[level][0], reader.levels[level][1]), tile, step)
        source = trained.common_stains(map(_image, fit_tiles(reader, _TISSUE))) if stains == "slide" else None
        map_of = _Map(trained, grid, down, min_tissue, source)
        with reporter.task(f"predict {Path(slide).name}", len(grid)) as task:
            for found in grid.tiles():
                pixels = reader.read(found.x, found.y, found.width, found.height, level)
                map_of.add(found, pixels, batch_size or trained.config.batch_size)
                task.advance(1)
            map_of.flush()
        settings = {
            "field_um": field, "mpp": list(pixel), "overlap": overlap, "min_tissue": min_tissue, "level": level,
            "tile_pixels": list(tile), "stains": stains, "reader": reader.reader,
        }  # fmt: skip
    finally:
        reader.close()
    return SlidePrediction(
        Path(slide), trained.classes, map_of.probabilities, map_of.tissue, map_of.boxes, map_of.thumbnail,
        map_of.cell_pixels, settings,
    )  # fmt: skip


def training_field(trained: TrainedNetwork) -> float:
    """Micrometres of the height of the BreakHis images of a training on one magnification; ValueError for others."""
    magnifications = trained.config.magnifications
    if magnifications is None or len(magnifications) != 1:
        shown = "all magnifications" if magnifications is None else " and ".join(f"{m}X" for m in magnifications)
        raise ValueError(
            f"the network was trained on {shown}, so how much tissue a tile is to show is not known; pass field "
            f"(--field) in micrometres: a BreakHis image is {breakhis_mpp(200) * BREAKHIS_HEIGHT:.0f} high at 200X."
        )
    return breakhis_mpp(magnifications[0]) * BREAKHIS_HEIGHT


def _level(reader: SlideReader, tile: list[float], least: int) -> int:
    """The smallest level in which a tile of `tile` pixels of level 0 has `least` pixels a side; else level 0."""
    fits = [k for k in range(len(reader.levels)) if min(tile) / reader.downsample(k) >= least]
    return max(fits, key=reader.downsample, default=0)


def _image(pixels: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


class _Map:
    """The answers so far, and the tiles that wait for a full batch."""

    def __init__(
        self, trained: TrainedNetwork, grid: Grid, down: float, min_tissue: float, source: Stains | None
    ) -> None:
        self._trained, self._down, self._min_tissue, self._source = trained, down, min_tissue, source
        shape = grid.rows, grid.columns
        self.probabilities = np.full((*shape, len(trained.classes)), np.nan, np.float32)
        self.tissue = np.zeros(shape, np.float32)
        self.boxes = np.zeros((*shape, 4), np.int64)
        self.cell_pixels = min(64, max(1, _PICTURE_SIDE // max(shape)))
        height, width = (
            max(1, round(side / step * self.cell_pixels))
            for side, step in zip(reversed(grid.size), reversed(grid.step), strict=True)
        )
        self.thumbnail = np.full((height, width, 3), 255, np.uint8)
        self._waiting: list[tuple[tuple[int, int], torch.Tensor]] = []

    def add(self, tile: Tile, pixels: NDArray[np.uint8], batch_size: int) -> None:
        """Note a tile [h, w, 3]; the network looks when there is a batch."""
        where = tile.row, tile.column
        share = _TISSUE.share(pixels)
        self.tissue[where] = share
        self.boxes[where] = [round(v * self._down) for v in (tile.x, tile.y, tile.width, tile.height)]
        self._draw(tile, pixels)
        if share >= self._min_tissue and share > 0:
            self._waiting.append((where, self._trained.prepare(_image(pixels), self._source)))
        if len(self._waiting) >= batch_size:
            self.flush()

    def flush(self) -> None:
        """Let the network look at what waits."""
        if self._waiting:
            places, images = zip(*self._waiting, strict=True)
            for where, values in zip(places, self._trained.probabilities(images).numpy(), strict=True):
                self.probabilities[where] = values
            self._waiting = []

    def _draw(self, tile: Tile, pixels: NDArray[np.uint8]) -> None:
        """The cell of the tile in the thumbnail."""
        k, (x, y, width, height) = self.cell_pixels, tile.cell
        part = self.thumbnail[tile.row * k : (tile.row + 1) * k, tile.column * k : (tile.column + 1) * k]
        left, top = x - tile.x, y - tile.y
        cell = pixels[top : top + height, left : left + width]
        if part.size and cell.size:
            small = F.interpolate(torch.from_numpy(cell).permute(2, 0, 1)[None].float(), part.shape[:2], mode="area")
            part[:] = small[0].permute(1, 2, 0).round().to(torch.uint8).numpy()
