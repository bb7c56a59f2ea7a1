"""Derivatives beyond one backward pass: forward mode, torch.func, second derivatives, batched evaluation."""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from stain_images import batch, synthetic_tissue

from ernet_fast.stain import MacenkoFit, MacenkoNormalizer, macenko_augment, macenko_fit, macenko_normalize, separate

TARGET = MacenkoNormalizer().target
SOURCE = macenko_fit(synthetic_tissue(40, 40, 3))
IMAGE = batch(synthetic_tissue(6, 7, 1)).double().clamp(40, 180)
TANGENT = torch.linspace(-1, 1, IMAGE.numel(), dtype=torch.float64).reshape(IMAGE.shape)


def seeded():
    return torch.Generator().manual_seed(5)


CALLS = {
    "normalize": lambda x: macenko_normalize(x, TARGET, SOURCE),
    "network": lambda x: macenko_normalize(x, TARGET, SOURCE, output=torch.float32),
    "estimated": lambda x: macenko_normalize(x, TARGET, macenko_fit(x.detach())),
    "augment": lambda x: macenko_augment(x, SOURCE, generator=seeded()),
    "haematoxylin": lambda x: separate(x, SOURCE).haematoxylin,
    "concentrations": lambda x: separate(x, SOURCE).concentrations,
    "module": lambda x: MacenkoNormalizer()(x, SOURCE),
}


def central_difference(call, x, tangent, step=1e-4):
    return (call(x + step * tangent) - call(x - step * tangent)).detach() / (2 * step)


def assert_tangent(found, expected):
    """float32 results are rounded to 2^-24 of at most 255 and divided by 2e-4."""
    assert found is not None and found.abs().max() > 0
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 if expected.dtype == torch.float64 else 2e-3)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("call", [name for name in CALLS if name != "estimated"])
def test_forward_mode(call, grad):
    function = CALLS[call]
    with torch.set_grad_enabled(grad), fwAD.dual_level():
        found = fwAD.unpack_dual(function(fwAD.make_dual(IMAGE, TANGENT))).tangent
    assert_tangent(found, central_difference(function, IMAGE, TANGENT))
    if call != "network":  # whose memory layout torch.func does not keep
        _, found = torch.func.jvp(function, (IMAGE,), (TANGENT,))
        assert_tangent(found, central_difference(function, IMAGE, TANGENT))


def test_forward_mode_holds_estimated_stains_constant():
    fixed = macenko_fit(IMAGE)
    expected = central_difference(lambda x: macenko_normalize(x, TARGET, fixed), IMAGE, TANGENT)
    for function in (lambda x: macenko_normalize(x, TARGET), CALLS["estimated"]):
        with fwAD.dual_level():
            assert_tangent(fwAD.unpack_dual(function(fwAD.make_dual(IMAGE, TANGENT))).tangent, expected)
        assert_tangent(torch.func.jvp(function, (IMAGE,), (TANGENT,))[1], expected)


def test_forward_mode_to_the_stains():
    def by_stains(stain, maximum):
        return macenko_normalize(IMAGE, TARGET, MacenkoFit(stain, maximum, SOURCE.status))

    tangents = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(1, 3, 2), torch.ones(1, 2, dtype=torch.float64)
    _, found = torch.func.jvp(by_stains, tuple(SOURCE[:2]), tangents)
    step = 1e-6
    up, down = (by_stains(*(p + s * t for p, t in zip(SOURCE[:2], tangents, strict=True))) for s in (step, -step))
    torch.testing.assert_close(found, (up - down) / (2 * step), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("call", ["normalize", "augment", "haematoxylin", "concentrations", "module"])
def test_transforms_of_torch_func_agree_with_autograd(call):
    def loss(x):
        return (CALLS[call](x) * TANGENT.sum(dim=1, keepdim=True)).square().sum()

    x = IMAGE.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(x), x)
    torch.testing.assert_close(torch.func.grad(loss)(IMAGE), expected)
    images = torch.cat([IMAGE, IMAGE.flip(2), IMAGE.flip(3)])
    one_by_one = torch.stack([CALLS[call](image[None])[0] for image in images])
    if call != "augment":  # which draws anew for each image
        torch.testing.assert_close(torch.vmap(lambda image: CALLS[call](image[None])[0])(images), one_by_one)
        expected = torch.stack([torch.func.grad(loss)(image[None])[0] for image in images])
        found = torch.vmap(torch.func.grad(lambda image: loss(image[None])))(images)
        torch.testing.assert_close(found, expected)


def test_second_derivatives():
    weight = torch.linspace(-1, 1, IMAGE.numel(), dtype=torch.float64).reshape(IMAGE.shape)
    leaves = [part.clone().requires_grad_() for part in (IMAGE, *SOURCE[:2], *TARGET[:2])]

    def weighted(x, stain, maximum, wanted, wanted_maximum):
        status = torch.zeros(1, dtype=torch.int32)
        target, source = MacenkoFit(wanted, wanted_maximum, status), MacenkoFit(stain, maximum, status)
        return (macenko_normalize(x, target, source) * weight).sum()

    assert torch.autograd.gradgradcheck(weighted, leaves, eps=1e-6, atol=1e-4, rtol=1e-4)


def test_per_sample_gradients_of_a_batch_that_is_fitted():
    """vmap of a call that fits each image of its own."""
    images = batch(*(synthetic_tissue(9, 11, seed) for seed in range(3))).double().clamp(40, 180)
    expected = macenko_normalize(images, TARGET)
    found = torch.vmap(lambda image: macenko_normalize(image[None], TARGET)[0])(images)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
