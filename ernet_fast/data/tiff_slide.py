"""Whole slides in TIFF files by tifffile alone, where OpenSlide is missing.

Pyramids of tiled RGB images of 8 bits: Aperio's .svs, generic and OME-TIFF. Anything else needs OpenSlide.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from ernet_fast._optional import require

_COMPRESSIONS = (1, 5, 7, 8, 32946, 50000)  # none, LZW, JPEG, deflate under two numbers, Zstandard
_PHOTOMETRIC = (2, 6)  # RGB and YCbCr
_MICROMETRES = {2: 25400.0, 3: 10000.0}  # in an inch and a centimetre, TIFF's units of resolution
_MOST_STRETCH = 0.02  # by which the two sides of a level may be scaled differently


class TiffSlide:
    """An open slide, with as much of `openslide.OpenSlide`'s interface as `SlideReader` uses.

    Attributes:
        dimensions: width and height of level 0.
        level_dimensions: the same of every level, the largest first.
        level_downsamples: how much smaller each is than level 0.
        properties: `openslide.mpp-x`, `openslide.mpp-y` and `openslide.objective-power`, where the file has them.

    Raises:
        ValueError: there is no pyramid that is read here.
    """

    def __init__(self, path: str) -> None:
        tifffile = require("tifffile", extra="slides", purpose="reading whole slides")
        self._file = tifffile.TiffFile(path)
        try:
            self._levels = _levels(self._file)
        except BaseException:
            self._file.close()
            raise
        self._reading = threading.Lock()
        self.level_dimensions = [(level.imagewidth, level.imagelength) for level in self._levels]
        self.dimensions = self.level_dimensions[0]
        width, height = self.dimensions
        self.level_downsamples = [(width / w + height / h) / 2 for w, h in self.level_dimensions]
        self.properties = _properties(self._levels[0])

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def read_region(self, location: tuple[int, int], level: int, size: tuple[int, int]) -> np.ndarray:
        """Pixels [height, width, 3] uint8 of a level, from `location` in level 0; beyond the image they are white."""
        page, scale = self._levels[level], self.level_downsamples[level]
        left, top = (round(place / scale) for place in location)
        out = np.full((size[1], size[0], 3), 255, np.uint8)
        columns = -(-page.imagewidth // page.tilewidth)
        right, bottom = min(left + size[0], page.imagewidth), min(top + size[1], page.imagelength)
        for row in range(max(top, 0) // page.tilelength, -(-bottom // page.tilelength)):
            for column in range(max(left, 0) // page.tilewidth, -(-right // page.tilewidth)):
                tile = self._tile(page, row * columns + column)
                if tile is None:
                    continue
                y, x = row * page.tilelength, column * page.tilewidth
                first, last = max(y, top, 0), min(y + page.tilelength, bottom)
                begin, end = max(x, left, 0), min(x + page.tilewidth, right)
                out[first - top : last - top, begin - left : end - left] = tile[
                    first - y : last - y, begin - x : end - x
                ]
        return out

    def _tile(self, page: Any, number: int) -> np.ndarray | None:
        """A decoded tile [h, w, 3]; None where nothing was scanned."""
        offset, count = page.dataoffsets[number], page.databytecounts[number]
        if count == 0:
            return None
        with self._reading:
            self._file.filehandle.seek(offset)
            data = self._file.filehandle.read(count)
        tile, _, _ = page.decode(data, number, jpegtables=page.jpegtables)
        return tile[0]


def _levels(file: Any) -> list[Any]:
    """The pages of the pyramid, the largest first."""
    first = file.pages[0]
    if not first.is_tiled:
        raise ValueError("its first image is not tiled; OpenSlide may read it")
    kind = first.compression, first.photometric, first.samplesperpixel, first.bitspersample, first.planarconfig
    if not (kind[0] in _COMPRESSIONS and kind[1] in _PHOTOMETRIC and kind[2:] == (3, 8, 1)):
        raise ValueError(
            f"compression {first.compression!s} of {first.samplesperpixel} channels of {first.bitspersample} bits is "
            "not read by tifffile alone; install OpenSlide (ernet_fast[slides])"
        )
    levels = [first]
    for page in _others(file):
        width, height = first.imagewidth / page.imagewidth, first.imagelength / page.imagelength
        alike = page.is_tiled and page.compression in _COMPRESSIONS and page.samplesperpixel == 3
        if alike and page.imagewidth < levels[-1].imagewidth and abs(width / height - 1) <= _MOST_STRETCH:
            levels.append(page)
    return levels


def _others(file: Any) -> Iterator[Any]:
    """The images beside the first that may be its smaller levels: its sub-images, or the pages behind it."""
    if file.pages[0].pages is not None:
        yield from file.pages[0].pages
    else:
        yield from (page.aspage() for page in file.pages[1:])


def _properties(page: Any) -> dict[str, str]:
    found: dict[str, str] = {}
    text = page.description or ""
    if text.startswith("Aperio"):
        for name, keys in (("MPP", ("mpp-x", "mpp-y")), ("AppMag", ("objective-power",))):
            match = re.search(rf"\|\s*{name}\s*=\s*([0-9.]+)", text)
            found |= {f"openslide.{key}": match[1] for key in keys} if match else {}
        return found
    unit = _MICROMETRES.get(page.tags.valueof("ResolutionUnit", 2))
    for axis in "xy":
        pixels, units = page.tags.valueof(f"{axis.upper()}Resolution", (0, 1))
        if unit and pixels and units:
            found[f"openslide.mpp-{axis}"] = repr(unit * units / pixels)
    match = re.search(r'NominalMagnification="([0-9.]+)"', text)
    return found | ({"openslide.objective-power": match[1]} if match else {})
