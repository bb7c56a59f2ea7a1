"""Images are read as they are, or not at all."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from ernet_fast.data import ImageReadError, image_io, read_image

RGB = np.random.default_rng(0).integers(0, 256, (31, 45, 3), dtype=np.uint8)


def encoded(pixels: np.ndarray, kind: str, mode: str | None = None, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels, mode).save(buffer, kind, **options)
    return buffer.getvalue()


def written(folder: Path, data: bytes, name: str = "image.png") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def test_png_is_read_exactly(tmp_path: Path) -> None:
    image = read_image(written(tmp_path, encoded(RGB, "PNG")))
    assert image.dtype == torch.uint8 and image.shape == (3, 31, 45) and image.is_contiguous()
    assert np.array_equal(image.permute(1, 2, 0).numpy(), RGB)


@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_is_read_as_pillow_decodes_it(tmp_path: Path, progressive: bool) -> None:
    data = encoded(RGB, "JPEG", quality=92, progressive=progressive, restart_marker_blocks=2)
    image = read_image(str(written(tmp_path, data, "image.png")))  # the content counts, not the suffix
    assert np.array_equal(image.permute(1, 2, 0).numpy(), np.array(Image.open(io.BytesIO(data))))


def test_lossless_conversions(tmp_path: Path) -> None:
    grey, opaque = RGB[..., 0], np.dstack([RGB, np.full(RGB.shape[:2], 255, np.uint8)])
    repeated = np.repeat(grey[..., None], 3, axis=2)
    assert np.array_equal(read_image(written(tmp_path, encoded(grey, "PNG"))).permute(1, 2, 0).numpy(), repeated)
    assert np.array_equal(read_image(written(tmp_path, encoded(opaque, "PNG"))).permute(1, 2, 0).numpy(), RGB)
    few = (RGB // 128 * 200).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(few).convert("P", palette=Image.Palette.ADAPTIVE, colors=8).save(buffer, "PNG")
    assert np.array_equal(read_image(written(tmp_path, buffer.getvalue())).permute(1, 2, 0).numpy(), few)
    bilevel = grey > 127
    assert np.array_equal(read_image(written(tmp_path, encoded(bilevel, "PNG")))[0].numpy(), bilevel * np.uint8(255))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_16_bit_rgb() -> bytes:
    header = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + bytes(range(12)) for _ in range(2))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff_16_bit_rgb() -> bytes:
    """One strip of 2x1 pixels, little-endian; Pillow reads it as 8-bit RGB without a word."""
    entries = [(256, 3, 1, 2), (257, 3, 1, 1), (258, 3, 3, 122), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 128),
               (277, 3, 1, 3), (278, 3, 1, 1), (279, 4, 1, 12)]  # fmt: skip
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return (
        (b"II*\0" + struct.pack("<I", 8) + directory + bytes(4)).ljust(122, b"\0")
        + struct.pack("<3H", 16, 16, 16)
        + bytes(range(12))
    )


def tiff_of_two() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(RGB).save(buffer, "TIFF", save_all=True, append_images=[Image.fromarray(RGB[:8, :8])])
    return buffer.getvalue()


def lossy_files() -> dict[str, tuple[bytes, str]]:
    clear = np.dstack([RGB, np.full(RGB.shape[:2], 255, np.uint8)])
    clear[3, 4, 3] = 254
    keyed = encoded(RGB, "PNG", transparency=tuple(RGB[5, 5].tolist()))
    cmyk = io.BytesIO()
    Image.fromarray(RGB).convert("CMYK").save(cmyk, "JPEG")
    return {
        "transparent": (encoded(clear, "PNG"), "transparent"),
        "colour key": (keyed, "transparent"),
        "16-bit grey": (encoded(RGB[..., 0].astype(np.uint16) * 257, "PNG"), "16 bits"),
        "16-bit rgb": (png_16_bit_rgb(), "16 bits"),
        "cmyk": (cmyk.getvalue(), "'CMYK'"),
        "16-bit tiff": (encoded(RGB[..., 0].astype(np.uint16) * 257, "TIFF"), "16 or more bits"),
        "16-bit rgb tiff": (tiff_16_bit_rgb(), "16 or more bits"),
        "float tiff": (encoded(RGB[..., 0].astype(np.float32), "TIFF"), "16 or more bits"),
        "cmyk tiff": (encoded(np.dstack([RGB, RGB[..., 0]]), "TIFF", "CMYK"), "'CMYK'"),
        "tiff of two images": (tiff_of_two(), "2 images"),
        "bmp": (encoded(RGB, "BMP"), "not a PNG, JPEG, TIFF or WebP"),
        "text": (b"<html>404 not found</html>", "not a PNG, JPEG, TIFF or WebP"),
        "empty": (b"", "empty"),
    }


@pytest.mark.parametrize("case", lossy_files())
def test_what_would_lose_something_is_refused(tmp_path: Path, case: str) -> None:
    data, reason = lossy_files()[case]
    path = written(tmp_path, data)
    with pytest.raises(ImageReadError, match=reason) as caught:
        read_image(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("tolerant", [False, True], ids=["pillow strict", "pillow fills gaps"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "progressive JPEG"])
def test_every_truncation_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, tolerant: bool) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", tolerant)
    data = encoded(RGB, kind.split()[-1], **({"progressive": True} if "prog" in kind else {}))
    read_image(written(tmp_path, data))
    for length in [*range(1, 40), *range(40, len(data), 97), *range(len(data) - 20, len(data))]:
        with pytest.raises(ImageReadError):
            read_image(written(tmp_path, data[:length]))


def test_an_end_marker_inside_a_jpeg_thumbnail_does_not_hide_a_truncation(tmp_path: Path) -> None:
    thumbnail = encoded(RGB[:8, :8], "JPEG")
    data = encoded(RGB, "JPEG", comment=thumbnail)
    assert data.count(b"\xff\xd9") == 2
    read_image(written(tmp_path, data))
    with pytest.raises(ImageReadError, match="truncated"):
        read_image(written(tmp_path, data[:-300]))


def test_any_flipped_bit_of_a_png_is_found(tmp_path: Path) -> None:
    data = bytearray(encoded(RGB, "PNG"))
    for position in range(8, len(data), 131):
        data[position] ^= 4
        with pytest.raises(ImageReadError):
            read_image(written(tmp_path, bytes(data)))
        data[position] ^= 4


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_deflate", "packbits"])
@pytest.mark.parametrize("kind", ["rgb", "grey", "palette", "bilevel"])
def test_8_bit_tiff_is_read_exactly(tmp_path: Path, compression: str, kind: str) -> None:
    image = Image.fromarray(RGB)
    if kind != "rgb":
        image = image.convert({"grey": "L", "palette": "P", "bilevel": "1"}[kind])
    image.save(tmp_path / "a.tif", compression=compression)
    found = read_image(tmp_path / "a.tif").permute(1, 2, 0).numpy()
    assert np.array_equal(found, np.array(image.convert("RGB")))


@pytest.mark.parametrize("tolerant", [False, True], ids=["pillow strict", "pillow fills gaps"])
@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
def test_a_truncated_tiff_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: str, tolerant: bool
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", tolerant)
    buffer = io.BytesIO()
    Image.fromarray(RGB).save(buffer, "TIFF", compression=compression)
    data = buffer.getvalue()
    read_image(written(tmp_path, data))
    for length in [*range(4, 40), *range(40, len(data), 151), len(data) - 1]:
        with pytest.raises(ImageReadError):
            read_image(written(tmp_path, data[:length]))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(RGB, kind, exif=exif)
    upright = {1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud, 6: lambda x: np.rot90(x, -1),
               5: lambda x: np.swapaxes(x, 0, 1),
               7: lambda x: np.rot90(np.swapaxes(x, 0, 1), 2), 8: np.rot90}  # fmt: skip
    stored = np.array(Image.open(io.BytesIO(encoded(RGB, kind))))
    found = read_image(written(tmp_path, data)).permute(1, 2, 0).numpy()
    assert np.array_equal(found, upright[orientation](stored))


def test_more_pixels_than_pillow_allows_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert read_image(written(tmp_path, encoded(RGB, "PNG"))).shape == (3, 31, 45)
    assert Image.MAX_IMAGE_PIXELS == 100


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_a_decompression_bomb_is_refused_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(image_io, "MAX_PIXELS", 31 * 45 - 1)
    with pytest.raises(ImageReadError, match=r"45x31 pixels, more than 1394 \(a decompression bomb\?\).*MAX_PIXELS"):
        read_image(written(tmp_path, encoded(RGB, kind)))
    monkeypatch.setattr(image_io, "MAX_PIXELS", 31 * 45)
    read_image(written(tmp_path, encoded(RGB, kind)))


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.png")
    with pytest.raises(ImageReadError, match=r"fifo\.png: a FIFO"):
        read_image(tmp_path / "fifo.png")
    with pytest.raises(ImageReadError, match="a folder"):
        read_image(tmp_path)
    (tmp_path / "loop.png").symlink_to("loop.png")
    with pytest.raises(ImageReadError, match="links"):
        read_image(tmp_path / "loop.png")


def test_missing_file_and_pickled_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no image file at .*gone\.png"):
        read_image(tmp_path / "gone.png")
    error = ImageReadError("a.png: damaged")
    assert str(pickle.loads(pickle.dumps(error))) == "a.png: damaged"


def test_real_images_read_like_pillow(real_images: Path) -> None:
    paths = sorted(path for path in (real_images / "BreaKHis_tiny").rglob("SOB_*.*") if path.is_file())
    assert len(paths) == 21
    for path in paths:
        assert np.array_equal(read_image(path).permute(1, 2, 0).numpy(), np.array(Image.open(path).convert("RGB")))
    opaque = read_image(real_images / "torchstain" / "target.png")  # an RGBA file without transparent pixels
    assert opaque.shape[0] == 3
