"""Pyramids, as tiled BigTIFF or OME-Zarr files, written tile by tile in constant memory."""

from __future__ import annotations

import io
import mmap
import os
import tempfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from ernet_fast._optional import require
from ernet_fast.data.slide_reader import colour_of
from ernet_fast.scale.zarr_file import ZarrSink, zarr_chunk

COMPRESSIONS = ("jpeg", "deflate")
SMALLEST = 512
"""The pyramid ends with a level that is no wider or higher."""

_SUBSAMPLING = 2  # 4:2:0, as scanners have it
Tile = tuple[int, int, int, int]
"""x, y, width and height."""


@dataclass(frozen=True)
class Form:
    """How a pyramid is written.

    Attributes:
        tile: width and height of tiles, a multiple of 16.
        compression: "jpeg" or "deflate" (without loss).
        quality: of JPEG.
        mpp: micrometres per pixel of the first level in x and y, or None.
        description: of the first level.
        workers: threads.
        container: "tiff"; "ome" (OME-TIFF, with `description` as its XML) or "zarr" (OME-Zarr in a zip file, whose name
            is `description`), without loss whatever `compression` is.
    """

    tile: int = 512
    compression: str = "jpeg"
    quality: int = 90
    mpp: tuple[float, float] | None = None
    description: str = ""
    workers: int = 1
    container: str = "tiff"


def needs_writer(compression: str) -> None:
    """ImportError unless the packages are here that slides of this compression are written with."""
    for package in ("tifffile", "imagecodecs") if compression == "jpeg" else ("tifffile",):
        require(package, extra="slides", purpose=f"writing whole slides with {compression}")


def tiles_of(width: int, height: int, tile: int) -> Iterator[Tile]:
    """The tiles of a level, row by row; those at the edges are smaller."""
    for y in range(0, height, tile):
        for x in range(0, width, tile):
            yield x, y, min(tile, width - x), min(tile, height - y)


def write_pyramid(
    file: IO[bytes], beside: Path, size: tuple[int, int], read: Callable[[Tile], np.ndarray], form: Form,
    advance: Callable[[], None],
) -> None:  # fmt: skip
    """Write an image of `size` (width, height) and levels of half its size each, down to `SMALLEST`.

    Levels after the first wait in files without a name: a third of the bytes of the pixels.

    Args:
        file: where to.
        beside: the folder of these files.
        size: width and height.
        read: gives the pixels [h, w, 3] uint8 of a tile of the first level; called once for each, by several threads.
        form: how it is written.
        advance: called for each tile of the first level.
    """
    with ThreadPoolExecutor(form.workers) as pool, _sink(file, size, form) as sink:
        level, source = 0, None
        while True:
            smaller = None if max(size) <= SMALLEST else _level_file(beside, size)
            mapped = [one for one in (source, smaller) if one is not None]
            sink.write(_encoded_tiles(size, read, smaller, mapped, form, pool, advance), size, level)
            if smaller is None:
                return
            level, size, source = level + 1, (smaller.shape[1], smaller.shape[0]), smaller
            read, advance = _reader_of(smaller), _nothing


def _sink(file: IO[bytes], size: tuple[int, int], form: Form) -> Any:
    """What the levels of a pyramid are written to."""
    sizes = [size]
    while max(sizes[-1]) > SMALLEST:
        sizes.append((max(1, sizes[-1][0] // 2), max(1, sizes[-1][1] // 2)))
    if form.container == "zarr":
        return ZarrSink(file, sizes, form.tile, form.mpp, form.description)
    return _TiffSink(file, form, len(sizes))


class _TiffSink:
    """BigTIFF: levels are pages, or in OME-TIFF sub-images of the first."""

    def __init__(self, file: IO[bytes], form: Form, levels: int) -> None:
        tifffile = require("tifffile", extra="slides", purpose="writing whole slides")
        self.form, self.levels = form, levels
        self.writer = tifffile.TiffWriter(file, bigtiff=True)

    def __enter__(self) -> _TiffSink:
        return self

    def __exit__(self, *error: Any) -> None:
        self.writer.close()

    def write(self, tiles: Iterator[bytes], size: tuple[int, int], level: int) -> None:
        """One level, of which `tiles` are the tiles row by row."""
        form, jpeg = self.form, self.form.compression == "jpeg"
        resolution = None if form.mpp is None else tuple(1e4 / value / 2**level for value in form.mpp)
        first: dict[str, Any] = {"description": form.description}
        if form.container == "ome" and self.levels > 1:
            first["subifds"] = self.levels - 1
        self.writer.write(
            tiles, shape=(size[1], size[0], 3), dtype=np.uint8, tile=(form.tile, form.tile), metadata=None,
            compression="jpeg" if jpeg else "zlib", photometric="ycbcr" if jpeg else "rgb",
            subsampling=(_SUBSAMPLING, _SUBSAMPLING) if jpeg else None, planarconfig="contig",
            resolution=resolution, resolutionunit="CENTIMETER" if resolution else None, software=False,
            subfiletype=1 if level else 0, **({} if level else first),
        )  # fmt: skip


def _nothing() -> None:
    """Levels after the first are no progress to speak of."""


def _level_file(beside: Path, size: tuple[int, int]) -> np.memmap:
    """A level of half the size in a file without a name, which ends with the process; OSError if there is no room."""
    width, height = (max(1, length // 2) for length in size)
    with tempfile.TemporaryFile(dir=beside) as file:
        if hasattr(os, "posix_fallocate"):  # on a full disk, writing to mapped memory would end the process
            os.posix_fallocate(file.fileno(), 0, 3 * width * height)
        return np.memmap(file, np.uint8, "r+" if hasattr(os, "posix_fallocate") else "w+", shape=(height, width, 3))


def _reader_of(level: np.memmap) -> Callable[[Tile], np.ndarray]:
    def read(tile: Tile) -> np.ndarray:
        x, y, width, height = tile
        return np.array(level[y : y + height, x : x + width])

    return read


def _encoded_tiles(
    size: tuple[int, int], read: Callable[[Tile], np.ndarray], smaller: np.memmap | None, mapped: list[np.memmap],
    form: Form, pool: ThreadPoolExecutor, advance: Callable[[], None],
) -> Iterator[bytes]:  # fmt: skip
    """The tiles of one level as they stand in the file; beside it the next level, of half its size, into `smaller`.

    After each row of tiles the pages of the `mapped` levels, read and written, are given back to the system.
    """
    blank: dict[tuple[int, int, int], bytes] = {}  # encoded tiles of one colour

    def make(tile: Tile) -> bytes:
        pixels = read(tile)
        if smaller is not None:
            _halve(pixels, tile, smaller)
        colour = colour_of(pixels)
        if colour is None or colour in blank:
            return _encoded(pixels, form) if colour is None else blank[colour]
        return blank.setdefault(colour, _encoded(pixels, form))

    waiting: deque[Any] = deque()
    row = 0
    for tile in tiles_of(*size, form.tile):
        waiting.append(pool.submit(make, tile))
        if len(waiting) > 2 * form.workers:
            yield waiting.popleft().result()
            advance()
        if tile[1] != row:
            row = tile[1]
            for one in mapped:
                let_go(one)
    while waiting:
        yield waiting.popleft().result()
        advance()


def _halve(pixels: np.ndarray, tile: Tile, smaller: np.memmap) -> None:
    """The means of 2 x 2 pixels of a tile, into the next level; an odd last row or column has no place there."""
    x, y = tile[0] // 2, tile[1] // 2
    height, width = (min(tile[3] // 2, smaller.shape[0] - y), min(tile[2] // 2, smaller.shape[1] - x))
    if width and height:
        parts = pixels[: 2 * height, : 2 * width].reshape(height, 2, width, 2, 3).astype(np.uint16)
        smaller[y : y + height, x : x + width] = (parts.sum(axis=(1, 3)) + 2) >> 2
    elif x < smaller.shape[1] and y < smaller.shape[0]:  # an image one pixel wide or high
        smaller[y, x] = pixels[0, 0]


def _encoded(pixels: np.ndarray, form: Form) -> bytes:
    """A tile as it stands in the file; one at an edge is filled up with its last row and column."""
    missing = [(0, form.tile - length) for length in pixels.shape[:2]]
    if any(after for _, after in missing):
        pixels = np.pad(pixels, (*missing, (0, 0)), mode="edge")
    if form.container == "zarr":
        return zarr_chunk(pixels)
    if form.compression == "deflate":
        return zlib.compress(np.ascontiguousarray(pixels).tobytes(), 6)
    out = io.BytesIO()
    picture = require("PIL.Image", extra="train", purpose="writing images").fromarray(np.ascontiguousarray(pixels))
    picture.save(out, "JPEG", quality=form.quality, subsampling=_SUBSAMPLING)
    return out.getvalue()


def let_go(level: np.memmap) -> None:
    """Unmap the pages of a level; the system keeps what is in them."""
    base: Any = level
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)
