"""Separation on CUDA, run on the CPU in several schedules, against the CPU path."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from emulator import Emulator
from kernel_images import channels_last, degenerate, tissue

from ernet_fast import _backend
from ernet_fast.stain import MacenkoFit, MacenkoNormalizer, separate

pytestmark = pytest.mark.skipif(not _backend.extension_available(), reason="the compiled operators are not built")
TARGET = MacenkoNormalizer().target
# Three products and sums of single precision, on logarithms and rows rounded once each, on either side.
AMOUNT_ROUNDINGS = 16 * 2.0**-24


def known(count):
    """Stains of their own for every image."""
    rng = np.random.default_rng(count)
    stain = TARGET.stain_matrix.numpy() * rng.uniform(0.9, 1.1, (count, 3, 2))
    return stain, TARGET.max_concentration.numpy() * rng.uniform(0.8, 1.2, (count, 2))


def as_fit(stains):
    return MacenkoFit(*map(torch.from_numpy, stains), torch.zeros(len(stains[0]), dtype=torch.int32))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("size", [(1, 1, 3), (1, 15, 2), (7, 11, 3), (16, 24, 2), (33, 65, 1), (100, 90, 1)])
def test_separation_equals_the_cpu(simt_library, size, dtype, scaled):
    images = tissue(*size).astype(dtype)
    source = known(len(images))
    target = TARGET if scaled else None
    expected = separate(torch.from_numpy(images), as_fit(source), target=target)
    drawn = [part.numpy() for part in TARGET[:2]] if scaled else source
    for seed, laid_out in enumerate((images, channels_last(images))):
        emulator = Emulator(simt_library, seed)
        found = emulator.separate(laid_out, source, drawn, scaled)
        for k in range(2):
            alone = drawn[0], drawn[1] * (np.arange(2) == k)
            np.testing.assert_array_equal(found[k], emulator.reconstruct(laid_out, source, alone))
        if scaled:
            both = emulator.reconstruct(laid_out, source, drawn)
            for one, of_three in zip(
                (*found[:2], both), emulator.reconstruct_stains(laid_out, source, drawn), strict=True
            ):
                np.testing.assert_array_equal(one, of_three)
            if dtype == np.uint8:
                difference = np.abs(found[k].astype(int) - expected[k].numpy())
                assert difference.max() <= 1 and (difference != 0).sum() <= max(1, 5e-4 * difference.size)
            else:
                np.testing.assert_allclose(found[k], expected[k].numpy(), rtol=16 * 2.0**-24 * 8, atol=0)
        # Terms of up to ln(240), times the rows of stains that are far from parallel.
        atol = AMOUNT_ROUNDINGS * 6 * 8
        np.testing.assert_allclose(found[2], expected.concentrations.numpy(), rtol=0, atol=atol)


def test_undefined_pixels_and_any_colour(simt_library):
    images = np.concatenate([degenerate(), tissue(24, 20, 1)]).astype(np.float32)
    images[0, 1, 2, 3] = np.nan
    images[1, 2, 4, 5] = np.inf
    source = known(len(images))
    expected = separate(torch.from_numpy(images), as_fit(source))
    found = Emulator(simt_library, 3).separate(images, source, source, False)
    for one, other in zip(found, expected[:3], strict=True):
        np.testing.assert_array_equal(np.isnan(one), other.isnan().numpy())
    assert np.isnan(found[2]).sum() == 4
