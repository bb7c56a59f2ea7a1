"""macenko_augment against the formula, against torchstain's augmentor, and as a random function."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch
from stain_images import batch, synthetic_tissue

from ernet_fast.stain import MacenkoFit, MacenkoNormalizer, MacenkoStatus, macenko_augment, macenko_fit
from ernet_fast.stain.augment import draw_changes

augment = importlib.import_module("ernet_fast.stain.augment")

IMAGES = [synthetic_tissue(40, 56, seed) for seed in range(4)]
WHITE = np.full((40, 56, 3), 255, np.uint8)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def by_formula(image, gain, shift, stain):
    """Io exp(-HE (g C + s)) in float64, clipped at 255, [H, W, 3]."""
    od = -np.log((image.reshape(-1, 3).astype(np.float64) + 1) / 240)
    concentrations = gain[:, None] * np.linalg.lstsq(stain, od.T, rcond=None)[0] + shift[:, None]
    return np.minimum(240 * np.exp(-stain @ concentrations), 255).T.reshape(image.shape)


@pytest.mark.parametrize("amounts", [(0.2, 0.2), (0.0, 0.5), (0.9, 0.0), (0.5, 1.0)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_equals_the_formula(amounts, dtype):
    for seed, image in enumerate(IMAGES):
        gains, shifts = draw_changes(1, *amounts, seeded(seed))
        out = macenko_augment(image.astype(dtype), gain=amounts[0], shift=amounts[1], generator=seeded(seed))
        stain = macenko_fit(image.astype(dtype)).stain_matrix[0].numpy()
        expected = by_formula(image, gains[0].numpy(), shifts[0].numpy(), stain)
        assert out.dtype == dtype and out.shape == image.shape
        if dtype == np.uint8:
            difference = np.abs(out.astype(int) - np.floor(expected))
            assert difference.max() <= 1 and (difference == 0).mean() >= 0.999
        else:
            # float32: one rounding of the result
            np.testing.assert_allclose(out, expected, rtol=1e-10 if dtype == np.float64 else 2.0**-23)


@pytest.mark.parametrize("amounts", [(0.9, 2.0), (0.99, 4.0), (0.999999, 4.0)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_equals_the_formula_for_gains_near_zero(amounts, dtype, monkeypatch):
    """The least gain and the largest shifts that can be drawn, and random ones."""
    source = macenko_fit(IMAGES[0])
    image = IMAGES[0].astype(dtype)
    extremes = torch.tensor([[[-1.0, -1.0], [1.0, 1.0]], [[-1.0, 1.0], [-1.0, 1.0]]], dtype=torch.float64)
    draws = [*extremes, *(torch.rand(20, 2, 2, generator=seeded(), dtype=torch.float64) * 2 - 1)]
    for unit in draws:
        monkeypatch.setattr(augment, "draw_changes", lambda *_, u=unit: (1 + amounts[0] * u[:1], amounts[1] * u[1:]))
        out = macenko_augment(image, source, gain=amounts[0], shift=amounts[1])
        gains, shifts = 1 + amounts[0] * unit[0].numpy(), amounts[1] * unit[1].numpy()
        expected = by_formula(IMAGES[0], gains, shifts, source.stain_matrix[0].numpy())
        if dtype == np.uint8:
            assert np.abs(out.astype(int) - np.floor(expected)).max() <= 1
        else:
            np.testing.assert_allclose(out, expected, rtol=1e-10 if dtype == np.float64 else 2.0**-23)


def test_equals_torchstain_for_the_same_numbers(monkeypatch):
    augmentors = pytest.importorskip("torchstain.numpy.augmentors.macenko")
    theirs = augmentors.NumpyMacenkoAugmentor()
    for seed, image in enumerate(IMAGES):
        gains, shifts = draw_changes(1, 0.2, 0.2, seeded(seed))
        numbers = iter([gains[0, 0], shifts[0, 0], gains[0, 1], shifts[0, 1]])
        monkeypatch.setattr(augmentors.np.random, "uniform", lambda low, high, n=numbers: float(next(n)))
        theirs.fit(image)
        difference = np.abs(macenko_augment(image, generator=seeded(seed)).astype(int) - theirs.augment())
        assert difference.max() <= 1 and (difference == 0).mean() >= 0.999


def test_batch_single_images_and_list_draw_the_same():
    images = batch(*IMAGES)
    whole = macenko_augment(images, generator=seeded(7))
    generator = seeded(7)
    one_by_one = torch.stack([macenko_augment(image, generator=generator) for image in images])
    assert torch.equal(whole, one_by_one)
    listed = macenko_augment(IMAGES, generator=seeded(7))
    assert torch.equal(whole, batch(*listed))
    assert torch.equal(whole, macenko_augment(images, generator=seeded(7)))
    assert not torch.equal(whole, macenko_augment(images, generator=seeded(8)))
    same = macenko_augment(batch(IMAGES[0], IMAGES[0]), generator=seeded(7))
    assert not torch.equal(same[0], same[1])


def test_default_generator_follows_the_seed_of_torch():
    torch.manual_seed(3)
    first = macenko_augment(IMAGES[0])
    second = macenko_augment(IMAGES[0])
    torch.manual_seed(3)
    np.testing.assert_array_equal(macenko_augment(IMAGES[0]), first)
    assert not np.array_equal(first, second)


def test_drawn_numbers_are_uniform_and_independent():
    count = 20000
    gains, shifts = draw_changes(count, 0.3, 0.1, seeded())
    units = torch.cat([(gains - 1) / 0.3, shifts / 0.1], dim=1)
    assert units.min() >= -1 and units.max() < 1
    # Five standard errors of the mean, the mean square (variance 4/45) and the covariances of uniform numbers.
    assert units.mean(dim=0).abs().max() < 5 * (1 / 3 / count) ** 0.5
    assert ((units**2).mean(dim=0) - 1 / 3).abs().max() < 5 * (4 / 45 / count) ** 0.5
    correlation = units.T.corrcoef() - torch.eye(4, dtype=torch.float64)
    assert correlation.abs().max() < 5 / count**0.5


def test_given_source_is_used():
    slide = macenko_fit(IMAGES[3])
    out = macenko_augment(IMAGES[0], slide, generator=seeded())
    gains, shifts = draw_changes(1, 0.2, 0.2, seeded())
    expected = by_formula(IMAGES[0], gains[0].numpy(), shifts[0].numpy(), slide.stain_matrix[0].numpy())
    assert np.abs(out - np.floor(expected)).max() <= 1


def test_degenerate_images_follow_the_policy():
    images = batch(IMAGES[0], WHITE, IMAGES[1])
    kept = images.clone()
    out, status = macenko_augment(images, generator=seeded(), return_status=True)
    assert status.tolist() == [0, MacenkoStatus.TOO_FEW_TISSUE_PIXELS, 0]
    gains, shifts = draw_changes(3, 0.2, 0.2, seeded())
    published = MacenkoNormalizer().target.stain_matrix[0].numpy()
    expected = by_formula(WHITE, gains[1].numpy(), shifts[1].numpy(), published)
    assert np.abs(out[1].permute(1, 2, 0).numpy() - np.floor(expected)).max() <= 1
    identity = macenko_augment(images, generator=seeded(), on_degenerate="identity")
    assert torch.equal(identity[1], images[1])
    assert torch.equal(identity[[0, 2]], out[[0, 2]])
    with pytest.raises(ValueError, match="image 1: fewer than 10 tissue pixels"):
        macenko_augment(images, on_degenerate="raise")
    assert torch.equal(images, kept)


def test_gradcheck_to_the_image_and_the_stains():
    images = batch(synthetic_tissue(5, 7, 1)).double().clamp(60, 150)
    source = macenko_fit(IMAGES[0])
    leaves = [part.clone().requires_grad_() for part in (images, *source[:2])]

    def changed(x, stain, maximum):
        return macenko_augment(x, MacenkoFit(stain, maximum, source.status), generator=seeded(1))

    assert torch.autograd.gradcheck(changed, leaves, eps=1e-5, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_unit_range(dtype):
    image = (batch(IMAGES[0]).double() / 255).to(dtype)
    out = macenko_augment(image, range=1, generator=seeded())
    expected = macenko_augment(image.double(), range=1, generator=seeded())
    assert out.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), expected, rtol=eps, atol=eps / 256)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"gain": 1}, ValueError, "gain=1"),
        ({"gain": -0.1}, ValueError, "gain=-0.1"),
        ({"gain": "0.2"}, TypeError, "gain"),
        ({"shift": 5}, ValueError, "shift=5"),
        ({"shift": float("nan")}, ValueError, "shift=nan"),
        ({"generator": np.random.default_rng(0)}, TypeError, "expected a torch.Generator"),
        ({"on_degenerate": "skip"}, ValueError, "on_degenerate='skip'"),
    ],
)
def test_arguments_are_checked(options, error, message):
    with pytest.raises(error, match=message):
        macenko_augment(IMAGES[0], **options)


def test_changes_that_were_drawn_before():
    """They take the place of the draw, and are checked."""
    images = torch.from_numpy(np.stack(IMAGES))
    drawn = draw_changes(4, 0.2, 0.3, seeded(3))
    expected = macenko_augment(images, gain=0.2, shift=0.3, generator=seeded(3))
    assert torch.equal(macenko_augment(images, changes=drawn), expected)
    alone = macenko_augment(images[2], changes=tuple(values[2:3] for values in drawn))
    assert torch.equal(alone, expected[2])
    with pytest.raises(ValueError, match=r"changes are \[\[4, 2\], \[4, 2\]\]; expected two tensors \[1, 2\]"):
        macenko_augment(images[0], changes=drawn)
