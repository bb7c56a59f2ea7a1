"""JPEG by imagecodecs, where it is installed: the pixels and bytes of Pillow's, without its copies and its lock.

Both build on libjpeg-turbo with the same transform (JDCT_ISLOW) and upsampling. Pillow passes pixels through four bytes
each, and encodes while it holds the interpreter's lock. What imagecodecs has no words for is left to Pillow: images
that are not YCbCr, tables of another kind than libjpeg's.
"""

from __future__ import annotations

import functools
import importlib
import os
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

CHOICE = "ERNET_JPEG"
"""Environment variable: "pillow", or "auto" (imagecodecs where it is installed, the default)."""

_CHOICES = ("auto", "pillow")
_SAMPLING = {0: (1, 1), 1: (2, 1), 2: (2, 2)}  # Pillow's numbers of 4:4:4, 4:2:2 and 4:2:0
_ICC, _EXIF = b"ICC_PROFILE\0", b"Exif\0\0"
_MOST_ICC, _MOST_SEGMENT = 65519, 65533  # bytes of a part of a profile, and of a segment

# ITU-T T.81, tables K.1 and K.2
_LUMINANCE = (
    16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51,
    87, 80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92, 49, 64, 78, 87, 103, 121, 120, 101,
    72, 92, 95, 98, 112, 100, 103, 99,
)  # fmt: skip
_CHROMINANCE = (
    17, 18, 24, 47, 99, 99, 99, 99, 18, 21, 26, 66, 99, 99, 99, 99, 24, 26, 56, 99, 99, 99, 99, 99, 47, 66, *[99] * 38,
)  # fmt: skip


def library() -> Any:
    """The package imagecodecs; None where it is missing, or `CHOICE` says so. ValueError for another choice."""
    choice = os.environ.get(CHOICE, "auto")
    if choice not in _CHOICES:
        raise ValueError(f"{CHOICE}={choice!r}; expected {' or '.join(map(repr, _CHOICES))}.")
    return _imagecodecs() if choice == "auto" else None


@functools.cache
def _imagecodecs() -> Any:
    try:
        found = importlib.import_module("imagecodecs")
        return found if found.JPEG8.available else None
    except (ImportError, AttributeError):
        return None


def version() -> str:
    """What encodes and decodes JPEG in place of Pillow; empty for nothing."""
    found = library()
    return "" if found is None else f"imagecodecs {found.__version__} ({found.jpeg8_version()})"


def decode(image: Any, data: bytes) -> np.ndarray | None:
    """The pixels [H, W, 3] of a file that Pillow opened as `image`; None where Pillow is to decode it.

    That is also for damaged files, of which Pillow says what is wrong.
    """
    found = library()
    if found is None or image.format != "JPEG" or image.mode != "RGB" or "adobe" in image.info:
        return None
    try:
        pixels = found.jpeg8_decode(data)
    except Exception:  # the package's own errors
        return None
    return pixels if pixels.shape == (image.height, image.width, 3) and pixels.dtype == np.uint8 else None


def encode(
    pixels: np.ndarray,
    quality: int | None,
    qtables: Mapping[int, Sequence[int]] | None,
    subsampling: int,
    dpi: tuple[float, float] | None = None,
    icc_profile: bytes | None = None,
    exif: bytes | None = None,
) -> bytes | None:
    """The file that Pillow's `save` writes with these options; None where Pillow is to write it.

    Args:
        pixels: uint8 [H, W, 3].
        quality: 1 to 100; None for `qtables`.
        qtables: quantisation tables by number, in rows.
        subsampling: Pillow's number.
        dpi: pixels per inch.
        icc_profile: the profile.
        exif: EXIF data as Pillow gives them.
    """
    found = library()
    if quality is None and qtables is not None:
        quality = _quality_of(tuple(tuple(qtables[number]) for number in sorted(qtables)))
    head = _segments(icc_profile, exif)
    if found is None or quality is None or head is None or subsampling not in _SAMPLING:
        return None
    if max(pixels.shape) > 65500 or not pixels.flags.c_contiguous:  # the largest of libjpeg
        return None
    data = found.jpeg8_encode(pixels, level=quality, subsampling=_SAMPLING[subsampling])
    density = struct.pack(">BHH", 1, *map(round, dpi)) if dpi else data[13:18]
    if data[:13] != b"\xff\xd8\xff\xe0\0\x10JFIF\0\x01\x01":
        return None
    return b"".join([data[:13], density, data[18:20], head, memoryview(data)[20:]])


def _segments(icc_profile: bytes | None, exif: bytes | None) -> bytes | None:
    """EXIF data and profile as segments of a file; None where they do not fit."""
    parts = []
    if exif:
        exif = exif if exif.startswith(_EXIF) else _EXIF + exif
        if len(exif) > _MOST_SEGMENT:
            return None
        parts.append(struct.pack(">BBH", 0xFF, 0xE1, 2 + len(exif)) + exif)
    pieces = [icc_profile[at : at + _MOST_ICC] for at in range(0, len(icc_profile), _MOST_ICC)] if icc_profile else []
    if len(pieces) > 255:
        return None
    for number, piece in enumerate(pieces, 1):
        body = _ICC + bytes([number, len(pieces)]) + piece
        parts.append(struct.pack(">BBH", 0xFF, 0xE2, 2 + len(body)) + body)
    return b"".join(parts)


@functools.lru_cache(maxsize=64)
def _quality_of(qtables: tuple[tuple[int, ...], ...]) -> int | None:
    """The quality at which libjpeg makes these tables; None for tables of another kind."""
    for quality in range(1, 101):
        if qtables == (_scaled(_LUMINANCE, quality), _scaled(_CHROMINANCE, quality)):
            return quality
    return None


@functools.cache
def _scaled(table: tuple[int, ...], quality: int) -> tuple[int, ...]:
    """A table as libjpeg's `jpeg_set_quality` makes it (8 bits)."""
    factor = 5000 // quality if quality < 50 else 200 - 2 * quality
    return tuple(min(255, max(1, (value * factor + 50) // 100)) for value in table)
