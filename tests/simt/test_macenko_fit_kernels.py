"""The streaming plan of CUDA, run on the CPU in several schedules, against the CPU operators."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from emulator import Emulator
from kernel_images import channels_last, degenerate, stack, tissue
from stain_images import load, real_images

from ernet_fast import _backend
from ernet_fast.stain import MacenkoNormalizer

pytestmark = pytest.mark.skipif(not _backend.extension_available(), reason="the compiled operators are not built")
TARGET = MacenkoNormalizer().target
STAINS = TARGET.stain_matrix.numpy(), TARGET.max_concentration.numpy()

# Both paths sum the same integers, and select among keys that differ by a few roundings of numbers below 8; the closed
# forms behind them multiply that by the condition of two stains, at most a thousand here.
FIT_ATOL = 1000 * 8 * 8 * 2.0**-53


def assert_fits_agree(found, images, parameters=(240.0, 1.0, 0.15, False), value_range=255.0, atol=FIT_ATOL):
    expected = [
        part.numpy() for part in torch.ops.ernet.macenko_fit(torch.from_numpy(images), *parameters, value_range)
    ]
    np.testing.assert_array_equal(found.status, expected[2])
    np.testing.assert_allclose(found.stain, expected[0], rtol=0, atol=atol)
    np.testing.assert_allclose(found.maximum, expected[1], rtol=atol, atol=atol)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("size", [(1, 1, 3), (1, 15, 2), (4, 4, 3), (7, 11, 3), (17, 16, 2), (33, 65, 2)])
def test_fits_equal_the_cpu(simt_library, size, seed):
    images = tissue(*size)
    for laid_out in (images, channels_last(images)):
        assert_fits_agree(Emulator(simt_library, seed).fit(laid_out), laid_out)


@pytest.mark.parametrize("nearest", [False, True])
def test_degenerate_images_equal_the_cpu(simt_library, nearest):
    images = degenerate()
    for alpha, beta in ((1, 0.15), (0, 0.0), (25, 0.5), (49.5, 0.0)):
        parameters = 240.0, float(alpha), beta, nearest
        assert_fits_agree(Emulator(simt_library, 3).fit(images, parameters), images, parameters)


def test_selections_that_take_many_rounds(simt_library):
    """More equal or nearly equal keys than are kept: rounds go on to the last bit, and neighbours split."""
    rng = np.random.default_rng(3)
    few = np.array([[100, 50, 120], [101, 50, 120], [160, 90, 150], [200, 150, 190]], np.uint8)
    images = [few[rng.choice(4, (60, 61), p=p)] for p in ([0.4, 0.3, 0.2, 0.1], [0.98, 0.01, 0.005, 0.005])]
    half = np.where(np.arange(60 * 61).reshape(60, 61, 1) < 30 * 61, few[0], few[2])
    images = stack(*images, half)
    for alpha in (1.0, 10.0, 49.99):
        for nearest in (False, True):
            parameters = 240.0, alpha, 0.15, nearest
            assert_fits_agree(Emulator(simt_library, 3).fit(images, parameters), images, parameters)


def test_real_crops_equal_the_cpu(simt_library):
    paths = real_images()[:3]
    if not paths:
        pytest.skip("no real images: set ERNET_TEST_DATA")
    images = stack(*(load(path)[40:140, 60:190] for path in paths))
    assert_fits_agree(Emulator(simt_library, 1).fit(images), images)


@pytest.mark.parametrize("layout", [lambda images: images, channels_last])
def test_float_images_equal_the_cpu(simt_library, layout):
    images = layout(tissue(21, 18, 3).astype(np.float32) / 255)
    images[1, 2, 3, 4] = np.nan
    # The logarithm may be fused differently: moments differ by a unit of the fixed-point OD at most.
    atol = 12 * 2.0**-24
    found = Emulator(simt_library, 1).fit(images, (240, 1, 0.15, False), scale=255)
    assert found.status.tolist() == [0, 4, 0]
    assert_fits_agree(found, images, value_range=1.0, atol=atol)


def test_results_depend_on_neither_batch_nor_schedule_nor_grouping(simt_library):
    images = tissue(30, 31, 3)
    whole = Emulator(simt_library, 1).fit(images)
    for seed, cache in ((2, 1), (5, 1 << 16), (9, 1 << 30)):
        again = Emulator(simt_library, seed).fit(images, cache=cache)
        alone = Emulator(simt_library, seed).fit(images[1:2], cache=cache)
        for part, other, single in zip(whole, again, alone, strict=True):
            np.testing.assert_array_equal(part, other)
            np.testing.assert_array_equal(part[1:2], single)


@pytest.mark.parametrize("identity", [False, True])
def test_normalisation_equals_the_cpu(simt_library, identity):
    images = np.concatenate([degenerate(), tissue(24, 20, 2)])
    for laid_out in (images, channels_last(images)):
        tensor = torch.from_numpy(laid_out)
        expected = torch.ops.ernet.macenko_normalize(
            tensor, *map(torch.from_numpy, STAINS), 240, 1, 0.15, False, identity
        )
        found, fit = Emulator(simt_library, 4).normalize(laid_out, target=STAINS, identity=identity)
        np.testing.assert_array_equal(fit.status, expected[3].numpy())
        difference = np.abs(found.astype(int) - expected[0].numpy())
        assert difference.max() <= 1 and (difference != 0).sum() <= 5e-4 * difference.size
