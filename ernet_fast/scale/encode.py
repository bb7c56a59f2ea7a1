"""Writing pixels as image files: format by the name, everything else as in the file they come from."""

from __future__ import annotations

import hashlib
from pathlib import PurePath
from typing import IO, Any

import numpy as np

from ernet_fast._optional import require
from ernet_fast.data import fast_jpeg
from ernet_fast.data.file_form import FileForm
from ernet_fast.scale import zarr_file

QUALITY = 95
"""Of JPEG and lossy WebP files whose source says none."""

PNG_LEVEL = 1
"""Compression of PNG files: twice as fast as Pillow's 6, with files of tissue 3 % larger."""

_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".tif": "TIFF", ".tiff": "TIFF", ".webp": "WEBP"}
_INCH = 2  # TIFF's unit of resolution
_MOST_RESOLUTION = {"JPEG": 65535, "PNG": 5e7, "TIFF": 5e7}
"""Pixels per inch that the format can say; Pillow writes a wrong number of more. WebP has none beside EXIF's."""

_WITHOUT_EXIF = ("TIFF",)


class HashedFile:
    """A file that is hashed while it is written from one end to the other.

    It has no descriptor: with one Pillow goes past the buffer, and tells no full disk.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._sha256 = file, hashlib.sha256()
        self._straight = True
        self.flush, self.tell, self.read = file.flush, file.tell, getattr(file, "read", None)

    def write(self, data: Any) -> int:
        """As of a file."""
        if self._straight:
            self._sha256.update(data)
        return self._file.write(data)

    def seek(self, *place: int) -> int:
        """As of a file; what is written from here on is not hashed."""
        self._straight = False
        return self._file.seek(*place)

    @property
    def sha256(self) -> str:
        """Of what was written, hexadecimal; empty where that was not straight."""
        return self._sha256.hexdigest() if self._straight else ""


def encode(file: IO[bytes], pixels: np.ndarray, name: str, form: FileForm, quality: int | None = None) -> None:
    """Write pixels [H, W, 3] uint8 to `file` in the format of the suffix of `name`.

    Args:
        file: where to.
        pixels: the image.
        name: of the file.
        form: that of the image's source. Its resolution and metadata are kept; its quantisation tables, chroma
            subsampling and compression where the format is the same. Otherwise JPEG has `QUALITY` without subsampling,
            TIFF LZW, WebP is lossless unless the source is lossy. Zarr keeps the resolution alone.
        quality: of JPEG and lossy WebP in place of the source's, 1 to 100.
    """
    if name.lower().endswith(zarr_file.SUFFIX):
        zarr_file.write_image(file, pixels, form.resolution)
        return
    pil = require("PIL.Image", extra="train", purpose="writing images")
    kind = _FORMATS[PurePath(name).suffix.lower()]
    options = _options(kind, form, quality)
    data = fast_jpeg.encode(pixels, **{"quality": None, "qtables": None, **options}) if kind == "JPEG" else None
    if data is not None:
        file.write(data)
    else:
        pil.fromarray(pixels).save(file, format=kind, **options)


def _options(kind: str, form: FileForm, quality: int | None) -> dict[str, Any]:
    options: dict[str, Any] = {name: value for name, value in form.metadata.items()}
    if kind in _WITHOUT_EXIF:
        options.pop("exif", None)
    if form.resolution is not None and max(form.resolution) <= _MOST_RESOLUTION.get(kind, 0):
        x, y = form.resolution
        if kind == "TIFF":
            options |= {"x_resolution": x, "y_resolution": y, "resolution_unit": _INCH}
        else:
            options["dpi"] = (x, y)
    same = form.format == kind
    if kind == "JPEG":
        plain = {"quality": quality or QUALITY, "subsampling": form.compression["subsampling"] if same else 0}
        options |= form.compression if same and quality is None else plain
    elif kind == "PNG":
        options["compress_level"] = PNG_LEVEL
    elif kind == "TIFF":
        options |= form.compression if same else {"compression": "tiff_lzw"}
        if options["compression"] == "jpeg":
            options["quality"] = quality or QUALITY
    else:
        lossless = quality is None and (form.compression["lossless"] if same else form.format != "JPEG")
        options |= {"lossless": True, "quality": 0} if lossless else {"quality": quality or QUALITY}
    return options


def decoder() -> str:
    """Versions of the libraries that decode and encode: between them, decoded JPEG images differ by a grey level."""
    features = require("PIL.features", extra="train", purpose="reading and writing images")
    pil = require("PIL", extra="train", purpose="reading and writing images")
    parts = [f"Pillow {pil.__version__}"]
    for name in ("libjpeg_turbo", "jpg", "zlib", "libtiff", "webp"):
        version = features.version(name)
        if version and not (name == "jpg" and features.version("libjpeg_turbo")):
            parts.append(f"{name} {version}")
    if fast_jpeg.version():
        parts.append(fast_jpeg.version())
    return ", ".join(parts)
