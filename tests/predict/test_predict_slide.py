"""A slide is read in tiles, and each gets the answer that its pixels as an image would get."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ernet_fast.cli import main
from ernet_fast.data import ImageReadError, PatchTransform
from ernet_fast.data.slide_reader import SlideReader
from ernet_fast.data.synthetic import generate_patch
from ernet_fast.predict import TrainedNetwork, predict_slide
from ernet_fast.predict.grid import Grid
from ernet_fast.scale import slide_writer
from ernet_fast.stain import ReinhardNormalizer, reinhard_fit
from ernet_fast.train import Reporter, load_checkpoint

pytest.importorskip("openslide", reason="openslide (extra slides) is not installed")
pytest.importorskip("tifffile", reason="tifffile (extra slides) is not installed")

WIDTH, HEIGHT = 500, 300
QUIET = Reporter(quiet=True)


@pytest.fixture(scope="module")
def slide(tmp_path_factory) -> Path:
    """A pyramid without loss at 0.5 um a pixel: tissue in the left 260 columns, white beside it."""
    image = np.full((HEIGHT, WIDTH, 3), 244, np.uint8)
    image[:, :260] = generate_patch("DC", size=(HEIGHT, 260), seed=3).image.transpose(1, 2, 0)
    folder = tmp_path_factory.mktemp("slides")
    form = slide_writer.Form(
        tile=64, compression="deflate", mpp=(0.5, 0.5), description="Aperio test|AppMag = 20|MPP = 0.5"
    )

    def read(tile):
        x, y, width, height = tile
        return image[y : y + height, x : x + width]

    with pytest.MonkeyPatch.context() as patch, open(folder / "slide.svs", "wb") as file:
        patch.setattr(slide_writer, "SMALLEST", 100)  # levels of 500, 250, 125 and 62 pixels
        slide_writer.write_pyramid(file, folder, (WIDTH, HEIGHT), read, form, lambda: None)
    return folder / "slide.svs"


@pytest.mark.parametrize(
    ("size", "tile", "step"),
    [((500, 300), (64, 64), (64, 64)), ((500, 300), (64, 48), (20.3, 17.9)), ((40, 300), (64, 64), (64.0, 32.0))],
)
def test_cells_cover_the_level_once_and_tiles_stay_inside(size, tile, step):
    grid = Grid(size, tile, step)
    seen = np.zeros(size[::-1], int)
    for found in grid.tiles():
        assert 0 <= found.x <= size[0] - found.width and 0 <= found.y <= size[1] - found.height
        assert (found.width, found.height) == (min(tile[0], size[0]), min(tile[1], size[1]))
        x, y, width, height = found.cell
        seen[y : y + height, x : x + width] += 1
    assert len([*grid.tiles()]) == len(grid) and (seen == 1).all()


def test_each_tile_gets_the_answer_of_its_pixels(run_folder, slide):
    trained = TrainedNetwork(run_folder, device="cpu")
    found = predict_slide(trained, slide, field=40, min_tissue=0.2, reporter=QUIET)  # 80 pixels; level 1 has 40
    assert found.settings["level"] == 1 and found.probabilities.shape == (4, 7, 2)
    assert found.looked_at[:, :3].all() and not found.looked_at[:, 4:].any()
    reader = SlideReader(slide)
    for row, column in ((0, 0), (2, 1), (3, 2)):
        x, y, width, height = found.boxes[row, column]
        assert (width, height) == (80, 80) and y <= HEIGHT - height
        pixels = reader.read(x // 2, y // 2, 40, 40, 1)
        alone = trained.probabilities([trained.prepare(torch.from_numpy(pixels).permute(2, 0, 1).contiguous())])
        np.testing.assert_allclose(found.probabilities[row, column], alone[0], atol=1e-6)
    reader.close()
    np.testing.assert_allclose(found.mean(), found.probabilities[found.looked_at].mean(axis=0), atol=1e-6)
    assert found.thumbnail.shape[:2] == (round(3.75 * found.cell_pixels), round(6.25 * found.cell_pixels))
    half = found.thumbnail.shape[1] * 260 // WIDTH
    assert found.thumbnail[:, : half - 60].mean() < 215 and found.thumbnail[:, half + 60 :].min() > 230


def test_overlap_makes_a_finer_map_and_batches_do_not_matter(run_folder, slide):
    trained = TrainedNetwork(run_folder, device="cpu")
    coarse = predict_slide(trained, slide, field=40, overlap=0.5, batch_size=64, reporter=QUIET)
    fine = predict_slide(trained, slide, field=40, overlap=0.5, batch_size=1, reporter=QUIET)
    assert coarse.probabilities.shape == (8, 13, 2)
    np.testing.assert_allclose(coarse.probabilities, fine.probabilities, atol=1e-6)


def test_stains_of_the_whole_slide(run_folder, slide):
    trained = TrainedNetwork(run_folder, device="cpu")
    found = predict_slide(trained, slide, field=40, stains="slide", reporter=QUIET)
    assert found.settings["stains"] == "slide"
    reader = SlideReader(slide)
    # stains are fitted on the level of 1 um a pixel, here one tile
    whole = torch.from_numpy(reader.read(0, 0, *reader.levels[1], 1)).permute(2, 0, 1).contiguous()
    x, y, _, _ = found.boxes[1, 1]
    pixels = torch.from_numpy(reader.read(x // 2, y // 2, 40, 40, 1)).permute(2, 0, 1).contiguous()
    reader.close()
    expected = trained.probabilities([trained.prepare(pixels, trained.common_stains([whole]))])
    np.testing.assert_allclose(found.probabilities[1, 1], expected[0], atol=1e-6)
    other = predict_slide(trained, slide, field=40, reporter=QUIET)
    assert other.settings["stains"] == "tile"
    assert not np.allclose(found.probabilities[1, 1], other.probabilities[1, 1], atol=1e-6)
    with pytest.raises(ValueError, match="stains='none'"):
        predict_slide(trained, slide, stains="none")


@pytest.mark.parametrize("stains", ["tile", "slide"])
def test_reinhards_method(reinhard_folder, slide, stains):
    """The statistics of a tile, or of the whole slide, become those of the target."""
    trained = TrainedNetwork(reinhard_folder, device="cpu")
    found = predict_slide(trained, slide, field=40, stains=stains, reporter=QUIET)
    assert not trained.by_slide and found.settings["stains"] == stains
    reader = SlideReader(slide)
    whole = reinhard_fit(reader.read(0, 0, *reader.levels[1], 1), layout="HWC")
    x, y, _, _ = found.boxes[1, 1]
    pixels = torch.from_numpy(reader.read(x // 2, y // 2, 40, 40, 1)).permute(2, 0, 1).contiguous()
    reader.close()
    normalizer = ReinhardNormalizer(layout="CHW")
    normalizer.load_state_dict(load_checkpoint(reinhard_folder / "best.pt")["stain"]["normalizer"])
    expected = normalizer(pixels, source=whole if stains == "slide" else None)
    assert not torch.equal(expected, pixels)
    given = trained.probabilities([PatchTransform(32)(expected)])
    np.testing.assert_allclose(found.probabilities[1, 1], given[0], atol=1e-6)


def test_the_command_writes_tables_and_maps(run_folder, slide, tmp_path, capsys):
    out = tmp_path / "out"
    # 152 um, from the training at 200X: the slide has two tiles by one
    assert main(["predict", str(run_folder), str(slide), "--out", str(out), "--device", "cpu", "--quiet"]) == 0
    with open(out / "slides" / "slide.svs.tiles.csv", newline="") as file:
        tiles = list(csv.DictReader(file))
    assert len(tiles) == 2 and all(abs(int(tile["width"]) - 303.6) <= 8 for tile in tiles)
    with open(out / "predictions.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    seen = [float(tile["p_malignant"]) for tile in tiles if tile["p_malignant"]]
    assert row["kind"] == "slide" and int(row["tiles"]) == len(seen)
    assert float(row["p_malignant"]) == pytest.approx(np.mean(seen), abs=1e-5)
    assert Image.open(out / "slides" / "slide.svs.heatmap.png").mode == "RGBA"
    assert min(Image.open(out / "slides" / "slide.svs.overlay.png").size) > 100
    record = json.loads((out / "predict.json").read_text())["slides"][str(slide)]
    assert record["field_um"] == pytest.approx(151.8) and record["shown"] == "malignant"


def test_what_is_not_known_has_to_be_said(run_folder, slide, monkeypatch):
    trained = TrainedNetwork(run_folder, device="cpu")
    with pytest.raises(ValueError, match=r"overlap=1"):
        predict_slide(trained, slide, overlap=1.0)
    monkeypatch.setattr(trained, "config", trained.config.__class__(data="x", out="y"))
    with pytest.raises(ValueError, match="all magnifications.*--field"):
        predict_slide(trained, slide)
    real = SlideReader.__init__

    def without_size(self, path):
        real(self, path)
        self.mpp = None

    monkeypatch.setattr(SlideReader, "__init__", without_size)
    with pytest.raises(ImageReadError, match="pass mpp"):
        predict_slide(trained, slide, field=40)
