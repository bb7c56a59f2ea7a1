"""Percentiles of 8-bit images where the pixels of a tail are hard to tell from the rest: exact on every path."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from stain_images import synthetic_tissue

from ernet_fast import _backend, reference
from ernet_fast.stain import macenko_fit

# As in test_macenko_parity.py.
STAIN_TOLERANCE = 30 * 1.5 * 2.0**-24

compiled = pytest.mark.skipif(not _backend.extension_available(), reason="the extension is not built")


def same_fit(image: np.ndarray, **options) -> None:
    """The compiled fit of both memory layouts against the reference."""
    expected = reference.macenko_fit(image, layout="HWC", **options)
    planar = torch.from_numpy(image).permute(2, 0, 1).contiguous()
    for given, layout in ((image, "HWC"), (planar, "CHW")):
        fitted = macenko_fit(given, layout=layout, **options)
        assert fitted.status.tolist() == expected.status.tolist()
        if int(expected.status) == 0:
            torch.testing.assert_close(fitted.stain_matrix, expected.stain_matrix, rtol=0, atol=STAIN_TOLERANCE)
            torch.testing.assert_close(
                fitted.max_concentration, expected.max_concentration, rtol=2 * STAIN_TOLERANCE, atol=0
            )


@compiled
@pytest.mark.parametrize("seed", range(6))
def test_neighbouring_colours_at_the_ends(seed):
    """Colours one level apart on all sides of the percentiles: the ends of a bracket are told exactly."""
    rng = np.random.default_rng(seed)
    centre = rng.integers(40, 170, (4, 3))
    image = centre[rng.integers(0, 4, (150, 170))] + rng.integers(-2, 3, (150, 170, 3))
    same_fit(image.astype(np.uint8), percentile=("linear", "nearest")[seed % 2])


@compiled
@pytest.mark.parametrize("share", [0.0099, 0.01, 0.0101, 0.5])
def test_two_colours_with_the_boundary_at_the_percentile(share):
    """Ties fill the bracket on one side of the wanted rank."""
    count = 120 * 130
    image = np.empty((count, 3), np.uint8)
    image[:] = (120, 60, 110)
    image[: int(share * count)] = (150, 60, 160)
    image[int(share * count) : 2 * int(share * count)] = (60, 80, 150)
    same_fit(np.random.default_rng(0).permutation(image).reshape(120, 130, 3))


@compiled
def test_sorted_images_defeat_no_sample():
    """Rows in order of darkness, where regular samples are at their best, and one period of the sample's own stride."""
    image = synthetic_tissue(160, 160, 3).reshape(-1, 3)
    order = np.argsort(image.astype(int).sum(1))
    same_fit(image[order].reshape(160, 160, 3))
    periodic = image.copy()
    periodic[::17] = (200, 190, 200)
    same_fit(periodic.reshape(160, 160, 3))


@compiled
@pytest.mark.parametrize(
    "options", [{"alpha": 0}, {"alpha": 4.9}, {"alpha": 20}, {"alpha": 49}, {"Io": 255, "beta": 0}]
)
def test_percentiles_in_and_out_of_the_tails(options):
    same_fit(synthetic_tissue(140, 150, 5), **options)


@compiled
@pytest.mark.parametrize("channel", [0, 1, 2])
def test_a_direction_with_a_negative_component(channel):
    """One channel falls as the others rise: angles on both sides of the axis, where a cross product alone would err."""
    rng = np.random.default_rng(channel)
    amount = rng.random((130, 140, 1))
    image = np.concatenate([30 + 170 * amount] * 3, axis=2)
    image[..., channel] = 200 - image[..., channel] + 30
    image += rng.normal(0, 6, image.shape)
    same_fit(image.clip(0, 255).astype(np.uint8))


@compiled
def test_more_than_a_million_pixels_at_once():
    """More candidates than any buffer on the stack, in strips and in one piece."""
    rng = np.random.default_rng(9)
    image = np.tile(synthetic_tissue(150, 150, 9), (8, 8, 1))
    image = (image + rng.integers(0, 3, image.shape)).clip(0, 255).astype(np.uint8)
    assert image.shape[0] * image.shape[1] > 1e6
    same_fit(image)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        same_fit(image)
    finally:
        torch.set_num_threads(before)
