"""OME-Zarr images (version 0.4 of the format, Zarr version 2) in one zip file, written chunk by chunk.

https://ngff.openmicroscopy.org/0.4: an array [channels, height, width] a level, and the sizes of their pixels beside
them. Times in the zip file are constant, so that equal images are equal files.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from typing import IO, Any

import numpy as np

SUFFIX = ".zarr.zip"
CHUNK = 512
"""Width and height of the chunks of images that are no slides."""

_LEVEL = 6  # of zlib
_TIME = (1980, 1, 1, 0, 0, 0)  # the first that a zip file can say


class ZarrSink:
    """A file that levels are written to, the largest first."""

    def __init__(
        self,
        file: IO[bytes],
        sizes: Sequence[tuple[int, int]],
        chunk: int,
        mpp: tuple[float, float] | None,
        name: str = "",
    ) -> None:
        """Of levels of these widths and heights in chunks; `mpp` of the first in x and y."""
        self.chunk = chunk
        self.zip = zipfile.ZipFile(file, "w", zipfile.ZIP_STORED)
        self._put(".zgroup", {"zarr_format": 2})
        self._put(".zattrs", {"multiscales": [_multiscale(sizes, mpp, name)]})

    def __enter__(self) -> ZarrSink:
        return self

    def __exit__(self, kind: Any, *error: Any) -> None:
        self.zip.close()

    def write(self, chunks: Iterator[bytes], size: tuple[int, int], level: int) -> None:
        """One level, of which `chunks` are the chunks row by row, as `zarr_chunk` gives them."""
        width, height = size
        self._put(
            f"{level}/.zarray",
            {
                "zarr_format": 2, "shape": [3, height, width], "chunks": [3, self.chunk, self.chunk], "dtype": "|u1",
                "compressor": {"id": "zlib", "level": _LEVEL}, "fill_value": 0, "order": "C", "filters": None,
                "dimension_separator": "/",
            },
        )  # fmt: skip
        columns = -(-width // self.chunk)
        for number, data in enumerate(chunks):
            self._put(f"{level}/0/{number // columns}/{number % columns}", data)

    def _put(self, name: str, content: dict[str, Any] | bytes) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content, indent=1).encode("ascii")
        self.zip.writestr(zipfile.ZipInfo(name, _TIME), data)


def zarr_chunk(pixels: np.ndarray) -> bytes:
    """A full chunk [h, w, 3] as it is stored."""
    return zlib.compress(pixels.transpose(2, 0, 1).tobytes(), _LEVEL)


def write_image(file: IO[bytes], pixels: np.ndarray, resolution: tuple[float, float] | None) -> None:
    """An image [H, W, 3] uint8 as a group of one level; `resolution` in pixels per inch."""
    height, width = pixels.shape[:2]
    mpp = None if resolution is None else (25400 / resolution[0], 25400 / resolution[1])

    def chunks() -> Iterator[bytes]:
        for y in range(0, height, CHUNK):
            for x in range(0, width, CHUNK):
                part = pixels[y : y + CHUNK, x : x + CHUNK]
                yield zarr_chunk(np.pad(part, ((0, CHUNK - part.shape[0]), (0, CHUNK - part.shape[1]), (0, 0))))

    with ZarrSink(file, [(width, height)], CHUNK, mpp) as sink:
        sink.write(chunks(), (width, height), 0)


def _multiscale(sizes: Sequence[tuple[int, int]], mpp: tuple[float, float] | None, name: str) -> dict[str, Any]:
    unit = {} if mpp is None else {"unit": "micrometer"}
    x, y = mpp or (1.0, 1.0)
    return {
        "version": "0.4",
        **({"name": name} if name else {}),
        "axes": [{"name": "c", "type": "channel"}, *({"name": n, "type": "space", **unit} for n in "yx")],
        "datasets": [
            {
                "path": str(level),
                "coordinateTransformations": [{"type": "scale", "scale": [1.0, y * 2**level, x * 2**level]}],
            }
            for level in range(len(sizes))
        ],
    }
