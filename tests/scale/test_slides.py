"""Whole slides: every tile with the stains of the slide, in a pyramid that other readers open."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from ernet_fast.cli import main
from ernet_fast.data.slide_reader import SlideReader
from ernet_fast.data.synthetic import generate_patch
from ernet_fast.scale import SlideForm, normalize_files, normalize_slide, write_tables
from ernet_fast.scale.method import MacenkoMethod
from ernet_fast.scale.slide_writer import Form, tiles_of, write_pyramid
from ernet_fast.scale.target import make_method
from ernet_fast.stain import ColourCounts, macenko_fit, slide_fit
from ernet_fast.stain.tissue import Tissue

openslide = pytest.importorskip("openslide")
tifffile = pytest.importorskip("tifffile")
pytest.importorskip("imagecodecs")

SIZE = 1300, 900  # width and height


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """Tissue on the left, white on the right."""
    patch = generate_patch("DC", size=(300, 325), seed=3).image.transpose(1, 2, 0)
    image = np.full((SIZE[1], SIZE[0], 3), 244, np.uint8)
    image[:, :650] = np.tile(patch, (3, 2, 1))
    image[600:, :325] = np.roll(image[600:, :325], 50, axis=0)
    return image


@pytest.fixture
def slide(tmp_path: Path, pixels) -> Path:
    """A pyramid without loss, at 40x."""
    path = tmp_path / "in" / "slide.svs"
    path.parent.mkdir()
    form = Form(tile=256, compression="deflate", mpp=(0.25, 0.25), description="Aperio test|AppMag = 40|MPP = 0.25")

    def read(tile):
        x, y, width, height = tile
        return pixels[y : y + height, x : x + width]

    with open(path, "wb") as file:
        write_pyramid(file, tmp_path, SIZE, read, form, lambda: None)
    return path


def read_level(path: Path, level: int = 0) -> np.ndarray:
    with openslide.OpenSlide(str(path)) as found:
        return np.asarray(found.read_region((0, 0), level, found.level_dimensions[level]))[..., :3]


def test_what_is_written_is_read_again(slide, pixels):
    reader = SlideReader(slide)
    assert reader.size == SIZE and reader.mpp == (0.25, 0.25) and reader.objective == 40
    assert list(reader.levels) == [(1300, 900), (650, 450), (325, 225)]
    assert np.array_equal(reader.read(100, 200, 300, 400), pixels[200:600, 100:400])
    halved = pixels.reshape(450, 2, 650, 2, 3).astype(int).sum(axis=(1, 3)) + 2 >> 2
    assert np.array_equal(reader.read(0, 0, 650, 450, 1), halved)


class TestPixels:
    def test_a_tile_is_what_it_is_alone_with_the_slides_stains(self, slide, pixels, tmp_path):
        status = normalize_slide(slide, tmp_path / "out.tif", SlideForm(compression="deflate", tile=256), workers=2)
        low = SlideReader(slide).read(0, 0, 325, 225, 2)  # 1 micrometre a pixel
        counts = ColourCounts().add(np.ascontiguousarray(low), layout="HWC").fit()
        assert status.status == "ok" and (status.width, status.height) == SIZE
        assert status.stains[:3] == tuple(counts.stain_matrix[0, :, 0].tolist()), "all tiles together, exactly"
        method = make_method("published")
        right, _, _ = method.normalize([torch.from_numpy(pixels)], status.stains)
        found = read_level(tmp_path / "out.tif")
        assert np.array_equal(found, right[0].numpy())
        assert found[:, 660:].min() >= 235, "background stays background"
        assert status.tissue_share == pytest.approx(method.tissue.share(pixels), abs=1e-12)

    def test_jpeg_threads_and_tiles(self, slide, tmp_path, write_patch):
        options = {"target": write_patch(tmp_path / "target.png", 9)}
        exact = normalize_slide(slide, tmp_path / "a.tif", SlideForm(compression="deflate"), workers=1, **options)
        for workers in (1, 3):
            status = normalize_slide(slide, tmp_path / f"{workers}.tif", SlideForm(tile=64), workers=workers, **options)
            assert status.stains == exact.stains
        assert (tmp_path / "1.tif").read_bytes() == (tmp_path / "3.tif").read_bytes()
        difference = np.abs(read_level(tmp_path / "1.tif").astype(int) - read_level(tmp_path / "a.tif"))
        assert difference.mean() < 6

    def test_levels_and_regions(self, slide, tmp_path):
        whole, part = SlideForm(compression="deflate"), SlideForm(compression="deflate", region=(200, 100, 800, 600))
        normalize_slide(slide, tmp_path / "whole.tif", whole)
        normalize_slide(slide, tmp_path / "part.tif", part)
        assert np.array_equal(read_level(tmp_path / "part.tif"), read_level(tmp_path / "whole.tif")[100:700, 200:1000])
        status = normalize_slide(slide, tmp_path / "small.svs", SlideForm(compression="deflate", level=1))
        reader = SlideReader(tmp_path / "small.svs")
        assert reader.size == (650, 450) and reader.mpp == (0.5, 0.5) and reader.objective == 20
        for form, reason in (
            (SlideForm(level=3), "has 3 levels"),
            (SlideForm(region=(0, 0, 9999, 1)), "reaches beyond"),
        ):
            status = normalize_slide(slide, tmp_path / "no.tif", form)
            assert status.status == "error" and reason in status.reason and not (tmp_path / "no.tif").exists()

    def test_known_stains_and_no_stains(self, slide, pixels, tmp_path):
        fit = macenko_fit(np.ascontiguousarray(pixels[:300, :300]))
        status = normalize_slide(slide, tmp_path / "a.tif", fit="fixed", source=fit)
        assert status.stains[:3] == tuple(fit.stain_matrix[0, :, 0].tolist())
        status = normalize_slide(slide, tmp_path / "b.tif", SlideForm(region=(700, 0, 600, 900)))
        assert status.status == "ok", "the stains are those of the whole slide"


class TestContainers:
    """Other forms of a pyramid, with the pixels of the generic one."""

    @pytest.fixture
    def right(self, slide, tmp_path):
        normalize_slide(slide, tmp_path / "right.tif", SlideForm(compression="deflate"))
        return [read_level(tmp_path / "right.tif", level) for level in range(3)]

    def test_ome_tiff(self, slide, tmp_path, right):
        path = tmp_path / "a.ome.tif"
        written = []
        for workers in (1, 2):
            normalize_slide(slide, path, SlideForm(compression="deflate"), workers=workers, overwrite=True)
            written.append(path.read_bytes())
        assert written[0] == written[1]
        with tifffile.TiffFile(path) as file:
            assert file.is_ome and file.is_bigtiff and len(file.series) == 1 and len(file.pages) == 1
            for level, pixels in zip(file.series[0].levels, right, strict=True):
                assert np.array_equal(level.asarray(), pixels)
            image = tifffile.xml2dict(file.ome_metadata)["OME"]
        assert image["Image"]["Pixels"]["PhysicalSizeX"] == 0.25 and image["Image"]["Pixels"]["SizeX"] == SIZE[0]
        assert image["Instrument"]["Objective"]["NominalMagnification"] == 40
        assert np.array_equal(read_level(path), right[0]), "OpenSlide opens it, too"
        normalize_slide(slide, tmp_path / "b.ome.tif", SlideForm(quality=80))
        with tifffile.TiffFile(tmp_path / "b.ome.tif") as file:
            assert np.abs(file.series[0].asarray().astype(int) - right[0]).mean() < 8

    def test_zarr(self, slide, tmp_path, right):
        zarr = pytest.importorskip("zarr")
        paths = [tmp_path / f"{workers}.zarr.zip" for workers in (1, 2)]
        for path, workers in zip(paths, (1, 2), strict=True):
            status = normalize_slide(slide, path, SlideForm(tile=256), workers=workers)
            assert status.status == "ok"
        assert paths[0].read_bytes() == paths[1].read_bytes()
        group = zarr.open_group(zarr.storage.ZipStore(paths[0], read_only=True), mode="r")
        (scales,) = group.attrs["multiscales"]
        assert [axis["name"] for axis in scales["axes"]] == ["c", "y", "x"] and scales["version"] == "0.4"
        assert scales["axes"][1]["unit"] == "micrometer"
        for number, (part, pixels) in enumerate(zip(scales["datasets"], right, strict=True)):
            assert np.array_equal(np.moveaxis(group[part["path"]][:], 0, 2), pixels)
            assert part["coordinateTransformations"][0]["scale"] == [1, 0.25 * 2**number, 0.25 * 2**number]

    def test_folders(self, slide, tmp_path):
        for format in ("ome.tif", "zarr.zip"):
            out = tmp_path / f"as {format[:3]}"
            options = {"slides": SlideForm(format=format), "preview": tmp_path / f"{format}.png"}
            assert normalize_files(slide.parent, out, **options).counts == {"ok": 1}
            assert (out / f"slide.{format}").is_file()
            assert len(normalize_files(slide.parent, out, **options).done_before) == 1


def test_preview(slide, pixels, tmp_path):
    from PIL import Image

    normalize_files(slide.parent, tmp_path / "out", slides=SlideForm(), preview=tmp_path / "preview.png")
    sheet = np.asarray(Image.open(tmp_path / "preview.png"))
    green = (sheet == (0, 160, 0)).all(axis=2)
    assert green.sum() > 20, "the outline of tissue"
    assert green[:, : 8 + 75 + 2].sum() == green.sum(), "in the left half of the slide as it was"
    reader = SlideReader(slide)
    small = slide_fit.thumbnail(reader, 150)
    assert small.shape == (75, 109, 3) and np.abs(small.mean(axis=(0, 1)) - pixels.mean(axis=(0, 1))).max() < 1


class TestRuns:
    def test_a_folder_is_resumed(self, slide, tmp_path):
        (slide.parent / "notes.txt").write_text("text")
        (slide.parent / "broken.ndpi").write_bytes(b"broken")
        out = tmp_path / "out"
        command = ["normalize", str(slide.parent), str(out), "--as", "slides", "--quiet", "--slide-format", "svs"]
        assert main([*command, "--status", str(tmp_path / "a.csv")]) == 3
        before = (out / "slide.svs").stat().st_mtime_ns
        assert main([*command, "--status", str(tmp_path / "b.csv")]) == 3
        assert (out / "slide.svs").stat().st_mtime_ns == before
        assert (tmp_path / "a.csv").read_text() == (tmp_path / "b.csv").read_text()
        assert sorted(path.name for path in out.iterdir()) == [
            "ernet-fast-normalize.journal", "ernet-fast-normalize.json", "slide.svs",
        ]  # fmt: skip
        with pytest.raises(ValueError, match="slides was .* now"):
            normalize_files(slide.parent, out, slides=SlideForm(tile=256, format="svs"))

    def test_nothing_but_the_image_is_written(self, slide, tmp_path):
        normalize_slide(slide, tmp_path / "out.svs")
        with openslide.OpenSlide(str(tmp_path / "out.svs")) as found:
            assert not found.associated_images and found.properties["openslide.objective-power"] == "40"
            assert "slide.svs" not in "".join(found.properties.values())
        with tifffile.TiffFile(tmp_path / "out.svs") as file:
            assert file.is_bigtiff and all(page.is_tiled for page in file.pages)

    def test_nonsense(self, slide, tmp_path):
        for wrong in ({"tile": 100}, {"level": -1}, {"region": (0, 0, 0, 5)}, {"compression": "lzw"}, {"quality": 0}):
            with pytest.raises(ValueError, match=next(iter(wrong))):
                SlideForm(**wrong)
        with pytest.raises(ValueError, match="per-folder"):
            normalize_files(slide, tmp_path / "out", slides=SlideForm(), fit="per-folder")
        with pytest.raises(ValueError, match=r"ends in \.tif"):
            normalize_slide(slide, tmp_path / "out.png")


class TestFit:
    def test_tiles_with_tissue_are_fitted(self, slide, monkeypatch):
        tissue = Tissue()
        monkeypatch.setattr(slide_fit, "FIT_TILES", 4)
        monkeypatch.setattr(slide_fit, "FIT_TILE", 64)
        tiles = list(slide_fit.fit_tiles(SlideReader(slide), tissue))
        assert len(tiles) == 4 and all(tissue.share(tile) > 0.2 for tile in tiles)

    def test_without_a_small_level_tiles_are_tried(self, slide, monkeypatch):
        """The white ones of one colour among them are not decoded again."""
        tissue = Tissue()
        for name, value in {"FIT_TILES": 12, "FIT_TILE": 64, "_MASK_PIXELS": 0}.items():
            monkeypatch.setattr(slide_fit, name, value)
        reader = SlideReader(slide)
        tiles = list(slide_fit.fit_tiles(reader, tissue))
        assert len(tiles) == 12 and all(tissue.share(tile) >= 0.05 for tile in tiles)
        tried = reader.decoded
        assert tried > 12 and reader._blank
        for place in list(reader._blank):
            assert (reader.read_at(*place) == 244).all()
        assert reader.decoded == tried

    def test_tissue_map(self, slide, pixels):
        tissue = Tissue()
        cells = slide_fit.tissue_map(SlideReader(slide), tissue)
        assert cells.share.shape == (225, 325) and cells.cell == 4
        assert cells.of(0, 0, *SIZE) == pytest.approx(tissue.share(pixels), abs=0.1)
        assert cells.of(700, 0, 600, 900) == 0 < cells.of(0, 0, 640, 900) and cells.of(2000, 0, 9, 9) == 0

    def test_tissue_map_of_large_cells(self, slide, pixels, monkeypatch):
        monkeypatch.setattr(slide_fit, "_MAP_CELLS", 1000)
        monkeypatch.setattr(slide_fit, "_STRIPE", 100)
        small = SlideReader(slide).read(0, 0, 325, 225, 2)
        cells = slide_fit.tissue_map(SlideReader(slide), Tissue())
        expected = [[Tissue().share(small[y : y + 9, x : x + 9]) for x in range(0, 325, 9)] for y in range(0, 225, 9)]
        assert cells.cell == 36 and np.allclose(cells.share, expected)


def test_a_blank_tile_is_normalised_and_encoded_once(slide, pixels, tmp_path, monkeypatch):
    from ernet_fast.scale import slide_writer

    encoded, seen = [], []
    encode, normalize = slide_writer._encoded, MacenkoMethod.normalize

    def counted(self, images, source=None):
        seen.append(tuple(images[0].shape))
        return normalize(self, images, source)

    monkeypatch.setattr(slide_writer, "_encoded", lambda tile, form: encoded.append(tile) or encode(tile, form))
    monkeypatch.setattr(MacenkoMethod, "normalize", counted)
    form = SlideForm(compression="deflate", tile=128)
    status = normalize_slide(slide, tmp_path / "out.tif", form, workers=1)
    blank = sum((pixels[y : y + h, x : x + w] == 244).all() for x, y, w, h in tiles_of(*SIZE, 128))
    assert blank > 30 and seen.count((1, 1, 3)) == blank, "of a white tile one pixel is normalised"
    levels = ((1300, 900), (650, 450), (325, 225))
    assert len(encoded) <= sum(len([*tiles_of(*size, 128)]) for size in levels) - blank
    (right,), _, _ = normalize(make_method("published"), [torch.from_numpy(pixels)], status.stains)
    assert np.array_equal(read_level(tmp_path / "out.tif"), right.numpy())


def test_levels_on_the_disk_are_let_go_of(tmp_path, monkeypatch):
    """While they are written, and while they are read again: else memory would grow with the slide."""
    from ernet_fast.scale import slide_writer

    let_go, shapes = slide_writer.let_go, []
    monkeypatch.setattr(slide_writer, "let_go", lambda level: shapes.append(level.shape) or let_go(level))
    with open(tmp_path / "a.tif", "wb") as file:
        form = Form(tile=128, compression="deflate")
        write_pyramid(file, tmp_path, (1100, 1200), lambda t: np.zeros((t[3], t[2], 3), np.uint8), form, lambda: None)
    rows = {1200: 9, 600: 4, 300: 2}  # of tiles that are followed by another
    assert (
        shapes.count((600, 550, 3)) == rows[1200] + rows[600] and shapes.count((300, 275, 3)) == rows[600] + rows[300]
    )


def test_a_real_slide(real_images, tmp_path):
    source = real_images / "slides" / "cmu_small_region.svs"
    status = normalize_slide(source, tmp_path / "out.svs", SlideForm(compression="deflate"))
    reader, written = SlideReader(source), SlideReader(tmp_path / "out.svs")
    assert written.size == reader.size and written.mpp == pytest.approx(reader.mpp) and written.objective == 20
    right, _, _ = make_method("published").normalize(
        [torch.from_numpy(reader.read(900, 1000, 300, 200))], status.stains
    )
    assert np.array_equal(written.read(900, 1000, 300, 200), right[0].numpy())


@pytest.mark.parametrize("fit", ["per-slide", "fixed"])
def test_the_table_of_a_slide_shows_what_is_written(slide, pixels, tmp_path, capsys, write_patch, fit):
    """With the stains that `normalize_slide` fits, over the colours of the tiles."""
    known = ["--source", str(write_patch(tmp_path / "source.png", 4))] if fit == "fixed" else []
    command = ["normalize", str(slide.parent), str(tmp_path / "tables"), "--as", "slide-lut", "--fit", fit, *known]
    assert main(command) == 0 and "of 1 slides" in capsys.readouterr().out
    name = "all" if fit == "fixed" else "slide"
    source = {"source": known[1]} if known else {}
    normalize_slide(slide, tmp_path / "out.tif", SlideForm(compression="deflate"), fit=fit, **source)
    title, size, *rows = (tmp_path / "tables" / f"{name}.cube").read_text().splitlines()
    assert name in title and size == "LUT_3D_SIZE 33" and (tmp_path / "tables" / f"{name}.icc").is_file()
    shown = Image.fromarray(pixels).filter(ImageFilter.Color3DLUT(33, np.loadtxt(rows).reshape(-1)))
    difference = np.abs(np.asarray(shown).astype(int) - read_level(tmp_path / "out.tif"))
    assert difference.max() <= 6 and difference.mean() < 0.5


def test_tables_of_slides_refuse_what_is_not_theirs(slide, tmp_path, capsys):
    slide.with_name("cut.svs").write_bytes(slide.read_bytes()[:1000])
    tables = write_tables(slide.parent, tmp_path / "tables", slides=True)
    assert [(table.name, table.status) for table in tables] == [("cut", "error"), ("slide", "ok")]
    with pytest.raises(ValueError, match="per-folder"):
        write_tables(slide.parent, tmp_path / "other", slides=True, fit="per-folder")
    assert main(["normalize", str(slide.parent), str(tmp_path / "other"), "--as", "lut"]) == 2
    assert "There are whole slides, for --as slides or --as slide-lut." in capsys.readouterr().err


def test_every_pixel_is_in_one_tile():
    seen = np.zeros((90, 130), int)
    for x, y, width, height in tiles_of(130, 90, 32):
        seen[y : y + height, x : x + width] += 1
    assert (seen == 1).all() and MacenkoMethod.name == "macenko"
