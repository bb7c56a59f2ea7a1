"""The reference against torchstain's two backends, and against a case computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from stain_images import load, real_parameters, synthetic_parameters, synthetic_tissue

from ernet_fast import reference
from ernet_fast.stain import MacenkoFit, MacenkoStatus

IMAGES = [*real_parameters(), *synthetic_parameters()]
TORCHSTAIN_REFERENCE = MacenkoFit(
    torch.tensor([[[0.5626, 0.2159], [0.7201, 0.8012], [0.4062, 0.5581]]], dtype=torch.float64),
    torch.tensor([[1.9705, 1.0308]], dtype=torch.float64),
    torch.zeros(1, dtype=torch.int32),
)


@pytest.mark.parametrize("parameter", IMAGES)
def test_linear_equals_torchstain_numpy_bit_for_bit(parameter):
    torchstain = pytest.importorskip("torchstain.numpy.normalizers.macenko")
    image = load(parameter)
    theirs = torchstain.NumpyMacenkoNormalizer()
    expected = theirs.normalize(image, stains=False)[0]
    kept = image.copy()
    fit = reference.macenko_fit(image)
    ours = reference.macenko_normalize(image, TORCHSTAIN_REFERENCE, fit)
    assert np.array_equal(ours, expected)
    assert np.array_equal(image, kept)
    theirs.fit(image)
    np.testing.assert_allclose(fit.stain_matrix[0].numpy(), theirs.HERef, rtol=0, atol=1e-12)
    np.testing.assert_allclose(fit.max_concentration[0].numpy(), theirs.maxCRef, rtol=1e-12)


@pytest.mark.parametrize("parameter", IMAGES)
def test_nearest_is_within_one_level_of_torchstain_torch(parameter, monkeypatch):
    """In float64: in float32 its result depends on the CPU's linear algebra by more than a level."""
    torchstain = pytest.importorskip("torchstain.torch.normalizers.macenko")
    image = load(parameter)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        theirs = torchstain.TorchMacenkoNormalizer()
    finally:
        torch.set_default_dtype(default)
    expected = theirs.normalize(torch.from_numpy(image).permute(2, 0, 1), stains=False)[0]
    ours = reference.macenko_normalize(image, TORCHSTAIN_REFERENCE, percentile="nearest").astype(np.int64)
    difference = np.abs(ours - expected.numpy())
    assert difference.max() <= 1
    assert (difference == 0).mean() >= 0.96


def test_stains_of_a_mixture_are_found():
    """Pixels with known concentrations of two known stains, the pure stains among them."""
    stains = np.array([[0.65, 0.07], [0.70, 0.99], [0.29, 0.11]])
    stains /= np.linalg.norm(stains, axis=0)
    rng = np.random.default_rng(0)
    concentrations = rng.uniform(0.3, 2.0, (2, 4000))
    concentrations[0, :200] = 0
    concentrations[1, 200:400] = 0
    od = np.concatenate([(stains @ concentrations).T, np.zeros((1000, 3))])
    pixels = (240 * np.exp(-od) - 1).reshape(100, 50, 3)
    # Pure eosin has a red OD of 0.14 a unit, so a threshold of 0.15 would drop its pale pixels.
    fit = reference.macenko_fit(pixels, beta=0.01)
    assert fit.status.tolist() == [MacenkoStatus.OK]
    np.testing.assert_allclose(fit.stain_matrix[0].numpy(), stains, atol=1e-9)
    expected = [np.percentile(np.append(row, np.zeros(1000)), 99) for row in concentrations]
    np.testing.assert_allclose(fit.max_concentration[0].numpy(), expected, rtol=1e-9)


def test_own_stains_give_the_projection_on_the_stain_plane():
    """With source = target only the part of the OD outside the plane is lost: I' = Io exp(-HE pinv(HE) OD)."""
    image = synthetic_tissue(40, 60).astype(np.float64)
    fit = reference.macenko_fit(image)
    stain = fit.stain_matrix[0].numpy()
    od = -np.log((image + 1) / 240)
    expected = np.minimum(240 * np.exp(-od @ (stain @ np.linalg.pinv(stain)).T), 255)
    np.testing.assert_allclose(reference.macenko_normalize(image, fit, fit), expected, rtol=1e-12)


@pytest.mark.parametrize("count", [2, 3, 4, 50, 101, 1000])
def test_nearest_rule_is_torchstains(count):
    percentile = pytest.importorskip("torchstain.torch.utils").percentile
    from ernet_fast.reference.macenko import quantiles

    values = np.random.default_rng(count).normal(size=count)
    for q in (0, 1, 5, 50, 99, 100):
        assert quantiles(values, (q,), "nearest") == [float(percentile(torch.from_numpy(values), q))]
