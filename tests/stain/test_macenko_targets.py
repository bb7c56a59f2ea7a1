"""A target from several images against a plain float64 formula and torchstain's multi-target normaliser."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from stain_images import batch, synthetic_tissue

from ernet_fast.stain import MacenkoFit, MacenkoNormalizer, macenko_fit, macenko_normalize

SIZES = [(40, 56), (64, 33), (25, 90)]
IMAGES = [synthetic_tissue(*size, seed) for seed, size in enumerate(SIZES, start=1)]


def stains_by_formula(pixels):
    """Stain matrix and maxima of the pixels [n, 3] of one image, in float64 NumPy."""
    od = -np.log((pixels.astype(np.float64) + 1) / 240)
    tissue = od[(od >= 0.15).all(axis=1)]
    plane = np.linalg.eigh(np.cov(tissue.T))[1][:, 1:]
    # The mean tissue points along the second direction, which keeps angles off the cut of arctan2.
    plane = plane * np.array([1, np.sign(tissue.mean(axis=0) @ plane[:, 1])])
    phi = np.arctan2(tissue @ plane[:, 1], tissue @ plane[:, 0])
    low, high = (plane @ [np.cos(angle), np.sin(angle)] for angle in np.percentile(phi, (1, 99)))
    stain = np.array([low, high] if low[0] > high[0] else [high, low]).T
    concentrations = np.linalg.lstsq(stain, od.T, rcond=None)[0]
    return stain, np.percentile(concentrations, 99, axis=1)


def assert_target(normalizer, stain, maximum):
    np.testing.assert_allclose(normalizer.HERef.numpy(), stain, rtol=0, atol=1e-6)
    np.testing.assert_allclose(normalizer.maxCRef.numpy(), maximum, rtol=2e-6)


def test_concat_fits_the_pixels_of_all_targets_together():
    pixels = np.concatenate([image.reshape(-1, 3) for image in IMAGES])
    expected = stains_by_formula(pixels)
    normalizer = MacenkoNormalizer().fit(IMAGES, targets="concat")
    assert_target(normalizer, *expected)
    mixed = [IMAGES[0], torch.from_numpy(IMAGES[1]).permute(2, 0, 1), IMAGES[2].astype(np.float32)]
    assert_target(MacenkoNormalizer().fit(mixed, targets="concat"), *expected)
    reordered = MacenkoNormalizer().fit(IMAGES[::-1], targets="concat")
    assert torch.equal(reordered.HERef, normalizer.HERef) and torch.equal(reordered.maxCRef, normalizer.maxCRef)


def test_avg_takes_the_means_of_the_fits():
    fits = [stains_by_formula(image.reshape(-1, 3)) for image in IMAGES]
    stain, maximum = (np.mean(parts, axis=0) for parts in zip(*fits, strict=True))
    normalizer = MacenkoNormalizer().fit(IMAGES, targets="avg")
    assert_target(normalizer, stain, maximum)
    assert (np.linalg.norm(normalizer.HERef.numpy(), axis=0) < 1).all()


def test_avg_equals_torchstain():
    normalizers = pytest.importorskip("torchstain.torch.normalizers.multitarget")
    theirs = normalizers.TorchMultiMacenkoNormalizer(norm_mode="avg-post")
    tensors = [torch.from_numpy(image).permute(2, 0, 1) for image in IMAGES]
    theirs.fit(tensors)
    ours = MacenkoNormalizer(compat="torchstain").fit(tensors, targets="avg")
    # torchstain works in float32, with covariances of some thousand terms.
    np.testing.assert_allclose(ours.HERef.numpy(), theirs.HERef.numpy(), rtol=0, atol=1e-3)
    np.testing.assert_allclose(ours.maxCRef.numpy(), theirs.maxCRef.numpy(), rtol=1e-3)
    image = synthetic_tissue(48, 48, 9)
    expected = theirs.normalize(torch.from_numpy(image).permute(2, 0, 1), stains=False)[0]
    found = ours.normalize(torch.from_numpy(image).permute(2, 0, 1), stains=False)[0]
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert (found - expected).abs().max() <= 1 and (found == expected).float().mean() >= 0.96


def test_one_target_is_the_same_in_every_way():
    plain = MacenkoNormalizer().fit(IMAGES[0])
    for target, how in ((IMAGES[0], "avg"), (IMAGES[:1], "concat"), (IMAGES[0][None], "avg"), (IMAGES[:1], None)):
        other = MacenkoNormalizer().fit(target, targets=how)
        assert torch.equal(other.HERef, plain.HERef) and torch.equal(other.maxCRef, plain.maxCRef)


@pytest.mark.parametrize("how", ["concat", "avg"])
def test_masks_choose_the_pixels_of_each_target(how):
    masks = [np.random.default_rng(seed).random(size) < 0.7 for seed, size in enumerate(SIZES)]
    normalizer = MacenkoNormalizer().fit(IMAGES, targets=how, mask=masks)
    inside = [image[mask] for image, mask in zip(IMAGES, masks, strict=True)]
    if how == "concat":
        assert_target(normalizer, *stains_by_formula(np.concatenate(inside)))
        with pytest.raises(ValueError, match="fewer than 10 tissue pixels"):
            normalizer.fit(IMAGES, targets=how, mask=[mask & False for mask in masks])
    else:
        fits = [stains_by_formula(pixels) for pixels in inside]
        assert_target(normalizer, *(np.mean(parts, axis=0) for parts in zip(*fits, strict=True)))


def test_targets_without_tissue():
    white = np.full((20, 30, 3), 255, np.uint8)
    normalizer = MacenkoNormalizer()
    before = normalizer.HERef.clone()
    with pytest.raises(ValueError, match="image 1: fewer than 10 tissue pixels"):
        normalizer.fit([IMAGES[0], white], targets="avg")
    with pytest.raises(ValueError, match="of all targets together"):
        normalizer.fit([white, white], targets="concat")
    with pytest.raises(ValueError, match="got 0"):
        normalizer.fit([], targets="concat")
    with pytest.raises(ValueError, match=r"got 2\. Say how several make one"):
        normalizer.fit(batch(IMAGES[0], IMAGES[0]))
    with pytest.raises(ValueError, match="targets='median'"):
        normalizer.fit(IMAGES, targets="median")
    assert torch.equal(normalizer.HERef, before)


def test_a_target_of_arrays_is_refused_by_name():
    arrays = MacenkoFit(*(part.numpy() for part in macenko_fit(IMAGES[0])))
    with pytest.raises(TypeError, match="target is a MacenkoFit; expected the MacenkoFit that macenko_fit"):
        macenko_normalize(IMAGES[0], arrays)
