"""torch.compile(fullgraph=True) and torch.export of whole calls: one graph, the same values."""

from __future__ import annotations

import pytest
import torch
from stain_images import batch, synthetic_tissue

from ernet_fast import _backend
from ernet_fast.stain import MacenkoNormalizer, macenko_augment, macenko_fit, macenko_normalize, separate

pytestmark = pytest.mark.skipif(not _backend.extension_available(), reason="the compiled operators are not built")
IMAGES = batch(*(synthetic_tissue(30, 33, seed) for seed in range(3)))
TARGET = macenko_fit(synthetic_tissue(40, 40, 5))
CALLS = {
    "module": MacenkoNormalizer(on_degenerate="identity"),
    "network": MacenkoNormalizer(output=torch.float32, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)),
    "unit range": lambda x: MacenkoNormalizer(range=1)(x.float() / 255),
    "status": lambda x: MacenkoNormalizer()(x, return_status=True),
    "fit": macenko_fit,
    "normalize": lambda x: macenko_normalize(x, TARGET, on_degenerate="identity"),
    "source": lambda x: macenko_normalize(x, TARGET, macenko_fit(x)),
    "separate": separate,
    "stains": lambda x: MacenkoNormalizer().normalize(x),
    "augment": lambda x: macenko_augment(x, gain=0.0, shift=0.0),
}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("name", CALLS)
def test_one_graph_gives_the_same(name, dtype):
    images = IMAGES.to(dtype)
    images[1] = 255
    torch._dynamo.reset()
    call = CALLS[name]
    expected = call(images)
    found = torch.compile(call, backend="aot_eager", fullgraph=True)(images)
    pairs = zip(found, expected, strict=True) if isinstance(expected, tuple) else [(found, expected)]
    for a, b in pairs:
        # composed operations may be computed in another order
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 if a.is_floating_point() else 0, equal_nan=True)


def test_training_step_in_one_graph():
    """Gradients flow through the normalisation to what made the images."""
    weight = torch.tensor(0.9, requires_grad=True)
    source = macenko_fit(IMAGES)
    torch._dynamo.reset()

    def step(images, weight):
        return macenko_normalize(images * weight, TARGET, source).mean()

    images = IMAGES.float().clamp(max=200)
    (expected,) = torch.autograd.grad(step(images, weight), weight)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    (found,) = torch.autograd.grad(compiled(images, weight), weight)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_backward_pass_by_compiled_autograd():
    compiled_autograd = pytest.importorskip("torch._dynamo.compiled_autograd")
    torch._dynamo.reset()
    images = IMAGES.float().requires_grad_()
    (expected,) = torch.autograd.grad(macenko_normalize(images, TARGET).square().mean(), images)
    loss = macenko_normalize(images, TARGET).square().mean()
    with compiled_autograd._enable(torch.compile(backend="eager")):
        (found,) = torch.autograd.grad(loss, images)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_an_exported_normalizer_runs():
    program = torch.export.export(MacenkoNormalizer(), (IMAGES,))
    assert torch.equal(program.module()(IMAGES), MacenkoNormalizer()(IMAGES))
