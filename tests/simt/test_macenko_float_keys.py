"""Keys of float images in float32: as near to those in double precision as the selections allow for."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from emulator import Emulator, pointer
from kernel_images import tissue
from test_macenko_fit_kernels import assert_fits_agree

IO = 240.0
# Of stains and principal planes, and rows that cancel; rows of concentrations have either sign.
ROWS = [
    ((0.62, 0.65, 0.44), (0.30, -0.66, 0.69)),
    ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11)),
    ((2.4, -1.1, 0.3), (-1.9, 2.2, 0.4)),
    ((1.0, -1.0, 0.0), (0.0, 1.0, -1.0)),
]


def colours() -> np.ndarray:
    """Values of 0 to 1: any, grey levels, near the background, dark, and out of range as rounding may leave them."""
    rng = np.random.default_rng(3)
    background = (IO - 1) / 255
    steps = np.arange(-1500, 1500) * np.spacing(np.float32(background))
    return np.concatenate([
        rng.uniform(-0.5 / 255, 255.5 / 255, (20000, 3)),
        rng.integers(0, 256, (20000, 3)) / 255,
        background + rng.choice([1e-2, 1e-4, 1e-6], (10000, 1)) * rng.standard_normal((10000, 3)),
        background + np.stack([steps, rng.permutation(steps), np.zeros_like(steps)], 1),
        rng.uniform(-0.5, 3, (10000, 3)) / 255,
    ]).clip(-0.5 / 255, 255.5 / 255).astype(np.float32)  # fmt: skip


@pytest.mark.parametrize("scale", [255.0, 1.0, 255 / 65535])
def test_errors_are_within_the_margins(simt_library, scale):
    """The emulator's logarithm is off by up to 2 ulp, where CUDA says 1."""
    library = ctypes.CDLL(str(simt_library))
    values = np.ascontiguousarray(colours() * np.float32(255 / scale))
    values = values[((values * scale >= -0.5) & (values * scale <= 255.5)).all(1)]
    for rows in ROWS if scale == 255 else ROWS[:1]:
        for angles, beta in ((True, 0.15), (True, 0.0), (True, -0.05), (True, 1e-6), (False, 0.15)):
            counts, greatest = np.zeros(2, np.int64), np.zeros(2)
            library.simt_try_floats(
                pointer(np.array(rows)), ctypes.c_double(IO), ctypes.c_double(beta), ctypes.c_double(scale),
                ctypes.c_bool(angles), pointer(values), ctypes.c_int64(len(values)), pointer(counts), pointer(greatest),
            )  # fmt: skip
            assert counts[0] == 0, "tissue is told as in double precision"
            assert counts[1] < 0.3 * len(values), "most keys are certain"
            assert 0 < greatest[0] <= 1 and 0.1 < greatest[1] <= 1, (rows, angles, beta, greatest)


@pytest.mark.parametrize("beta", [0.15, 0.3])
def test_the_order_statistics_are_those_of_the_cpu(simt_library, beta):
    """Of grey levels and of values between them; moments differ by a unit of the fixed-point OD."""
    images = tissue(40, 37, 2).astype(np.float32) / 255
    images[1] += np.random.default_rng(0).uniform(-0.002, 0.002, images[1].shape).astype(np.float32)
    parameters = IO, 1.0, beta, False
    found = Emulator(simt_library, 2).fit(images, parameters, scale=255)
    assert_fits_agree(found, images, parameters, value_range=1.0, atol=12 * 2.0**-24)
