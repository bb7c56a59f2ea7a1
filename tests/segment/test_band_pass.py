from __future__ import annotations

import math

import pytest
import torch

from ernet_fast.segment import band_pass

ndimage = pytest.importorskip("scipy.ndimage", reason="SciPy (extra segment) is the oracle")


@pytest.mark.parametrize("mpp", [(1.0, 1.0), (0.5, 0.8)])
@pytest.mark.parametrize("size", [(40, 57), (64, 31)])
def test_it_is_the_difference_of_two_gaussians(mpp, size):
    values = torch.rand((2, *size), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = band_pass(values, mpp, 1.6, 3.2)
    for image, result in zip(values, found, strict=True):
        # sampled Gaussians of two pixels or more differ from continuous ones by exp(-2 pi^2) of their height
        fine, coarse = (
            ndimage.gaussian_filter(image.numpy(), [sigma / side for side in mpp], mode="mirror", truncate=8)
            for sigma in (1.6, 3.2)
        )
        inner = slice(12, -12)  # the filter's mirror ends three standard deviations beyond the border
        assert abs(result.numpy() - (fine - coarse))[inner, inner].max() < 1e-4


def test_a_wave_keeps_the_share_that_the_formula_gives():
    x = torch.arange(400, dtype=torch.float64) * 0.25
    f = 0.1  # cycles a micrometre: ten whole ones
    wave = torch.cos(2 * math.pi * f * x).expand(1, 64, 400)
    gain = math.exp(-2 * (math.pi * 0.5 * f) ** 2) - math.exp(-2 * (math.pi * 4 * f) ** 2)
    found = band_pass(wave, (0.25, 0.25), 0.5, 4.0)
    torch.testing.assert_close(found[..., 60:-60], gain * wave[..., 60:-60], atol=3e-3, rtol=0)


def test_a_constant_becomes_zero_and_small_images_pass():
    assert band_pass(torch.full((1, 3, 2), 7.0), (0.1, 0.1), 0.5, 3.5).abs().max() < 1e-5
    assert band_pass(torch.full((1, 1, 1), 7.0), (0.1, 0.1), 0.5, 3.5).abs().max() < 1e-5


def test_an_image_does_not_depend_on_its_batch():
    values = torch.rand((3, 33, 47), generator=torch.Generator().manual_seed(2))
    whole = band_pass(values, (0.5, 0.5), 0.5, 3.5)
    assert all(torch.equal(band_pass(values[k : k + 1], (0.5, 0.5), 0.5, 3.5)[0], whole[k]) for k in range(3))


@pytest.mark.parametrize(("finest", "coarsest"), [(2.0, 2.0), (-1.0, 2.0), (0.0, math.inf)])
def test_limits_that_leave_no_band(finest, coarsest):
    with pytest.raises(ValueError, match="0 <= finest < coarsest"):
        band_pass(torch.zeros(1, 8, 8), (1.0, 1.0), finest, coarsest)
