"""What an image file says beside its pixels, as Pillow's options to write another like it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ernet_fast._optional import require

_X_RESOLUTION, _Y_RESOLUTION, _RESOLUTION_UNIT = 282, 283, 296
_TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange width and height
_EXIF_ORIENTATION = 274
_KEPT_TIFF = ("raw", "packbits", "tiff_lzw", "tiff_adobe_deflate", "jpeg")
"""Compressions that a TIFF file is written with again; others (of fax machines, and rare ones) become LZW."""


@dataclass(frozen=True)
class FileForm:
    """Format, compression and metadata of an image file.

    Attributes:
        format: Pillow's name: PNG, JPEG, TIFF or WEBP.
        compression: options of Pillow's `save` that hold for this format alone: the quantisation tables and chroma
            subsampling of a JPEG file, the compression of a TIFF file, whether a WebP file is lossless.
        resolution: pixels per inch in x and y, or None.
        metadata: `icc_profile` and `exif` as bytes, where the file has them; the orientation is that of the pixels.
    """

    format: str
    compression: dict[str, Any] = field(default_factory=dict)
    resolution: tuple[float, float] | None = None
    metadata: dict[str, bytes] = field(default_factory=dict)


def form_of(image: Any, data: bytes) -> FileForm:
    """The form of a Pillow image, read from `data` and not turned yet."""
    compression: dict[str, Any] = {}
    if image.format == "JPEG":
        sampling = require("PIL.JpegImagePlugin", extra="train", purpose="reading images").get_sampling(image)
        compression = {"qtables": dict(image.quantization), "subsampling": max(sampling, 0)}
    elif image.format == "TIFF":
        found = image.info.get("compression", "raw")
        compression = {"compression": found if found in _KEPT_TIFF else "tiff_lzw"}
    elif image.format == "WEBP":
        compression = {"lossless": b"VP8L" in _chunks(data)}
    resolution = _resolution(image)
    if resolution is not None and image.getexif().get(_EXIF_ORIENTATION) in _TURNED:
        resolution = resolution[::-1]
    return FileForm(image.format, compression, resolution)


def _chunks(data: bytes) -> list[bytes]:
    """The kinds of the chunks of a WebP file."""
    kinds, position = [], 12
    while position + 8 <= len(data):
        kinds.append(data[position : position + 4])
        length = int.from_bytes(data[position + 4 : position + 8], "little")
        position += 8 + length + length % 2
    return kinds


def metadata_of(image: Any) -> dict[str, bytes]:
    """ICC profile and EXIF data of a Pillow image that was turned the right way up.

    Not the EXIF data of a TIFF file, which are tags of the file itself.
    """
    names = ("icc_profile",) if image.format == "TIFF" else ("icc_profile", "exif")
    return {name: image.info[name] for name in names if image.info.get(name)}


def _resolution(image: Any) -> tuple[float, float] | None:
    found = image.info.get("dpi")
    if found is None and image.format == "TIFF" and image.tag_v2.get(_RESOLUTION_UNIT) == 3:
        x, y = image.tag_v2.get(_X_RESOLUTION), image.tag_v2.get(_Y_RESOLUTION)
        found = None if x is None or y is None else (2.54 * float(x), 2.54 * float(y))
    try:
        x, y = map(float, found)
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    return (x, y) if 1 < x < 1e9 and 1 < y < 1e9 else None  # Pillow gives 1 where a TIFF file has no unit
