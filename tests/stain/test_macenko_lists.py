"""Lists of images of several sizes, tissue masks, and stains that are known for a whole slide."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from stain_images import batch, synthetic_tissue

from ernet_fast import reference
from ernet_fast.stain import MacenkoNormalizer, MacenkoStatus, collection, macenko_fit, macenko_normalize

TARGET = MacenkoNormalizer().target
SIZES = [(40, 56), (31, 43), (40, 56), (64, 20), (40, 56)]
IMAGES = [synthetic_tissue(*size, seed) for seed, size in enumerate(SIZES)]
WHITE = np.full((24, 33, 3), 255, np.uint8)


def mixed_forms():
    """NumPy and torch, first and last channels, two dtypes."""
    return [
        IMAGES[0],
        torch.from_numpy(IMAGES[1]).permute(2, 0, 1),
        IMAGES[2].astype(np.float32),
        batch(IMAGES[3])[0],
        np.ascontiguousarray(IMAGES[4].transpose(2, 0, 1)),
    ]


@pytest.mark.parametrize("stacked", [0, 2000, 1 << 18])
@pytest.mark.parametrize("kind", [list, tuple])
def test_a_list_gives_what_its_images_give(kind, stacked, monkeypatch):
    monkeypatch.setattr(collection, "STACKED_PIXELS", stacked)
    images = kind(mixed_forms())
    kept = [np.asarray(image).copy() for image in images]
    fits = macenko_fit(images)
    out, status = macenko_normalize(images, TARGET, return_status=True)
    assert isinstance(out, list) and status.tolist() == [0] * 5
    for i, image in enumerate(images):
        one = macenko_fit(image)
        assert torch.equal(fits.stain_matrix[i], one.stain_matrix[0])
        assert torch.equal(fits.max_concentration[i], one.max_concentration[0])
        alone = macenko_normalize(image, TARGET)
        assert type(out[i]) is type(image) and out[i].dtype == image.dtype and out[i].shape == image.shape
        np.testing.assert_array_equal(np.asarray(out[i]), np.asarray(alone))
        np.testing.assert_array_equal(np.asarray(image), kept[i])
    for policy in ("identity", "raise"):
        for a, b in zip(macenko_normalize(images, TARGET, on_degenerate=policy), out, strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_each_image_of_a_list_may_have_its_own_stains():
    sources = macenko_fit([IMAGES[i] for i in (1, 2, 3, 4, 0)])
    targets = macenko_fit([IMAGES[i] for i in (2, 3, 4, 0, 1)])
    for source in (None, sources):
        out = macenko_normalize(IMAGES, targets, source)
        for i, image in enumerate(IMAGES):
            mine = type(targets)(*(part[i : i + 1] for part in targets))
            own = None if source is None else type(targets)(*(part[i : i + 1] for part in source))
            np.testing.assert_array_equal(out[i], macenko_normalize(image, mine, own))


def test_degenerate_images_in_a_list_have_their_place_in_it():
    images = [IMAGES[0], WHITE, IMAGES[1], WHITE[:1, :1]]
    few = MacenkoStatus.TOO_FEW_TISSUE_PIXELS
    out, status = macenko_normalize(images, TARGET, on_degenerate="identity", return_status=True)
    assert status.tolist() == [0, few, 0, few] == macenko_fit(images).status.tolist()
    np.testing.assert_array_equal(out[1], WHITE)
    np.testing.assert_array_equal(out[0], macenko_normalize(IMAGES[0], TARGET))
    with pytest.raises(ValueError, match=r"image 1: fewer .*; image 3: fewer"):
        macenko_normalize(images, TARGET, on_degenerate="raise")


def test_normalizer_takes_lists():
    normalizer = MacenkoNormalizer().fit(IMAGES[0])
    images, h, e = normalizer.normalize(IMAGES)
    for i, image in enumerate(IMAGES):
        for a, b in zip((images[i], h[i], e[i]), normalizer.normalize(image), strict=True):
            np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(normalizer(IMAGES)[i], images[i])


def test_empty_list():
    fit = macenko_fit([])
    assert fit.stain_matrix.shape == (0, 3, 2) and fit.max_concentration.shape == (0, 2) and fit.status.shape == (0,)
    assert macenko_normalize([], TARGET) == []
    assert macenko_normalize([], TARGET, on_degenerate="raise") == []


def test_wrong_lists_name_the_entry():
    with pytest.raises(ValueError, match=r"images\[1\] has shape \(1, 3, 40, 56\); every entry of a list is one image"):
        macenko_fit([IMAGES[0], batch(IMAGES[0])])
    with pytest.raises(TypeError, match=r"images\[2\] has dtype int16"):
        macenko_fit([IMAGES[0], IMAGES[1], IMAGES[0].astype(np.int16)])
    floats = [IMAGES[0].astype(np.float32) / 255, IMAGES[1].astype(np.float32)]
    with pytest.raises(ValueError, match="image 1 holds values"):
        macenko_fit(floats, range=1)
    with pytest.raises(ValueError, match="B = 1 or 2"):
        macenko_normalize(IMAGES[:2], macenko_fit(IMAGES[:3]))


def random_mask(image, seed=0):
    return np.random.default_rng(seed).random(image.shape[:2]) < 0.6


def test_a_masked_fit_is_the_fit_of_the_masked_pixels():
    for image in IMAGES:
        mask = random_mask(image)
        wanted = reference.macenko_fit(image[mask][:, None], layout="HWC")
        for given in (mask, torch.from_numpy(mask), mask[None]):
            fit = macenko_fit(image, mask=given)
            assert fit.status.tolist() == wanted.status.tolist() == [0]
            torch.testing.assert_close(fit.stain_matrix, wanted.stain_matrix, rtol=0, atol=1e-6)
            torch.testing.assert_close(fit.max_concentration, wanted.max_concentration, rtol=1e-6, atol=0)
        assert not torch.equal(fit.stain_matrix, macenko_fit(image).stain_matrix)
    whole = macenko_fit(IMAGES[0], mask=np.ones(SIZES[0], bool))
    assert torch.equal(whole.stain_matrix, macenko_fit(IMAGES[0]).stain_matrix)


def test_masks_of_batches_and_lists():
    same = [IMAGES[i] for i in (0, 2, 4)]
    masks = [random_mask(image, seed) for seed, image in enumerate(same)]
    masks[1][:] = False
    expected = [macenko_fit(image, mask=mask) for image, mask in zip(same, masks, strict=True)]
    for images, mask in (
        (batch(*same), np.stack(masks)),
        (same, masks),
        (same, np.stack(masks)),
        (batch(*same), masks),
    ):
        fit = macenko_fit(images, mask=mask)
        assert fit.status.tolist() == [0, MacenkoStatus.TOO_FEW_TISSUE_PIXELS, 0]
        for i, one in enumerate(expected):
            torch.testing.assert_close(fit.stain_matrix[i], one.stain_matrix[0], rtol=0, atol=0, equal_nan=True)
    ragged = macenko_fit(IMAGES, mask=[random_mask(image) for image in IMAGES])
    assert ragged.status.tolist() == [0] * 5


def test_normalisation_with_a_mask_covers_every_pixel():
    image = IMAGES[0].copy()
    mask = np.ones(SIZES[0], bool)
    mask[:10] = False
    image[:10] = (10, 200, 20)  # ink that would spoil the fit
    fit = macenko_fit(image, mask=mask)
    out = macenko_normalize(image, TARGET, mask=mask)
    np.testing.assert_array_equal(out, macenko_normalize(image, TARGET, fit))
    clean = macenko_normalize(np.ascontiguousarray(image[10:]), TARGET)
    np.testing.assert_array_equal(out[10:], clean)
    np.testing.assert_array_equal(MacenkoNormalizer()(image, mask=mask), out)
    np.testing.assert_array_equal(MacenkoNormalizer().normalize(image, mask=mask)[0], out)


def test_values_outside_the_mask_do_not_matter():
    image = IMAGES[0].astype(np.float32)
    mask = np.ones(SIZES[0], bool)
    mask[3, 4] = False
    image[3, 4] = np.nan
    assert macenko_fit(image).status.tolist() == [MacenkoStatus.NON_FINITE]
    assert macenko_fit(image, mask=mask).status.tolist() == [0]


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (np.ones((40, 55), bool), ValueError, r"mask of image 0 has shape \(40, 55\); the image has \(40, 56\)"),
        (np.ones((40, 56), np.uint8), TypeError, "uint8; expected booleans"),
        (torch.ones(40, 56), TypeError, "float32; expected booleans"),
        (np.ones((2, 40, 56), bool), ValueError, "2 masks for 1 images"),
        ("tissue", TypeError, "str"),
        (np.bool_(True), TypeError, "bool"),
    ],
)
def test_masks_are_checked(mask, error, message):
    with pytest.raises(error, match=message):
        macenko_fit(IMAGES[0], mask=mask)
    with pytest.raises(error, match=message):
        macenko_normalize(IMAGES[0], TARGET, mask=mask)


def test_a_mask_beside_known_stains_is_refused():
    with pytest.raises(ValueError, match="pass one of the two"):
        macenko_normalize(IMAGES[0], TARGET, macenko_fit(IMAGES[0]), mask=np.ones(SIZES[0], bool))


def test_tiles_of_a_slide_share_its_stains():
    """Tiles with the slide's stains are the tiles of the normalised slide, background tiles too."""
    slide = synthetic_tissue(96, 128, 5)
    slide[:32, :32] = 255
    stains = macenko_fit(slide[::2, ::2])
    whole = macenko_normalize(slide, TARGET, stains)
    tiles = [slide[y : y + 32, x : x + 40] for y in range(0, 96, 32) for x in range(0, 128, 40)]
    out, status = macenko_normalize(tiles, TARGET, stains, return_status=True)
    assert not status.any()
    expected = [whole[y : y + 32, x : x + 40] for y in range(0, 96, 32) for x in range(0, 128, 40)]
    for a, b in zip(out, expected, strict=True):
        np.testing.assert_array_equal(a, b)
    normalizer = MacenkoNormalizer()
    for a, b in zip(normalizer(tiles, source=stains), expected, strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(normalizer.normalize(tiles, source=stains)[0], expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_fixed_maxima_with_each_tiles_own_stains():
    """Only the concentrations' scale is the slide's: replace the maxima of the tiles' fits."""
    tiles, slide = IMAGES[:2], macenko_fit(IMAGES[4])
    own = macenko_fit(tiles)
    fixed = own._replace(max_concentration=slide.max_concentration.expand(2, 2))
    for i, image in enumerate(macenko_normalize(tiles, TARGET, fixed)):
        one = type(own)(own.stain_matrix[i], slide.max_concentration[0], own.status[i])
        expected = reference.macenko_normalize(tiles[i], TARGET, one)
        assert np.abs(image.astype(int) - expected).max() <= 1
