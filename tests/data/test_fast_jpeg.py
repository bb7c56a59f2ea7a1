"""JPEG by imagecodecs: the pixels and the bytes of Pillow, whatever the file says beside its pixels."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from ernet_fast.data import fast_jpeg, image_io
from ernet_fast.data.image_io import ImageReadError
from ernet_fast.data.synthetic import generate_patch
from ernet_fast.scale.encode import decoder, encode

imagecodecs = pytest.importorskip("imagecodecs")

PIXELS = np.ascontiguousarray(generate_patch("DC", size=(67, 93), seed=1).image.transpose(1, 2, 0))
ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def exif(orientation: int = 1) -> bytes:
    found = Image.Exif()
    found[270], found[274] = "tissue", orientation
    return found.tobytes()


def jpeg(**options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "JPEG", **options)
    return file.getvalue()


def with_pillow(monkeypatch: pytest.MonkeyPatch, data: bytes) -> tuple[np.ndarray, bytes]:
    """What Pillow alone decodes, and writes again."""
    with monkeypatch.context() as patch:
        patch.setenv(fast_jpeg.CHOICE, "pillow")
        return both(data)


def both(data: bytes, quality: int | None = None) -> tuple[np.ndarray, bytes]:
    pixels, form = image_io.decode(data)
    out = io.BytesIO()
    encode(out, pixels, "a.jpg", form, quality)
    return pixels, out.getvalue()


FORMS = [
    {"quality": 100, "subsampling": 0},
    {"quality": 95, "subsampling": 1, "dpi": (72, 300)},
    {"quality": 90, "subsampling": 2, "icc_profile": ICC},
    {"quality": 75, "exif": exif()},
    {"quality": 60, "exif": exif(6), "icc_profile": ICC, "dpi": (96, 96)},
    {"quality": 30, "progressive": True, "icc_profile": bytes(range(256)) * 300},
    {"quality": 10, "optimize": True},
    {"qtables": [[9] * 64, [17] * 64]},
    {"quality": 80, "keep_rgb": True},
    {"quality": 80, "restart_marker_blocks": 3},
]


@pytest.mark.parametrize("options", FORMS)
def test_pixels_and_bytes_are_pillows(monkeypatch, options):
    data = jpeg(**options)
    pixels, written = both(data)
    right, expected = with_pillow(monkeypatch, data)
    assert np.array_equal(pixels, right) and written == expected
    assert pixels.flags.c_contiguous and pixels.flags.writeable


def test_which_codec_works(monkeypatch):
    """The common file passes by Pillow's codec altogether."""
    data = jpeg(quality=90)

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("Pillow's codec was called")

    monkeypatch.setattr(Image.Image, "save", refuse)
    monkeypatch.setattr("PIL.JpegImagePlugin.JpegImageFile.load", refuse)
    assert both(data)[0].shape == PIXELS.shape
    assert "imagecodecs" in decoder()
    monkeypatch.setenv(fast_jpeg.CHOICE, "pillow")
    assert "imagecodecs" not in decoder()
    with pytest.raises(AssertionError, match="Pillow"):
        encode(io.BytesIO(), PIXELS, "a.jpg", image_io.FileForm("PNG"))
    monkeypatch.setenv(fast_jpeg.CHOICE, "turbo")
    with pytest.raises(ValueError, match="ERNET_JPEG='turbo'"):
        decoder()


def test_every_quality_is_recognised():
    for quality in range(1, 101):
        tables = Image.open(io.BytesIO(jpeg(quality=quality))).quantization
        found = fast_jpeg._quality_of(tuple(tuple(tables[number]) for number in sorted(tables)))
        again = Image.open(io.BytesIO(jpeg(quality=found))).quantization
        assert again == tables


def test_damage_is_judged_by_pillow(monkeypatch, tmp_path: Path):
    data = bytearray(jpeg(quality=90))
    data[300:330] = bytes(30)
    for broken in (bytes(data), bytes(data[:700]), bytes(data[:400]) + b"\xff\xd9"):
        outcomes = []
        for choice in ("auto", "pillow"):
            monkeypatch.setenv(fast_jpeg.CHOICE, choice)
            try:
                outcomes.append(image_io.decode(broken)[0].tobytes())
            except ImageReadError as error:
                outcomes.append(str(error).encode())
        assert outcomes[0] == outcomes[1]
