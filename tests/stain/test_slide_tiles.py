"""Tiles of slides as a data set: where they lie, what they hold, and that workers may read them."""

from __future__ import annotations

import copy
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Subset

from ernet_fast.data.slide_reader import SlideReader
from ernet_fast.data.synthetic import generate_patch
from ernet_fast.scale import SlideForm, normalize_slide
from ernet_fast.scale.slide_writer import Form, write_pyramid
from ernet_fast.stain import MacenkoNormalizer, ReinhardNormalizer, SlideTiles, slide_tiles

openslide = pytest.importorskip("openslide")
pytest.importorskip("tifffile")
pytest.importorskip("imagecodecs")

WIDTH, HEIGHT = 1000, 640


def tissue(seed: int) -> np.ndarray:
    """Tissue on the left, white on the right."""
    patch = generate_patch("DC", size=(320, 250), seed=seed).image.transpose(1, 2, 0)
    image = np.full((HEIGHT, WIDTH, 3), 244, np.uint8)
    image[:, :500] = np.tile(patch, (2, 2, 1))
    return image


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    return [tissue(1), tissue(5)]


@pytest.fixture(scope="module")
def slides(tmp_path_factory, images) -> list[Path]:
    """Two slides at 40x (0.25 micrometres a pixel) without loss."""
    folder = tmp_path_factory.mktemp("slides")
    form = Form(tile=128, compression="deflate", mpp=(0.25, 0.25), description="Aperio test|AppMag = 40|MPP = 0.25")
    paths = [folder / f"{number}.svs" for number in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        with open(path, "wb") as file:

            def read(tile, image=image):
                x, y, width, height = tile
                return image[y : y + height, x : x + width]

            write_pyramid(file, folder, (WIDTH, HEIGHT), read, form, lambda: None)
    return paths


@pytest.fixture
def normalizer() -> MacenkoNormalizer:
    return MacenkoNormalizer().fit(torch.from_numpy(generate_patch("DC", size=(128, 128), seed=9).image))


class TestGrid:
    def test_places_and_pixels_of_level_0(self, slides, images):
        tiles = SlideTiles(slides, size=100, mpp=None, overlap=20, tissue=0)
        columns, rows = range(0, WIDTH - 99, 80), range(0, HEIGHT - 99, 80)
        expected = [(slide, x, y) for slide in range(2) for y in rows for x in columns]
        assert [tiles.place(i) for i in range(len(tiles))] == expected
        for i in (0, 5, len(tiles) // 2, -1):
            tile = tiles[i]
            assert tile[1:] == expected[i] and tile.image.shape == (3, 100, 100) and tile.image.is_contiguous()
            right = images[tile.slide][tile.y : tile.y + 100, tile.x : tile.x + 100]
            assert np.array_equal(tile.image.permute(1, 2, 0).numpy(), right)
        assert tiles.tiles_of(1) == range(len(rows) * len(columns), 2 * len(rows) * len(columns))
        assert np.array_equal(tiles.coordinates(1), [place[1:] for place in expected[: len(expected) // 2]])
        assert len(list(tiles)) == len(tiles)
        with pytest.raises(IndexError):
            tiles[len(tiles)]

    def test_tissue_alone(self, slides):
        """Nothing of the white half, and nothing of the tissue is missing."""
        tiles = SlideTiles(slides[0], size=100, mpp=0.25, tissue=0.25)
        found = {tuple(place) for place in tiles.coordinates(0).tolist()}
        assert found and all(x < 500 for x, _ in found)
        assert len(found) >= 0.8 * 5 * 6
        strict = SlideTiles(slides[0], size=100, mpp=0.25, tissue=1.0)
        assert len(strict) < len(tiles) < len(SlideTiles(slides[0], size=100, mpp=0.25, tissue=0)) == 60

    def test_resolutions(self, slides, images):
        halved = images[0].reshape(HEIGHT // 2, 2, WIDTH // 2, 2, 3).astype(int).sum(axis=(1, 3)) + 2 >> 2
        tiles = SlideTiles(slides[0], size=64, mpp=0.5, tissue=0)
        assert tiles.patch_size(0) == (128, 128) and len(tiles) == (WIDTH // 128) * (HEIGHT // 128)
        number, x, y = tiles.place(10)
        assert np.array_equal(tiles.raw(number, x, y), halved[y // 2 : y // 2 + 64, x // 2 : x // 2 + 64])
        scaled = SlideTiles(slides[0], size=64, mpp=0.4, tissue=0)  # from level 0
        number, x, y = scaled.place(10)
        assert scaled.patch_size(0) == (102, 102) and (x, y) == (102, 102)
        region = Image.fromarray(images[0][y : y + 102, x : x + 102]).resize((64, 64), Image.Resampling.BILINEAR)
        assert np.array_equal(scaled.raw(number, x, y), np.asarray(region))
        near = SlideTiles(slides[0], size=64, mpp=0.252, tissue=0)
        assert np.array_equal(near.raw(0, 3, 5), images[0][5:69, 3:67]), "no scaling for a difference of 1 %"

    def test_a_slide_without_a_resolution(self, slides, tmp_path, images):
        path = tmp_path / "plain.tif"
        with open(path, "wb") as file:
            write_pyramid(file, tmp_path, (300, 200), lambda t: images[0][: t[3], : t[2]], Form(), lambda: None)
        with pytest.raises(ValueError, match="says no micrometres"):
            SlideTiles(path, size=50)
        assert SlideTiles(path, size=50, slide_mpp=0.25, tissue=0).patch_size(0) == (100, 100)
        assert len(SlideTiles(path, size=400, mpp=None)) == 0, "a slide smaller than a tile"

    def test_places_of_another_program(self, slides, images):
        places = [[(3, 5), (900, 540)], np.zeros((0, 2), int)]
        tiles = SlideTiles(slides, size=100, mpp=None, places=places)
        assert [tiles.place(i) for i in range(len(tiles))] == [(0, 3, 5), (0, 900, 540)]
        assert np.array_equal(tiles[1].image.permute(1, 2, 0).numpy(), images[0][540:, 900:])
        for wrong, message in (
            ([[(901, 0)], []], "outside"),
            ([[(0.5, 1.0)], []], "whole numbers"),
            ([[(0, 0)]], "expected one each"),
        ):
            with pytest.raises(ValueError, match=message):
                SlideTiles(slides, size=100, mpp=None, places=wrong)

    def test_nonsense(self, slides, normalizer):
        for wrong in ({"size": 0}, {"size": 9, "overlap": 9}, {"mpp": 0.0}, {"tissue": 2}, {"stains": "all"}):
            with pytest.raises(ValueError, match=str(next(iter(wrong)))):
                SlideTiles(slides, **wrong)
        with pytest.raises(ValueError, match="finer than"):
            SlideTiles(slides, mpp=0.1)
        with pytest.raises(TypeError, match="normalizer is a str"):
            SlideTiles(slides, "published")
        with pytest.raises(ValueError, match="layout"):
            SlideTiles(slides, MacenkoNormalizer(layout="HWC"))
        with pytest.raises(ValueError, match="2 slides"):
            SlideTiles(slides, normalizer, sources=[None])
        with pytest.raises(ValueError, match="one of the two"):
            SlideTiles(slides, normalizer, sources=[None, None], stains="tile")
        with pytest.raises(ValueError, match="no stains are known"):
            SlideTiles(slides).sources([0])


class TestStains:
    def test_tiles_are_those_of_the_normalised_slide(self, slides, normalizer, tmp_path):
        tiles = SlideTiles(slides, normalizer, size=100, mpp=0.25)
        for number, slide in enumerate(slides):
            out = tmp_path / f"{number}.tif"
            normalize_slide(slide, out, SlideForm(compression="deflate"), target=normalizer.target)
            reader = SlideReader(out)
            tile = tiles[tiles.tiles_of(number)[7]]
            assert tile.slide == number
            assert np.array_equal(tile.image.permute(1, 2, 0).numpy(), reader.read(tile.x, tile.y, 100, 100))

    def test_of_each_tile_and_known(self, slides, normalizer):
        alone = SlideTiles(slides, normalizer, size=100, mpp=0.25, stains="tile")
        raw = SlideTiles(slides, size=100, mpp=0.25)
        assert torch.equal(alone[3].image, normalizer(raw[3].image))
        fitted = SlideTiles(slides, normalizer, size=100, mpp=0.25)
        known = SlideTiles(slides, normalizer, size=100, mpp=0.25, sources=fitted.fits)
        assert torch.equal(known[3].image, fitted[3].image) and not torch.equal(known[3].image, alone[3].image)

    def test_batches_normalised_elsewhere(self, slides, normalizer):
        fitted = SlideTiles(slides, normalizer, size=100, mpp=0.25)
        fitted[0]
        raw = fitted.unnormalized()
        assert fitted.normalizer is normalizer and raw.normalizer is None and not raw._open and len(raw) == len(fitted)
        batch = next(iter(DataLoader(raw, batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(0))))
        assert set(batch.slide.tolist()) == {0, 1}
        found = normalizer(batch.image, raw.sources(batch.slide))
        places = {fitted.place(i): i for i in range(len(fitted))}
        for image, slide, x, y in zip(found, *(part.tolist() for part in batch[1:]), strict=True):
            assert torch.equal(image, fitted[places[slide, x, y]].image)

    def test_reinhard_and_network_inputs(self, slides):
        target = torch.from_numpy(generate_patch("DC", size=(64, 64), seed=9).image)
        reinhard = SlideTiles(slides[0], ReinhardNormalizer().fit(target), size=100, mpp=0.25)
        assert reinhard[0].image.dtype == torch.uint8 and bool((reinhard[0].image[:, :3] != 0).any())
        scaled = MacenkoNormalizer(output=torch.float32, mean=(0.5,) * 3, std=(0.5,) * 3).fit(target)
        image = SlideTiles(slides[0], scaled, size=100, mpp=0.25, transform=lambda image: image + 1)[0].image
        assert image.dtype == torch.float32 and image.shape == (3, 100, 100) and 0 <= image.min() <= image.max() <= 2


class TestWorkers:
    def test_forked(self, slides, normalizer):
        tiles = SlideTiles(slides, normalizer, size=100, mpp=0.25)
        expected = torch.stack([tile.image for tile in tiles])  # the parent has slides open
        loader = DataLoader(tiles, batch_size=7, num_workers=2, multiprocessing_context="fork")
        for _ in range(2):
            found = list(loader)
            assert torch.equal(torch.cat([batch.image for batch in found]), expected)
        assert torch.cat([batch.slide for batch in found]).tolist() == [tile.slide for tile in tiles]

    def test_pickled_for_spawned_workers(self, slides, normalizer):
        tiles = SlideTiles(slides, normalizer, size=100, mpp=0.25)
        tiles[0]
        again = pickle.loads(pickle.dumps(tiles))
        assert not again._open and torch.equal(again[-1].image, tiles[-1].image) and repr(again) == repr(tiles)

    def test_a_child_opens_slides_of_its_own(self, slides):
        tiles = SlideTiles(slides, size=100, mpp=0.25)
        own = tiles._reader(0)
        process = os.fork()
        if process == 0:
            os._exit(0 if tiles._reader(0) is not own and tiles._owner == os.getpid() else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0 and tiles._reader(0) is own

    def test_few_are_open(self, slides, monkeypatch):
        monkeypatch.setattr(slide_tiles, "OPEN_SLIDES", 1)
        tiles = SlideTiles(slides, size=100, mpp=0.25)
        assert len(tiles._open) == 1
        assert tiles[0].slide == 0 and list(tiles._open) == [0] and tiles[-1].slide == 1 and list(tiles._open) == [1]

    def test_a_normaliser_on_a_gpu_says_what_to_do(self, slides, normalizer):
        tiles = SlideTiles(slides, normalizer, size=100, mpp=0.25)
        tiles.normalizer = copy.deepcopy(normalizer).to("meta")  # stands for a GPU
        with pytest.raises(RuntimeError, match=r"unnormalized\(\), and normalise batches"):
            tiles[0]
        with pytest.raises(RuntimeError, match="in a worker process"):
            next(iter(DataLoader(Subset(tiles, [0]), num_workers=1, multiprocessing_context="fork")))
