"""Images without a fit: each has its status, follows the policy, and touches no other image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from stain_images import batch, synthetic_tissue

from ernet_fast import reference
from ernet_fast.stain import MacenkoNormalizer, MacenkoStatus, macenko_fit, macenko_normalize, torch_backend

TARGET = MacenkoNormalizer().target
SIZE = (48, 64)
GOOD = [synthetic_tissue(*SIZE, seed) for seed in (1, 2)]
OK, FEW, RANK, ZERO, BAD = MacenkoStatus


def blank(value=255.0):
    return np.full((*SIZE, 3), value, dtype=np.float64)


def tissue_pixels(count):
    """White with `count` pixels of tissue."""
    image = blank()
    rng = np.random.default_rng(count)
    image.reshape(-1, 3)[rng.permutation(SIZE[0] * SIZE[1])[:count]] = rng.integers(30, 180, (count, 3))
    return image


def pale_noise():
    return np.random.default_rng(0).integers(225, 256, (*SIZE, 3)).astype(np.float64)


def two_colours():
    image = blank(100.0)
    image[::2] = (60, 120, 180)
    return image


def haematoxylin_only():
    amount = np.random.default_rng(0).uniform(0.3, 2, (*SIZE, 1))
    return np.floor(240 * np.exp(-amount * np.array([0.65, 0.70, 0.29])))


def little_tissue_on_bright():
    """Enough tissue for angles, but less than 1 % of the pixels, so the 99th percentile is background."""
    return tissue_pixels(20)


def one_pixel(value):
    image = GOOD[0].astype(np.float64)
    image[5, 7, 1] = value
    return image


CASES = {
    "all white": (blank(), FEW),
    "pale noise": (pale_noise(), FEW),
    "all black": (blank(0.0), RANK),
    "one colour": (blank(100.0) * [1.0, 0.5, 1.2], RANK),
    "two colours": (two_colours(), RANK),
    "haematoxylin only": (haematoxylin_only(), OK),
    "tissue under 1 percent": (little_tissue_on_bright(), ZERO),
    **{f"{count} tissue pixels": (tissue_pixels(count), FEW) for count in range(10)},
    "10 tissue pixels": (tissue_pixels(10), ZERO),
}
FLOAT_CASES = {
    "NaN": (one_pixel(np.nan), BAD),
    "inf": (one_pixel(np.inf), BAD),
    "-inf": (one_pixel(-np.inf), BAD),
    "negative": (one_pixel(-1.0), BAD),
    "beyond the range": (one_pixel(256.0), BAD),
    "rounding overshoot": (one_pixel(255.4), OK),
    "all NaN": (blank(np.nan), BAD),
}


def as_batch(image, dtype):
    parts = [GOOD[0], image, GOOD[1]]
    return torch.from_numpy(np.stack(parts)).permute(0, 3, 1, 2).contiguous().to(dtype)


TABLE = [
    pytest.param(image, status, dtype, id=f"{name}-{str(dtype).removeprefix('torch.')}")
    for cases, dtypes in (
        (CASES, (torch.uint8, torch.float32, torch.float64)),
        (FLOAT_CASES, (torch.float32, torch.float64)),
    )
    for name, (image, status) in cases.items()
    for dtype in dtypes
]


@pytest.mark.parametrize(("image", "status", "dtype"), TABLE)
def test_status_of_every_backend(image, status, dtype):
    images = as_batch(image, dtype)
    assert macenko_fit(images).status.tolist() == [OK, status, OK]
    assert macenko_fit(images.to(memory_format=torch.channels_last)).status.tolist() == [OK, status, OK]
    assert reference.macenko_fit(images).status.tolist() == [OK, status, OK]
    assert torch_backend.macenko_fit(images, 240.0, 1.0, 0.15, False)[2].tolist() == [OK, status, OK]


@pytest.mark.parametrize(("image", "status", "dtype"), TABLE)
def test_policies_and_neighbours(image, status, dtype):
    images = as_batch(image, dtype)
    kept = images.clone()
    alone = [macenko_normalize(images[i : i + 1], TARGET)[0] for i in (0, 2)]
    for policy in ("reference", "identity"):
        out, statuses = macenko_normalize(images, TARGET, on_degenerate=policy, return_status=True)
        assert statuses.tolist() == [OK, status, OK]
        assert torch.equal(out[0], alone[0]) and torch.equal(out[2], alone[1])
        if status != OK and policy == "identity":
            assert torch.equal(out[1].nan_to_num(-1), images[1].nan_to_num(-1))
        if policy == "reference":
            expected = reference.macenko_normalize(images, TARGET)[1]
            if dtype == torch.uint8:
                assert (out[1].int() - expected.int()).abs().max() <= 1
            else:
                torch.testing.assert_close(out[1], expected, rtol=1e-4, atol=0, equal_nan=True)
    if status == OK:
        macenko_normalize(images, TARGET, on_degenerate="raise")
    else:
        with pytest.raises(ValueError, match=f"image 1: {status.reason[:20]}"):
            macenko_normalize(images, TARGET, on_degenerate="raise")
    assert torch.equal(images.nan_to_num(-1), kept.nan_to_num(-1))


def test_fit_of_a_degenerate_image_holds_nan():
    fit = macenko_fit(as_batch(blank(), torch.uint8))
    assert fit.stain_matrix[1].isnan().all() and fit.max_concentration[1].isnan().all()
    assert fit.stain_matrix[[0, 2]].isfinite().all()


def test_the_error_lists_every_bad_image():
    images = batch(GOOD[0], blank().astype(np.uint8), blank(90).astype(np.uint8))
    with pytest.raises(ValueError, match=r"image 1: fewer than 10 tissue pixels; image 2: the tissue colours"):
        macenko_normalize(images, TARGET, on_degenerate="raise")


@pytest.mark.parametrize("policy", ["reference", "identity", "raise"])
def test_normalizer_follows_its_policy(policy):
    normalizer = MacenkoNormalizer(on_degenerate=policy)
    white = blank().astype(np.uint8)
    if policy == "raise":
        for call in (normalizer, normalizer.normalize):
            with pytest.raises(ValueError, match="image 0"):
                call(white)
        return
    out, h, e = normalizer.normalize(white)
    np.testing.assert_array_equal(out, normalizer(white))
    np.testing.assert_array_equal(out, white if policy == "identity" else reference.macenko_normalize(white, TARGET))
    assert h.shape == e.shape == white.shape


def test_one_pixel_image_has_too_few():
    for shape in ((1, 1, 3), (3, 1, 1)):
        assert macenko_fit(np.full(shape, 100, np.uint8)).status.tolist() == [FEW]
    assert macenko_fit(torch.full((2, 3, 1, 1), 100.0)).status.tolist() == [FEW, FEW]


def test_thresholds_of_python_and_cpp_agree():
    """The compiled code has its own copy of the numbers."""
    from pathlib import Path

    from ernet_fast.stain import result

    header = Path(__file__).resolve().parents[2] / "csrc" / "macenko" / "steps" / "stains.h"
    if not header.exists():
        pytest.skip("the C++ sources are not beside the tests")
    text = header.read_text()
    assert f"kMinTissuePixels = {result.MIN_TISSUE_PIXELS};" in text
    assert f"kRankTolerance = {result.RANK_TOLERANCE:.0e};".replace("e-0", "e-") in text
    assert f"kMinConcentration = {result.MIN_CONCENTRATION:.0e};".replace("e-06", "e-6") in text
    assert f"kEqualComponents = {result.EQUAL_COMPONENTS:.0e};".replace("e-06", "e-6") in text
