"""The images of the Macenko bench: different, of the size asked for, with tissue, and said to be what they are."""

from __future__ import annotations

import macenko_calls
import macenko_images
import numpy as np
import pytest
import torch
from macenko_images import ADVERSARIAL, SIZES, adversarial, different_images, tissue_pixels
from tissue import varied_tissue


def assert_different(images, size, count):
    assert len(images.arrays) == count == len({image.tobytes() for image in images.arrays})
    assert all(image.shape == (*SIZES[size], 3) and image.dtype == np.uint8 for image in images.arrays)
    assert all(image.flags.c_contiguous for image in images.arrays)


def test_without_data_images_are_generated(monkeypatch):
    monkeypatch.setenv("ERNET_TEST_DATA", "/absent")
    images = different_images("64x64", 20)
    assert_different(images, "64x64", 20)
    assert images.origin == "20 generated"
    shares = [tissue_pixels(image) / 64**2 for image in images.arrays]
    assert min(shares) > 0.02 and max(shares) - min(shares) > 0.3, "density and background vary"


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Two sets: six files that have one crop of 224x224 each, and one of white background."""
    pil = pytest.importorskip("PIL.Image")
    for first, name in ((0, "BreaKHis_tiny"), (10, "BreaKHis_mini")):
        (tmp_path / name).mkdir()
        for number in range(3):
            pil.fromarray(varied_tissue(first + number, 230, 350, 0.9)).save(tmp_path / name / f"{number}.png")
    pil.fromarray(np.full((300, 300, 3), 250, np.uint8)).save(tmp_path / "BreaKHis_tiny" / "white.png")
    monkeypatch.setenv("ERNET_TEST_DATA", str(tmp_path))


def test_crops_come_from_all_sets_in_turn(data):
    images = different_images("224x224", 4)
    assert_different(images, "224x224", 4)
    assert images.origin == "real: 2 of BreaKHis_tiny; 2 of BreaKHis_mini"
    with pytest.raises(ValueError, match="has 6 different images for 224x224; 64 are asked for"):
        different_images("224x224", 64)


def test_images_that_are_too_small_are_continued_by_their_mirror_images(data):
    images = different_images("700x460", 6)
    assert_different(images, "700x460", 6)
    assert images.origin == (
        "real: 3 of BreaKHis_tiny, mirrored to fill the size; 3 of BreaKHis_mini, mirrored to fill the size"
    )
    for image in images.arrays:
        assert np.array_equal(image, image[::-1]) and np.array_equal(image, image[:, ::-1])


@pytest.mark.parametrize("kind", ADVERSARIAL)
def test_adversarial_images_are_what_they_are_called(kind):
    first, second = (adversarial(kind, seed, 96, 96) for seed in (0, 1))
    assert first.shape == (96, 96, 3) and first.dtype == np.uint8 and not np.array_equal(first, second)
    colours = len(np.unique(first.reshape(-1, 3), axis=0))
    expected = {"noise": colours > 8000, "few colours": colours == 12, "two colours": colours == 2,
                "gradients": np.ptp(first) > 150, "1 % tissue": tissue_pixels(first) < 0.012 * 96**2,
                "ties": not (first % 32).any()}  # fmt: skip
    assert expected[kind]


def test_the_sets_and_sizes_are_those_of_the_documents():
    assert list(SIZES) == ["64x64", "96x96", "224x224", "700x460", "1024x1024"]
    assert macenko_images.SETS[-1] == "torchstain"


def test_each_contestant_is_given_the_images_in_its_own_form():
    images = [varied_tissue(seed, 48, 64) for seed in range(5)]
    names = (*macenko_calls.OWN, "torchstain numpy")
    calls = macenko_calls.calls_of(names, "normalize", images, varied_tissue(9, 80, 80), most=3)
    assert list(calls["ernet_fast"]) == list(calls["ernet_fast channels-last"]) == list(range(5))
    for number, image in enumerate(images):
        contiguous, channels_last = (calls[who][number]() for who in macenko_calls.OWN)
        assert torch.equal(contiguous, channels_last) and contiguous.shape == (1, 3, 48, 64)
        assert channels_last.is_contiguous(memory_format=torch.channels_last)
        assert np.shares_memory(macenko_calls.tensor_of(image, "channels-last").numpy(), image)
    if "torchstain numpy" in calls:
        assert list(calls["torchstain numpy"]) == [0, 2, 4], "fewer images, at even distances"
        (found,) = calls["torchstain numpy"][2]()
        own = calls["ernet_fast"][2]()[0].permute(1, 2, 0).numpy()
        assert np.abs(found.astype(int) - own).max() <= 1
