"""Reading RGB images, with damage reported rather than filled in."""

from __future__ import annotations

import os
import re
import stat
import struct
import threading
import zlib
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ernet_fast._optional import require
from ernet_fast.data import fast_jpeg
from ernet_fast.data.file_form import FileForm, form_of, metadata_of

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_JPEG_SIGNATURE = b"\xff\xd8\xff"
_WEBP_SIGNATURE = re.compile(rb"RIFF....WEBP", re.DOTALL)
_TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# In entropy-coded data 0xFF is followed by 0x00 (a stuffed byte) or 0xD0..0xD7 (a restart), else it is a marker.
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")


MAX_PIXELS = 1 << 29
"""Images with more pixels are refused: 512 Mi of them take 1.5 GiB, and several times that while they are decoded."""

_BAND_PIXELS = 1 << 22

_ORIENTATION = 274
_BITS_PER_SAMPLE, _STRIP_OFFSETS, _STRIP_BYTES, _TILE_OFFSETS, _TILE_BYTES = 258, 273, 279, 324, 325
_opening = threading.Lock()


class ImageReadError(ValueError):
    """An image file is damaged, incomplete or not losslessly 8-bit RGB; the message names the file."""


TRANSPARENT = ("refuse", "white", "drop")


def read_image(path: str | os.PathLike[str]) -> Tensor:
    """Read a PNG, JPEG, TIFF or WebP file as a uint8 tensor [3, H, W], RGB, contiguous; otherwise as `read_pixels`."""
    return torch.from_numpy(read_pixels(path)).permute(2, 0, 1).contiguous()


def read_pixels(path: str | os.PathLike[str]) -> np.ndarray:
    """Read a PNG, JPEG, TIFF or WebP file as a uint8 array [H, W, 3], RGB, the way up that its EXIF data say.

    As `decode`; further

    Raises:
        FileNotFoundError: no such file.
        ImageReadError: no regular file.
    """
    path = Path(path)
    try:
        return decode(read_file(path))[0]
    except ImageReadError as error:
        raise ImageReadError(f"{path}: {error}") from error.__cause__
    except FileNotFoundError:
        raise FileNotFoundError(f"no image file at {str(path)!r}") from None


def decode(data: bytes, *, max_pixels: int | None = None, transparent: str = "refuse") -> tuple[np.ndarray, FileForm]:
    """The pixels [H, W, 3] of the bytes of an image file, uint8, RGB, the way up that its EXIF data say, and its form.

    Only conversions that lose nothing are made: grey, bilevel and palette images become RGB, and an alpha channel
    that is opaque everywhere is dropped. A file whose end is missing is an error even where Pillow was told to fill
    the gap (``ImageFile.LOAD_TRUNCATED_IMAGES``), as is a PNG with a wrong checksum. Colour profiles are not applied.

    Args:
        data: the file.
        max_pixels: images with more are refused; by default `MAX_PIXELS`.
        transparent: what becomes of pixels that are not opaque: "refuse", "white" (composed on white) or "drop" (their
            colour as it is).

    Raises:
        ImageReadError: damaged or truncated, another format, 16 bits a channel, CMYK, pixels that are not opaque,
            several images in one file, or more than `max_pixels` pixels.
        ImportError: Pillow is missing.
    """
    pil = require("PIL.Image", extra="train", purpose="reading images")
    operations = require("PIL.ImageOps", extra="train", purpose="reading images")
    limit = MAX_PIXELS if max_pixels is None else max_pixels
    try:
        _check_complete(data)
        with _open(pil, data) as image:
            _check_image(image, len(data), limit)
            form = form_of(image, data)
            if image.getexif().get(_ORIENTATION, 1) == 1 and (pixels := fast_jpeg.decode(image, data)) is not None:
                return pixels, replace(form, metadata=metadata_of(image))
            image.load()
            operations.exif_transpose(image, in_place=True)  # which otherwise copies what is the right way up, too
            form = replace(form, metadata=metadata_of(image))
            return _array_of(_to_rgb(image, transparent), pil.MAX_IMAGE_PIXELS or _BAND_PIXELS), form
    except ImageReadError:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, ...
        raise ImageReadError(f"the image cannot be decoded: {error}") from error


def _check_image(image: Any, size: int, limit: int) -> None:
    width, height = image.size
    if width * height > limit:
        raise ImageReadError(
            f"{width}x{height} pixels, more than {limit} (a decompression bomb?). Cut it into tiles, or "
            "raise the limit (max_pixels; ernet_fast.data.image_io.MAX_PIXELS by default)"
        )
    if image.format == "TIFF":
        _check_tiff(image, size)
    elif image.format == "WEBP" and getattr(image, "n_frames", 1) > 1:
        raise ImageReadError(f"an animation of {image.n_frames} images; export one of them")


def _array_of(image: Any, most: int) -> np.ndarray:
    """The pixels [H, W, 3] of a Pillow image, in bands: at once they would pass through as many bytes besides.

    Pillow cuts out no more than `most` pixels.
    """
    width, height = image.size
    pixels = np.empty((height, width, 3), np.uint8)
    rows = max(1, min(_BAND_PIXELS, most) // max(1, width))
    for top in range(0, height, rows):
        pixels[top : top + rows] = image.crop((0, top, width, min(top + rows, height)))
    return pixels


def read_file(path: Path) -> bytes:
    """The bytes of a regular file; reading a FIFO would wait for ever."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISREG(mode):
            return path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ImageReadError(f"the file cannot be read: {error.strerror}") from None
    raise ImageReadError("a folder" if stat.S_ISDIR(mode) else "a FIFO, socket or device, not a file")


def _open(pil: Any, data: bytes) -> Any:
    """`PIL.Image.open` without Pillow's limit of pixels, which is lower than ours and set for the whole process."""
    with _opening:
        limit, pil.MAX_IMAGE_PIXELS = pil.MAX_IMAGE_PIXELS, None
        try:
            return pil.open(BytesIO(data), formats=("PNG", "JPEG", "TIFF", "WEBP"))
        finally:
            pil.MAX_IMAGE_PIXELS = limit


def _check_complete(data: bytes) -> None:
    if data.startswith(_PNG_SIGNATURE):
        _check_png(data)
    elif data.startswith(_JPEG_SIGNATURE):
        _check_jpeg(data)
    elif _WEBP_SIGNATURE.match(data):
        size = 8 + int.from_bytes(data[4:8], "little")
        if len(data) < size:
            raise ImageReadError(f"the WebP file is truncated: it has {len(data)} of {size} bytes")
    elif not data:
        raise ImageReadError("the file is empty")
    elif not data.startswith(_TIFF_SIGNATURES):
        raise ImageReadError(f"not a PNG, JPEG, TIFF or WebP file (it begins with {data[:8]!r})")


def _check_png(data: bytes) -> None:
    """Walk the chunks: every checksum right, 8 bits a channel or fewer, and an IEND at the end."""
    position = len(_PNG_SIGNATURE)
    while position + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        if end > len(data):
            break
        (checksum,) = struct.unpack_from(">I", data, end - 4)
        if zlib.crc32(memoryview(data)[position + 4 : end - 4]) != checksum:
            raise ImageReadError(f"the PNG file is corrupt: wrong checksum in its {kind.decode('latin1')} chunk")
        if kind == b"IHDR" and length >= 9 and data[position + 16] == 16:
            raise ImageReadError(
                "16 bits a channel; convert it to 8 bits first, reading it as 8 would drop the lower half"
            )
        if kind == b"IEND":
            return
        position = end
    raise ImageReadError(f"the PNG file is truncated: its {len(data)} bytes end before the IEND chunk")


def _check_jpeg(data: bytes) -> None:
    """Walk the segments and the coded data between them up to the end-of-image marker."""
    position = 2
    while (match := _JPEG_MARKER.search(data, position)) is not None:
        marker, position = data[match.end() - 1], match.end()
        if marker == 0xD9:
            return
        if marker != 0x01:  # TEM, the only other marker without a length
            position += int.from_bytes(data[position : position + 2], "big")
    raise ImageReadError(f"the JPEG file is truncated: its {len(data)} bytes hold no end-of-image marker")


def _check_tiff(image: Any, size: int) -> None:
    """One image of 8 bits a channel, all of whose strips or tiles lie within the `size` bytes of the file."""
    if (count := getattr(image, "n_frames", 1)) > 1:
        raise ImageReadError(
            f"a TIFF file with {count} images (a whole-slide pyramid or a stack); export one of them, or read a "
            "slide in tiles"
        )
    tags = image.tag_v2
    if max(_numbers(tags, _BITS_PER_SAMPLE) or [1]) > 8:
        raise ImageReadError("16 or more bits a channel; convert it to 8 bits first")
    for offsets, counts in ((_STRIP_OFFSETS, _STRIP_BYTES), (_TILE_OFFSETS, _TILE_BYTES)):
        ends = map(sum, zip(_numbers(tags, offsets), _numbers(tags, counts), strict=False))
        if max(ends, default=0) > size:
            raise ImageReadError(f"the TIFF file is truncated: its {size} bytes end before its data do")


def _numbers(tags: Any, tag: int) -> tuple[int, ...]:
    found = tags.get(tag, ())
    return found if isinstance(found, tuple) else (found,)


def _to_rgb(image: Any, transparent: str) -> Any:
    """Return a Pillow image in mode RGB, provided that loses nothing."""
    mode = image.mode
    if mode in ("RGB", "L", "1") and "transparency" not in image.info:
        return image if mode == "RGB" else image.convert("RGB")
    if mode in ("RGB", "L", "1", "P", "LA", "PA", "RGBA"):
        image = image.convert("RGBA")
        if transparent == "drop" or image.getchannel("A").getextrema()[0] == 255:
            return image.convert("RGB")
        if transparent == "white":
            white = require("PIL.Image", extra="train", purpose="reading images").new("RGBA", image.size, "white")
            white.alpha_composite(image)
            return white.convert("RGB")
        raise ImageReadError(
            "some pixels are transparent; composite the image on a background colour of your choice first"
        )
    raise ImageReadError(
        f"colour mode {mode!r} is not 8-bit RGB, grey or palette; convert it first, e.g. with Pillow's convert('RGB')"
    )
