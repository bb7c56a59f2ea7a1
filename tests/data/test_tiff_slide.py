"""Whole slides by tifffile alone: the pixels and properties that OpenSlide gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ernet_fast.data import ImageReadError, slide_reader
from ernet_fast.data.slide_reader import SlideReader, reader_version
from ernet_fast.data.synthetic import generate_patch
from ernet_fast.data.tiff_slide import TiffSlide
from ernet_fast.scale import SlideForm, normalize_slide
from ernet_fast.scale.slide_writer import Form, write_pyramid
from ernet_fast.scale.slides import ome_xml

pytest.importorskip("openslide")
tifffile = pytest.importorskip("tifffile")
pytest.importorskip("imagecodecs")

SIZE = 700, 600  # width and height
FORMS = {
    "jpeg.svs": Form(tile=64, mpp=(0.25, 0.25), description="Aperio test|AppMag = 40|MPP = 0.25"),
    "deflate.svs": Form(tile=256, compression="deflate", description="Aperio test|AppMag = 20|MPP = 0.499"),
    "jpeg.tif": Form(tile=128, mpp=(0.5, 0.25)),
    "one.ome.tif": Form(
        tile=256, compression="deflate", mpp=(0.5, 0.5), container="ome", description=ome_xml(SIZE, None, 20, "x")
    ),
}


def without_openslide(monkeypatch) -> None:
    """As if it were not installed."""
    require = slide_reader.require

    def missing(module, **named):
        if module == "openslide":
            raise ImportError("openslide is needed for reading whole slides.", name="openslide")
        return require(module, **named)

    monkeypatch.setattr(slide_reader, "require", missing)


@pytest.fixture
def both(monkeypatch):
    """Opens a slide by OpenSlide, and by tifffile."""

    def opened(path: Path) -> tuple[SlideReader, SlideReader]:
        right = SlideReader(path)
        with monkeypatch.context() as patch:
            without_openslide(patch)
            return right, SlideReader(path)

    return opened


@pytest.fixture
def slide(tmp_path, request) -> Path:
    pixels = np.tile(generate_patch("DC", size=(200, 350), seed=3).image.transpose(1, 2, 0), (3, 2, 1))
    path = tmp_path / request.param
    with open(path, "wb") as file:
        write_pyramid(
            file, tmp_path, SIZE, lambda t: pixels[t[1] : t[1] + t[3], t[0] : t[0] + t[2]], FORMS[path.name],
            lambda: None,
        )  # fmt: skip
    return path


def assert_same(right: SlideReader, found: SlideReader, regions) -> None:
    assert right.reader.startswith("OpenSlide") and found.reader == f"tifffile {tifffile.__version__}"
    assert found.size == right.size
    for x, y, width, height, level in regions:
        assert np.array_equal(found.read(x, y, width, height, level), right.read(x, y, width, height, level))


@pytest.mark.parametrize("slide", [name for name in FORMS if "ome" not in name], indirect=True)
def test_every_level_is_that_of_openslide(slide, both):
    right, found = both(slide)
    assert [*found.levels] == [*right.levels] == [(700, 600), (350, 300)]
    assert found.mpp == pytest.approx(right.mpp, rel=1e-5) and found.objective == right.objective
    assert_same(right, found, [(0, 0, *SIZE, 0), (0, 0, 350, 300, 1), (37, 61, 190, 240, 0), (600, 500, 250, 200, 0)])


@pytest.mark.parametrize("slide", ["one.ome.tif"], indirect=True)
def test_the_levels_of_ome_tiff_are_found_too(slide, both):
    """OpenSlide sees the first alone, and no objective."""
    right, found = both(slide)
    assert [*found.levels] == [(700, 600), (350, 300)]
    assert found.mpp == pytest.approx(right.mpp, rel=1e-5) and found.objective == 20
    assert_same(right, found, [(0, 0, *SIZE, 0)])
    assert found.read(0, 0, 350, 300, 1).std() > 5


def test_a_real_slide_of_a_scanner(real_images, both):
    right, found = both(real_images / "slides" / "cmu_small_region.svs")
    assert found.mpp == right.mpp == (0.499, 0.499) and found.objective == 20 and len(found.levels) == 1
    assert_same(right, found, [(0, 0, *right.size, 0), (1111, 2222, 512, 512, 0), (2000, 2900, 512, 512, 0)])


def test_what_was_not_scanned_is_white(tmp_path, both):
    """Tiles of no bytes, as scanners write them."""
    path = tmp_path / "sparse.tif"
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        dark, grey = (np.full((64, 64, 3), level, np.uint8) for level in (30, 90))
        tiles = iter([grey, None, None, dark])
        file.write(tiles, shape=(128, 128, 3), dtype=np.uint8, tile=(64, 64), photometric="rgb", compression="zlib")
    right, found = both(path)
    assert_same(right, found, [(0, 0, 128, 128, 0), (-20, -20, 200, 200, 0)])
    assert (found.read(64, 0, 64, 64) == 255).all() and (found.read(64, 64, 64, 64) == 30).all()


def test_a_slide_is_normalised_without_openslide(real_images, tmp_path, monkeypatch):
    source, form = real_images / "slides" / "cmu_small_region.svs", SlideForm(region=(300, 300, 700, 600))
    right = normalize_slide(source, tmp_path / "right.tif", form)
    without_openslide(monkeypatch)
    assert reader_version() == f"tifffile {tifffile.__version__}"
    assert normalize_slide(source, tmp_path / "found.tif", form).stains == right.stains
    assert (tmp_path / "found.tif").read_bytes() == (tmp_path / "right.tif").read_bytes()


@pytest.mark.parametrize("kind", ["strips", "16 bits", "grey", "no TIFF", "cut"])
def test_other_files_are_refused(tmp_path, monkeypatch, kind):
    without_openslide(monkeypatch)
    path, tile = tmp_path / "a.tif", None if kind == "strips" else (64, 64)
    shape = (128, 128) if kind == "grey" else (128, 128, 3)
    tifffile.imwrite(path, np.zeros(shape, "u2" if kind == "16 bits" else "u1"), tile=tile)
    if kind in ("no TIFF", "cut"):
        path.write_bytes(b"no slide" if kind == "no TIFF" else path.read_bytes()[:200])
    with pytest.raises(ImageReadError):
        SlideReader(path).read(0, 0, 128, 128)


def test_the_message_names_openslide_where_it_would_help(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.zeros((128, 128, 3), "u2"), tile=(64, 64))
    with pytest.raises(ValueError, match=r"3 channels of 16 bits .* install OpenSlide \(ernet_fast\[slides\]\)"):
        TiffSlide(str(path))
