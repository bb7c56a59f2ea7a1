"""Reinhard normalisation against its reference, the reference against torchstain, and images without contrast."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from stain_images import batch, load, real_parameters, synthetic_parameters, synthetic_tissue

from ernet_fast.reference import reinhard as reference
from ernet_fast.stain import MacenkoStatus, ReinhardFit, ReinhardNormalizer, reinhard_fit, reinhard_normalize

TARGET = synthetic_tissue(70, 80, 11)
IMAGES = [*real_parameters()[:4], *synthetic_parameters()]
METHODS = [None, "modified"]


def expected_levels(image, method=None):
    return reference.reinhard_normalize(image, *reference.reinhard_fit(TARGET), method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("parameter", IMAGES)
def test_reference_equals_torchstain(parameter, method):
    """torchstain's float32 rounding moves values across an integer: one level, on few pixels."""
    theirs = pytest.importorskip("torchstain.numpy.normalizers.reinhard").NumpyReinhardNormalizer(method=method)
    theirs.fit(TARGET)
    image = load(parameter)
    difference = np.abs(np.floor(expected_levels(image, method)) - theirs.normalize(image))
    assert difference.max() <= 1 and (difference == 0).mean() >= 0.999


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("parameter", IMAGES)
def test_equals_the_reference(parameter, method):
    image = load(parameter)
    normalizer = ReinhardNormalizer(method=method).fit(TARGET)
    expected = expected_levels(image, method)
    out = normalizer.normalize(image)
    assert out.dtype == np.uint8
    difference = np.abs(out - np.floor(expected))
    assert difference.max() <= 1 and (difference == 0).mean() >= 0.999
    np.testing.assert_allclose(normalizer(image.astype(np.float64)), expected, rtol=0, atol=1e-9)


def test_statistics_equal_the_reference_and_become_the_targets():
    image = synthetic_tissue(50, 60, 1)
    mean, std = reference.reinhard_fit(image)
    fit = reinhard_fit(image.astype(np.float64))
    np.testing.assert_allclose(fit.mean[0].numpy(), mean, rtol=1e-12, atol=1e-10)
    np.testing.assert_allclose(fit.std[0].numpy(), std, rtol=1e-10)
    # With a target of little contrast nothing is clipped, so its statistics are met.
    target = ReinhardFit(torch.tensor([[60.0, 5.0, -3.0]]), torch.tensor([[4.0, 2.0, 1.0]]), torch.zeros(1))
    found = reinhard_fit(reinhard_normalize(image.astype(np.float64), target))
    np.testing.assert_allclose(found.mean[0].numpy(), [60, 5, -3], atol=1e-3)
    np.testing.assert_allclose(found.std[0].numpy(), [4, 2, 1], rtol=1e-3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("level", [0, 1, 100, 254, 255])
def test_flat_images_become_the_targets_mean_colour(level, dtype, method):
    images = batch(synthetic_tissue(20, 30, 1), np.full((20, 30, 3), level, np.uint8)).to(dtype)
    normalizer = ReinhardNormalizer(method=method).fit(TARGET)
    out, status = normalizer(images), reinhard_fit(images).status
    assert status.tolist() == [0, 0]
    assert torch.equal(out[:1], normalizer(images[:1]))
    assert out.double().isfinite().all()
    spread = (out[1].double() - out[1, :, :1, :1].double()).abs().max()
    assert spread <= (0 if dtype == torch.uint8 else 1e-12 + 255 * torch.finfo(dtype).eps)
    if method is None:
        colour = reference.lab_to_rgb(reference.reinhard_fit(TARGET)[0]) * 255
        tolerance = 1 if dtype == torch.uint8 else 1e-9 + 255 * torch.finfo(dtype).eps
        assert np.abs(out[1, :, 0, 0].double().numpy() - colour).max() <= tolerance


def test_a_flat_target_makes_flat_images():
    normalizer = ReinhardNormalizer().fit(np.full((9, 9, 3), 90, np.uint8))
    assert np.abs(normalizer(TARGET).astype(int) - 90).max() <= 1
    modified = ReinhardNormalizer(method="modified").fit(np.full((9, 9, 3), 90, np.uint8))
    assert modified(TARGET).std() > 5


def test_forms_batches_lists_and_threads():
    images = [synthetic_tissue(40, 50, seed) for seed in range(3)] + [synthetic_tissue(31, 20, 4)]
    kept = [image.copy() for image in images]
    normalizer = ReinhardNormalizer().fit(TARGET)
    listed = normalizer(images)
    whole = normalizer(batch(*images[:3]))
    for i, image in enumerate(images):
        alone = normalizer(image)
        np.testing.assert_array_equal(listed[i], alone)
        np.testing.assert_array_equal(normalizer(torch.from_numpy(image).permute(2, 0, 1)).permute(1, 2, 0), alone)
        np.testing.assert_array_equal(image, kept[i])
        if i < 3:
            np.testing.assert_array_equal(whole[i].permute(1, 2, 0), alone)
    assert normalizer([]) == [] and normalizer(batch(*images[:3])[:0]).shape == (0, 3, 40, 50)
    unit = normalizer(images[0].astype(np.float64)) / 255
    small = ReinhardNormalizer(range=1).fit(TARGET / 255.0)(images[0] / 255.0)
    np.testing.assert_allclose(small, unit, rtol=0, atol=1e-6)
    slide = reinhard_fit(images[1])
    target = reinhard_fit(TARGET)
    assert not np.array_equal(reinhard_normalize(images[0], target, slide), listed[0])
    np.testing.assert_array_equal(reinhard_normalize(images[1], target, slide), listed[1])


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_threads_and_memory_layouts_give_the_same_bits(dtype):
    """An image of several blocks, the last of them short."""
    image = np.tile(synthetic_tissue(130, 190, 9), (2, 2, 1))[:251, :377].astype(dtype)
    planar = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
    target = reinhard_fit(TARGET)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = reinhard_normalize(planar, target)
            results += [(out, *reinhard_fit(planar))]
            results += [(torch.from_numpy(reinhard_normalize(image, target)).permute(2, 0, 1), *reinhard_fit(image))]
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_masked_fit_is_the_fit_of_the_masked_pixels():
    images = [synthetic_tissue(40, 50, 1), synthetic_tissue(31, 20, 2)]
    rng = np.random.default_rng(0)
    masks = [rng.random(image.shape[:2]) < 0.3 for image in images]
    expected = [reinhard_fit(image[mask][None]) for image, mask in zip(images, masks, strict=True)]
    target = reinhard_fit(TARGET)
    listed = reinhard_fit(images, mask=masks)
    for i, (image, mask) in enumerate(zip(images, masks, strict=True)):
        for fit in (reinhard_fit(image, mask=mask), reinhard_fit(image[None], mask=torch.from_numpy(mask)[None])):
            for found, row, one in zip(fit, listed, expected[i], strict=True):
                assert torch.equal(found, one) and torch.equal(row[i : i + 1], one)
        normalizer = ReinhardNormalizer().fit(TARGET)
        wanted = reinhard_normalize(image, target, expected[i])
        np.testing.assert_array_equal(reinhard_normalize(image, target, mask=mask), wanted)
        np.testing.assert_array_equal(normalizer(image, mask=mask), wanted)
        np.testing.assert_array_equal(normalizer.normalize(image, source=expected[i]), wanted)
    assert not np.array_equal(reinhard_normalize(images[0], target), reinhard_normalize(images[0], target, expected[0]))
    masked = ReinhardNormalizer().fit(images[0], mask=masks[0])
    assert torch.equal(masked.target_means, expected[0].mean[0]) and torch.equal(masked.target_stds, expected[0].std[0])


def test_masks_hide_bad_values_may_be_empty_and_are_checked():
    image = synthetic_tissue(20, 30, 1).astype(np.float32)
    image[3, 4] = np.nan
    mask = np.isfinite(image).all(axis=2)
    target = reinhard_fit(TARGET)
    assert reinhard_fit(image).status.tolist() == [MacenkoStatus.NON_FINITE]
    assert reinhard_fit(image, mask=mask).status.tolist() == [MacenkoStatus.OK]
    nothing = np.zeros_like(mask)
    fit = reinhard_fit([image, image], mask=[mask, nothing])
    assert fit.status.tolist() == [MacenkoStatus.OK, MacenkoStatus.TOO_FEW_TISSUE_PIXELS]
    assert fit.mean[0].isfinite().all() and fit.mean[1].isnan().all() and fit.std[1].isnan().all()
    kept = reinhard_normalize(image, target, mask=nothing, on_degenerate="identity")
    np.testing.assert_array_equal(kept, image)
    with pytest.raises(ValueError, match="image 0: fewer than 10"):
        ReinhardNormalizer().fit(image, mask=nothing)
    with pytest.raises(TypeError, match="expected booleans"):
        reinhard_fit(image, mask=mask.astype(np.uint8))
    with pytest.raises(ValueError, match=r"mask of image 0 has shape \(19, 30\)"):
        reinhard_fit(image, mask=mask[1:])
    with pytest.raises(ValueError, match="pass one of the two"):
        reinhard_normalize(image, target, target, mask=mask)


def test_values_that_are_no_grey_level_follow_the_policy():
    images = batch(*(synthetic_tissue(20, 30, seed) for seed in range(3))).float()
    images[1, 2, 3, 4] = float("nan")
    target = reinhard_fit(TARGET)
    out, status = reinhard_normalize(images, target, return_status=True)
    assert status.tolist() == [0, MacenkoStatus.NON_FINITE, 0]
    assert out.isnan().sum() <= 3 and out[1, :, 3, 4].isnan().any()
    assert torch.equal(out[::2], reinhard_normalize(images[::2], target))
    kept = reinhard_normalize(images, target, on_degenerate="identity")
    assert torch.equal(kept[1].nan_to_num(-1), images[1].nan_to_num(-1))
    with pytest.raises(ValueError, match="image 1: a pixel value is NaN"):
        reinhard_normalize(images, target, on_degenerate="raise")
    with pytest.raises(ValueError, match="image 0: a pixel value is NaN"):
        ReinhardNormalizer().fit(images[1])


def test_state_dict_errors_and_repr():
    normalizer = ReinhardNormalizer().fit(TARGET)
    file = io.BytesIO()
    torch.save(normalizer.state_dict(), file)
    file.seek(0)
    other = ReinhardNormalizer()
    with pytest.raises(ValueError, match="target is not finite"):
        other(TARGET)
    other.load_state_dict(torch.load(file))
    image = synthetic_tissue(20, 30, 1)
    np.testing.assert_array_equal(other(image), normalizer(image))
    with pytest.raises(ValueError, match="method='vahadane'"):
        ReinhardNormalizer(method="vahadane")
    with pytest.raises(ValueError, match="one target image; got 2"):
        normalizer.fit(batch(image, image))
    with pytest.raises(TypeError, match="ReinhardFit"):
        reinhard_normalize(image, (1, 2))
    with pytest.raises(ValueError, match="B = 1 or 1"):
        reinhard_normalize(image, reinhard_fit(batch(image, image)))
    with pytest.raises(ValueError, match="grey image"):
        normalizer(image[..., 0])
    assert "method='modified'" in repr(ReinhardNormalizer(method="modified"))


@pytest.mark.parametrize("method", METHODS)
def test_gradcheck_with_the_statistics_held_constant(method):
    images = batch(synthetic_tissue(4, 5, 1)).double().clamp(40, 180)
    images[0, :, 0, 0] = 2  # both branches of the sRGB curve
    source, target = reinhard_fit(images), reinhard_fit(TARGET)
    target = target._replace(std=target.std / 4)  # keeps results off the ends of the scale, which have no gradient
    images.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: reinhard_normalize(x, target, source, method=method), (images,), eps=1e-4, atol=1e-5, rtol=1e-4
    )
    flat = torch.full((1, 3, 4, 4), 77.0, requires_grad=True)
    reinhard_normalize(flat, target, method=method).sum().backward()
    assert flat.grad.isfinite().all()
