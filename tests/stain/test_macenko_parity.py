"""The compiled path and the batched torch path against the float64 reference, in every dtype and layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from stain_images import batch, load, real_parameters, synthetic_parameters, synthetic_tissue

from ernet_fast import reference
from ernet_fast.stain import MacenkoNormalizer, macenko_fit, macenko_normalize, torch_backend

TARGET = MacenkoNormalizer().target
IMAGES = [*real_parameters(), *synthetic_parameters()]
# Fixed-point ODs are off by at most 1.5 units of 2^-24, and eigenvectors by that times the ratio of the OD's spread to
# the eigenvalue gap, which is below 30 in these images.
STAIN_TOLERANCE = 30 * 1.5 * 2.0**-24


@pytest.mark.parametrize("percentile", ["linear", "nearest"])
@pytest.mark.parametrize("parameter", IMAGES)
def test_uint8_images_equal_the_reference(parameter, percentile):
    image = load(parameter)
    if percentile == "nearest":
        image = np.ascontiguousarray(image[:224, :224])  # the reference is slow
    wanted = reference.macenko_fit(image, percentile=percentile)
    expected = reference.macenko_normalize(image, TARGET, wanted)
    planar = batch(image)
    kept = planar.clone()
    for images in (planar, planar.to(memory_format=torch.channels_last)):
        fit = macenko_fit(images, percentile=percentile)
        assert fit.status.tolist() == [0]
        torch.testing.assert_close(fit.stain_matrix, wanted.stain_matrix, rtol=0, atol=STAIN_TOLERANCE)
        torch.testing.assert_close(fit.max_concentration, wanted.max_concentration, rtol=STAIN_TOLERANCE, atol=0)
        out = macenko_normalize(images, TARGET, percentile=percentile)
        assert out.stride() == images.stride()
        difference = np.abs(out[0].permute(1, 2, 0).numpy().astype(int) - expected)
        assert difference.max() <= 1
        assert (difference == 0).mean() >= 0.9995
    assert torch.equal(planar, kept)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("range_", [1, 255])
@pytest.mark.parametrize("channels_last", [False, True])
def test_floating_point_images_equal_the_reference(dtype, range_, channels_last):
    images = batch(synthetic_tissue(53, 47, 1), synthetic_tissue(53, 47, 2)).double() * (range_ / 255)
    images = images.to(dtype)
    if channels_last:
        images = images.to(memory_format=torch.channels_last)
    expected = reference.macenko_normalize(images.double(), TARGET, range=range_)
    out = macenko_normalize(images, TARGET, range=range_)
    assert out.dtype == dtype and out.stride() == images.stride()
    # The stains agree to STAIN_TOLERANCE, and exponents, below 6, amplify that; the result is rounded to its dtype.
    relative = 6 * STAIN_TOLERANCE + torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), expected, rtol=relative, atol=0)


@pytest.mark.parametrize("percentile", ["linear", "nearest"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_batched_torch_path_equals_the_reference(percentile, dtype):
    images = batch(*(synthetic_tissue(37, 61, seed) for seed in range(4))).to(dtype)
    images[2] = 255  # one without tissue
    numbers = 240.0, 1.0, 0.15, percentile == "nearest"
    target = TARGET.stain_matrix, TARGET.max_concentration
    for identity in (False, True):
        out, stain, maximum, status = torch_backend.macenko_normalize(images, *target, *numbers, identity)
        policy = "identity" if identity else "reference"
        expected, statuses = reference.macenko_normalize(
            images, TARGET, percentile=percentile, on_degenerate=policy, return_status=True
        )
        assert status.tolist() == statuses.tolist() == [0, 0, 1, 0]
        if dtype == torch.uint8:
            difference = (out.int() - expected.int()).abs()
            assert difference.max() <= 1 and (difference == 0).double().mean() >= 0.9995
        else:
            relative = 6 * STAIN_TOLERANCE + torch.finfo(dtype).eps
            torch.testing.assert_close(out, expected, rtol=relative, atol=0)
    wanted = reference.macenko_fit(images, percentile=percentile)
    torch.testing.assert_close(stain, wanted.stain_matrix, rtol=0, atol=STAIN_TOLERANCE, equal_nan=True)
    torch.testing.assert_close(maximum, wanted.max_concentration, rtol=STAIN_TOLERANCE, atol=0, equal_nan=True)


def test_groups_of_the_batched_path_change_nothing(monkeypatch):
    images = batch(*(synthetic_tissue(20, 30, seed) for seed in range(5)))
    numbers = 240.0, 1.0, 0.15, False
    target = TARGET.stain_matrix, TARGET.max_concentration
    whole = torch_backend.macenko_normalize(images, *target, *numbers, False)
    monkeypatch.setattr(torch_backend, "PIXELS_AT_A_TIME", 1300)
    for a, b in zip(whole, torch_backend.macenko_normalize(images, *target, *numbers, False), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("size", [(1, 10), (11, 1), (7, 11), (16, 32), (1, 513), (23, 45), (50, 41), (71, 130)])
def test_sizes_around_the_block_and_selection_limits(size):
    """Up to 2048 pixels are collected whole, blocks hold 512."""
    image = synthetic_tissue(80, 140, 3)[: size[0], : size[1]]
    expected, statuses = reference.macenko_normalize(image, TARGET, return_status=True)
    out, status = macenko_normalize(image, TARGET, return_status=True)
    assert status.tolist() == statuses.tolist()
    difference = np.abs(out.astype(int) - expected)
    assert difference.max() <= 1
    assert (difference != 0).sum() <= 2


@pytest.mark.parametrize("colours", [2, 3, 5, 17])
def test_percentiles_are_exact_where_many_pixels_share_a_colour(colours):
    """A key shared by most pixels overflows the bracket, and the radix selection takes over."""
    rng = np.random.default_rng(colours)
    palette = rng.integers(20, 190, (colours, 3), dtype=np.uint8)
    image = palette[rng.integers(0, colours, 90 * 101)].reshape(90, 101, 3)
    image[:3, :5] = rng.integers(20, 190, (3, 5, 3))
    for percentile in ("linear", "nearest"):
        wanted = reference.macenko_fit(image, percentile=percentile)
        fit = macenko_fit(image, percentile=percentile)
        assert fit.status.tolist() == wanted.status.tolist()
        torch.testing.assert_close(fit.stain_matrix, wanted.stain_matrix, rtol=0, atol=STAIN_TOLERANCE, equal_nan=True)
        torch.testing.assert_close(
            fit.max_concentration, wanted.max_concentration, rtol=STAIN_TOLERANCE, atol=0, equal_nan=True
        )


@pytest.mark.parametrize(("io", "alpha", "beta"), [(255, 1, 0.15), (240, 5, 0.15), (240, 0, 0.0), (200, 2.5, 0.3)])
def test_parameters_reach_the_result(io, alpha, beta):
    image = synthetic_tissue(64, 80, 5)
    expected = reference.macenko_normalize(image, TARGET, Io=io, alpha=alpha, beta=beta)
    out = macenko_normalize(image, TARGET, Io=io, alpha=alpha, beta=beta)
    difference = np.abs(out.astype(int) - expected)
    assert difference.max() <= 1 and (difference == 0).mean() >= 0.9995


def test_threads_batches_and_repeats_give_the_same_bits():
    images = batch(*(synthetic_tissue(61, 67, seed) for seed in range(5)))
    large = batch(np.tile(synthetic_tissue(260, 260, 9), (2, 2, 1)))  # shared by the threads
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            whole = macenko_normalize(images, TARGET)
            single = torch.cat([macenko_normalize(image[None], TARGET) for image in images])
            assert torch.equal(whole, single)
            results.append((whole, macenko_normalize(large, TARGET), *macenko_fit(large)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_known_source_stains_are_used():
    tile, slide = synthetic_tissue(48, 48, 1), synthetic_tissue(96, 96, 2)
    source = macenko_fit(slide)
    expected = reference.macenko_normalize(tile, TARGET, source)
    out = macenko_normalize(tile, TARGET, source)
    difference = np.abs(out.astype(int) - expected)
    assert difference.max() <= 1 and (difference == 0).mean() >= 0.999
    assert not np.array_equal(out, macenko_normalize(tile, TARGET))


def test_each_image_may_have_its_own_target():
    images = batch(synthetic_tissue(48, 48, 1), synthetic_tissue(48, 48, 2))
    targets = macenko_fit(batch(synthetic_tissue(48, 48, 3), synthetic_tissue(48, 48, 4)))
    out = macenko_normalize(images, targets)
    for i in range(2):
        one = type(targets)(*(part[i : i + 1] for part in targets))
        assert torch.equal(out[i], macenko_normalize(images[i], one))


def drawn_image(seed):
    """Images of very different distributions: noise, blobs of colour, mixtures, one stain, few colours."""
    rng = np.random.default_rng(seed)
    height, width = rng.integers(40, 200, 2)
    kind = seed % 5
    if kind == 0:
        levels = rng.integers(0, 256, (height, width, 3))
    elif kind == 1:
        levels = rng.integers(20, 200, 3) + rng.normal(0, rng.uniform(0.5, 30), (height, width, 3))
    elif kind == 2:
        levels = 240 * np.exp(-rng.gamma(1, 0.5, (height, width, 2)) @ rng.uniform(0.05, 1, (2, 3)))
    elif kind == 3:
        levels = 240 * np.exp(-rng.uniform(0.2, 2, (height, width, 1)) * rng.uniform(0.1, 1, 3))
        levels = levels + rng.normal(0, rng.uniform(0, 3), levels.shape)
    else:
        palette = rng.integers(10, 230, (rng.integers(2, 40), 3))
        levels = palette[rng.integers(0, len(palette), (height, width))]
    return np.clip(levels, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("seed", range(40))
def test_drawn_distributions_agree_with_the_reference(seed):
    image = drawn_image(seed)
    percentile = "nearest" if seed % 2 else "linear"
    fit, wanted = macenko_fit(image, percentile=percentile), reference.macenko_fit(image, percentile=percentile)
    assert fit.status.tolist() == wanted.status.tolist()
    if wanted.status[0]:
        return
    od = -np.log((image.reshape(-1, 3) + 1.0) / 240)
    tissue = od[(od >= 0.15).all(axis=1)]
    low, middle, high = np.linalg.eigvalsh(np.cov(tissue.T))
    # Perturbation of eigenvectors: the error of a moment, two ODs times 1.5 units, over the eigenvalue gap.
    amplified = 2 * 1.5 * 2.0**-24 * max(1.0, np.mean(np.sum(tissue**2, axis=1)) / min(middle - low, high - middle))
    torch.testing.assert_close(fit.stain_matrix, wanted.stain_matrix, rtol=0, atol=2 * amplified)
    # Nearly parallel stains amplify that once more in the concentrations.
    h, e = wanted.stain_matrix[0].T
    parallel = 1 / max(1e-9, 1 - float(h @ e) ** 2)
    torch.testing.assert_close(fit.max_concentration, wanted.max_concentration, rtol=4 * amplified * parallel, atol=0)


@pytest.mark.parametrize("gain", [0.5, 0.1, 0.01, 1e-3, 30.0])
def test_extreme_gains_leave_float32_in_time(gain):
    image = synthetic_tissue(50, 60, 1)
    fit = macenko_fit(image)
    source = fit._replace(max_concentration=fit.max_concentration * gain)
    difference = np.abs(
        macenko_normalize(image, TARGET, source).astype(int) - reference.macenko_normalize(image, TARGET, source)
    )
    assert difference.max() <= 1 and (difference == 0).mean() >= 0.9995
