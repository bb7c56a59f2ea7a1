"""separate against the formula and against the images that torchstain gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from stain_images import batch, synthetic_tissue

from ernet_fast.stain import MacenkoFit, MacenkoNormalizer, MacenkoStatus, macenko_fit, separate

IMAGES = [synthetic_tissue(40, 56, seed) for seed in range(3)]
TARGET = MacenkoNormalizer().target


def concentrations_by_formula(image, stain):
    od = -np.log((image.reshape(-1, 3).astype(np.float64) + 1) / 240)
    return np.linalg.lstsq(stain, od.T, rcond=None)[0].T.reshape(*image.shape[:2], 2)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_concentrations_and_images_equal_the_formula(dtype):
    for image in IMAGES:
        found = separate(image.astype(dtype))
        stain = macenko_fit(image.astype(dtype)).stain_matrix[0].numpy()
        expected = concentrations_by_formula(image, stain)
        assert found.concentrations.dtype == (np.float64 if dtype == np.float64 else np.float32)
        # float32: an OD below 6 is off by two roundings, times the rows of the pseudo-inverse.
        tolerance = 1e-10 if dtype == np.float64 else 2 * 6 * 2.0**-24 * 3 * np.abs(np.linalg.pinv(stain)).max()
        np.testing.assert_allclose(found.concentrations, expected, rtol=0, atol=tolerance)
        for k, stained in enumerate((found.haematoxylin, found.eosin)):
            wanted = np.minimum(240 * np.exp(-expected[..., k, None] * stain[:, k]), 255)
            assert stained.dtype == dtype and stained.shape == image.shape
            if dtype == np.uint8:
                difference = np.abs(stained - np.floor(wanted))
                assert difference.max() <= 1 and (difference == 0).mean() >= 0.9995
            else:
                np.testing.assert_allclose(stained, wanted, rtol=1e-9 if dtype == np.float64 else 2e-5)


def test_with_a_target_the_images_are_those_of_normalize():
    normalizer = MacenkoNormalizer().fit(IMAGES[2])
    _, h, e = normalizer.normalize(IMAGES[0])
    found = separate(IMAGES[0], target=normalizer.target)
    np.testing.assert_array_equal(found.haematoxylin, h)
    np.testing.assert_array_equal(found.eosin, e)
    own, fit = separate(IMAGES[0]), macenko_fit(IMAGES[0])
    gain = (normalizer.maxCRef / fit.max_concentration[0]).float().numpy()
    np.testing.assert_allclose(found.concentrations, own.concentrations * gain, rtol=1e-6)


def test_forms_and_known_stains():
    whole = separate(batch(*IMAGES))
    assert whole.concentrations.shape == (3, 2, 40, 56) and whole.status.tolist() == [0, 0, 0]
    listed = separate(list(IMAGES))
    for i, image in enumerate(IMAGES):
        one = separate(image)
        assert one.concentrations.shape == (40, 56, 2)
        for name in ("haematoxylin", "eosin", "concentrations"):
            np.testing.assert_array_equal(getattr(one, name), getattr(listed, name)[i])
            np.testing.assert_array_equal(getattr(one, name), getattr(whole, name)[i].permute(1, 2, 0).numpy())
    slide = macenko_fit(IMAGES[1])
    expected = concentrations_by_formula(IMAGES[0], slide.stain_matrix[0].numpy())
    np.testing.assert_allclose(separate(IMAGES[0], slide).concentrations, expected, rtol=0, atol=1e-5)


def test_degenerate_images():
    white = np.full((40, 56, 3), 255, np.uint8)
    images = batch(IMAGES[0], white)
    found = separate(images)
    assert found.status.tolist() == [0, MacenkoStatus.TOO_FEW_TISSUE_PIXELS]
    assert torch.equal(found.concentrations[:1], separate(images[:1]).concentrations)
    expected = concentrations_by_formula(white, TARGET.stain_matrix[0].numpy())
    np.testing.assert_allclose(found.concentrations[1].permute(1, 2, 0).numpy(), expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="image 1: fewer than 10"):
        separate(images, on_degenerate="raise")
    with pytest.raises(ValueError, match="separate takes 'reference' or 'raise'"):
        separate(images, on_degenerate="identity")


def test_undefined_pixels_are_nan_alone():
    image = IMAGES[0].astype(np.float32)
    image[3, 4, 1] = np.nan
    image[5, 6, 0] = -1
    found = separate(image, macenko_fit(IMAGES[0]))
    undefined = np.isnan(found.concentrations).any(axis=2)
    assert undefined.sum() == 2 and undefined[3, 4] and undefined[5, 6]


def with_stains(values, images):
    """The MacenkoFit of a pair of tensors."""
    return MacenkoFit(*values, torch.zeros(len(images), dtype=torch.int32))


def test_gradcheck_to_the_image_and_the_stains():
    images = batch(synthetic_tissue(4, 6, 1)).double().clamp(60, 150)
    source, target = macenko_fit(IMAGES[0]), TARGET
    leaves = [part.clone().requires_grad_() for part in (images, *source[:2], *target[:2])]

    def split(x, *stains):
        return separate(x, with_stains(stains[:2], x), target=with_stains(stains[2:], x))[:3]

    assert torch.autograd.gradcheck(split, leaves, eps=1e-6, atol=1e-5, rtol=1e-5)
    assert torch.autograd.gradcheck(
        lambda x, *stains: separate(x, with_stains(stains, x))[:3], leaves[:3], eps=1e-6, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("sine", [1e-2, 1e-3, 1e-4])
def test_stains_of_nearly_one_direction(sine, dtype):
    """Concentrations are large there, and what they cancel to is not lost; nearer stains are refused."""
    h = np.array([0.6, 0.7, 0.4]) / np.linalg.norm([0.6, 0.7, 0.4])
    across = np.cross(h, [0, 0, 1]) / np.linalg.norm(np.cross(h, [0, 0, 1]))

    def source_of(angle):
        stain = np.stack([h, h * np.cos(angle) + across * np.sin(angle)], axis=1)
        maximum = torch.full((1, 2), 2.0, dtype=torch.float64)
        return MacenkoFit(torch.from_numpy(stain)[None], maximum, torch.zeros(1, dtype=torch.int32))

    source, image = source_of(sine), IMAGES[0].astype(dtype)
    found = separate(image, source)
    expected = concentrations_by_formula(IMAGES[0], source.stain_matrix[0].numpy())
    # The logarithms' rounding in float64 times the rows, and one rounding of the result.
    np.testing.assert_allclose(found.concentrations, expected, rtol=2.0**-23, atol=1e-13 / sine)
    together = separate(
        batch(image, image), MacenkoFit(*(torch.cat([a, b]) for a, b in zip(source, TARGET, strict=True)))
    )
    assert torch.equal(together.concentrations[0].permute(1, 2, 0), torch.from_numpy(found.concentrations))
    for k, stained in enumerate((found.haematoxylin, found.eosin)):
        exponents = -expected[..., k, None] * source.stain_matrix[0, :, k].numpy()
        wanted = np.minimum(240 * np.exp(np.minimum(exponents, 100)), 255)
        if dtype == np.uint8:
            assert np.abs(stained.astype(int) - np.floor(wanted)).max() <= 1
        else:
            np.testing.assert_allclose(stained, wanted, rtol=2.0**-22, atol=1e-30)
    with pytest.raises(ValueError, match="two columns of one direction"):
        separate(image, source_of(5e-6))
