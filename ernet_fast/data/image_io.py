"""Reading RGB images, with damage reported rather than filled in."""

from __future__ import annotations

import os
import re
import struct
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ernet_fast._optional import require

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_JPEG_SIGNATURE = b"\xff\xd8\xff"
# In entropy-coded data 0xFF is followed by 0x00 (a stuffed byte) or 0xD0..0xD7 (a restart); anything else is a
# marker.
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")


class ImageReadError(ValueError):
    """An image file is damaged, incomplete or not losslessly 8-bit RGB; the message names the file."""


def read_image(path: str | os.PathLike[str]) -> Tensor:
    """Read a PNG or JPEG file as a uint8 tensor [3, H, W], RGB, contiguous.

    Only conversions that lose nothing are made: grey, bilevel and palette images become RGB, and an alpha channel
    that is opaque everywhere is dropped. A file whose end is missing is an error even where Pillow was told to fill
    the gap (``ImageFile.LOAD_TRUNCATED_IMAGES``), as is a PNG with a wrong checksum. (JPEG has no checksums: a
    flipped bit inside its data cannot be told from an image.) EXIF orientation and colour profiles are not applied.

    Raises:
        FileNotFoundError: no such file.
        ImageReadError: damaged or truncated, another format, 16 bits a channel, CMYK, or pixels that are not opaque.
        ImportError: Pillow is missing.
    """
    path = Path(path)
    pil = require("PIL.Image", extra="train", purpose="reading images")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"no image file at {str(path)!r}") from None
    try:
        _check_complete(data)
        with pil.open(BytesIO(data), formats=("PNG", "JPEG")) as image:
            image.load()
            pixels = np.array(_to_rgb(image))
    except ImageReadError as error:
        raise ImageReadError(f"{path}: {error}") from None
    except (
        Exception
    ) as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, DecompressionBombError, ...
        raise ImageReadError(f"{path}: the image cannot be decoded: {error}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _check_complete(data: bytes) -> None:
    if data.startswith(_PNG_SIGNATURE):
        _check_png(data)
    elif data.startswith(_JPEG_SIGNATURE):
        _check_jpeg(data)
    elif not data:
        raise ImageReadError("the file is empty")
    else:
        raise ImageReadError(f"not a PNG or JPEG file (it begins with {data[:8]!r})")


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
        if marker == 0x01:  # TEM, the only other marker without a length
            continue
        if position + 2 > len(data):
            break
        position += struct.unpack_from(">H", data, position)[0]
    raise ImageReadError(f"the JPEG file is truncated: its {len(data)} bytes hold no end-of-image marker")


def _to_rgb(image: Any) -> Any:
    """Return a Pillow image in mode RGB, provided that loses nothing."""
    mode = image.mode
    if mode in ("RGB", "L", "1") and "transparency" not in image.info:
        return image if mode == "RGB" else image.convert("RGB")
    if mode in ("RGB", "L", "1", "P", "LA", "PA", "RGBA"):
        image = image.convert("RGBA")
        lowest, _ = image.getchannel("A").getextrema()
        if lowest != 255:
            raise ImageReadError(
                "some pixels are transparent; composite the image on a background colour of your choice first"
            )
        return image.convert("RGB")
    raise ImageReadError(
        f"colour mode {mode!r} is not 8-bit RGB, grey or palette; convert it first, e.g. with Pillow's convert('RGB')"
    )
