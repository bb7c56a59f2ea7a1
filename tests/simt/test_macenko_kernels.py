"""The CUDA kernels, run on the CPU in several schedules, against the CPU operators."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from emulator import Emulator
from stain_images import load, real_images, synthetic_tissue

from ernet_fast import _backend
from ernet_fast.stain import MacenkoNormalizer, macenko_fit

pytestmark = pytest.mark.skipif(not _backend.extension_available(), reason="the compiled operators are not built")
TARGET = MacenkoNormalizer().target
SIZES = [(1, 1), (1, 15), (4, 4), (7, 11), (17, 16), (33, 65), (224, 224)]


def stack(*images):
    return np.ascontiguousarray(np.stack(images).transpose(0, 3, 1, 2))


def layouts(images):
    """The same images planar and channels-last."""
    last = np.ascontiguousarray(images.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    return {"planar": images, "channels-last": last}


def cases():
    for height, width in SIZES:
        for count in (1, 3) if height < 224 else (1,):
            yield f"{count}x{height}x{width}", [synthetic_tissue(height, width, seed) for seed in range(count)]
    size = (24, 20, 3)
    yield (
        "degenerate",
        [
            np.full(size, 255, np.uint8),
            np.zeros(size, np.uint8),
            np.full(size, (100, 50, 120), np.uint8),
            np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8),
        ],
    )
    for path in real_images()[:2]:
        yield path.stem, [load(path)[:150, :200]]


CASES = [pytest.param(images, id=name) for name, images in cases()]


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("images", CASES)
def test_reconstruction_equals_the_cpu(simt_library, images, seed):
    images = stack(*images)
    emulator = Emulator(simt_library, seed)
    fit = macenko_fit(torch.from_numpy(images))
    ok = fit.status == 0
    source = (
        torch.where(ok[:, None, None], fit.stain_matrix, TARGET.stain_matrix),
        torch.where(ok[:, None], fit.max_concentration, TARGET.max_concentration),
    )
    target = TARGET.stain_matrix, TARGET.max_concentration
    for dtype in (np.uint8, np.float32):
        typed = images.astype(dtype)
        expected = torch.ops.ernet.macenko_reconstruct(torch.from_numpy(typed), *source, *target, 240.0).numpy()
        for laid_out in layouts(typed).values():
            found = emulator.reconstruct(laid_out, [s.numpy() for s in source], [t.numpy() for t in target])
            if dtype == np.uint8:
                difference = np.abs(found.astype(int) - expected)
                assert difference.max() <= 1
                assert (difference != 0).sum() <= max(1, 5e-4 * difference.size)
            else:
                # Exponents below 16 in float32: half an ulp each for the table, three products and sums, and exp2.
                np.testing.assert_allclose(found, expected, rtol=16 * 2.0**-24 * 8, atol=0)


def test_invalid_floats_stay_nan(simt_library):
    images = stack(synthetic_tissue(9, 13, 1), synthetic_tissue(9, 13, 2)).astype(np.float32)
    images[1, 1, 4, 5] = np.nan
    images[1, 2, 6, 7] = np.inf
    emulator = Emulator(simt_library, 1)
    stains = TARGET.stain_matrix.numpy(), TARGET.max_concentration.numpy()
    out = emulator.reconstruct(images, stains, stains)
    undefined = np.isnan(out[1]).all(axis=0)
    assert undefined[4, 5] and undefined[6, 7] and undefined.sum() == 2 and np.isfinite(out[0]).all()


def test_range_and_parameters_reach_the_kernels(simt_library):
    images = stack(synthetic_tissue(20, 30, 1)).astype(np.float32) / 255
    emulator = Emulator(simt_library, 1)
    stains = TARGET.stain_matrix.numpy(), TARGET.max_concentration.numpy()
    other = stains[0], stains[1] * 1.3
    out = emulator.reconstruct(images, stains, other, 250, 255)
    arguments = (torch.from_numpy(part) for part in (*stains, *other))
    expected = torch.ops.ernet.macenko_reconstruct(torch.from_numpy(images), *arguments, 250.0, 1.0).numpy()
    np.testing.assert_allclose(out, expected, rtol=16 * 2.0**-24 * 8, atol=0)
