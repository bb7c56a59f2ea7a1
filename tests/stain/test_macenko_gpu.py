"""On a CUDA device: every kernel against the CPU path in each dtype and layout, streams, graphs, and the whole path."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from stain_images import batch, load, real_parameters, synthetic_tissue

from ernet_fast import reference
from ernet_fast.stain import (
    MacenkoNormalizer,
    ReinhardNormalizer,
    macenko_augment,
    macenko_fit,
    macenko_normalize,
    separate,
    torch_backend,
)

pytestmark = pytest.mark.gpu
TARGET = MacenkoNormalizer().target
SIZES = [(3, 1, 1), (2, 4, 4), (3, 7, 11), (2, 33, 65), (4, 224, 224), (1, 460, 700), (2, 1, 40000)]


@pytest.fixture(autouse=True)
def kernels():
    if not torch_backend.cuda_kernels_available():
        pytest.fail("a CUDA device is present, but the package was built without its CUDA kernels (set ERNET_CUDA=1)")


def images_of(count, height, width, dtype, channels_last):
    images = batch(*(synthetic_tissue(height, width, seed) for seed in range(count))).to(dtype)
    return images.to(memory_format=torch.channels_last) if channels_last else images


def stains_on(device):
    return TARGET.stain_matrix.to(device), TARGET.max_concentration.to(device)


def assert_levels_agree(found, expected):
    difference = (found.cpu().int() - expected.int()).abs()
    assert difference.max() <= 1
    assert (difference != 0).sum() <= max(2, 5e-4 * difference.numel())


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("size", SIZES)
def test_reconstruction_equals_the_cpu(size, dtype, channels_last):
    images = images_of(*size, dtype, channels_last)
    source = macenko_fit(batch(synthetic_tissue(64, 64, 9)))[:2]
    expected = torch.ops.ernet.macenko_reconstruct(images, *source, *stains_on("cpu"), 240.0)
    arguments = (part.cuda() for part in source)
    found = torch.ops.ernet.macenko_reconstruct(images.cuda(), *arguments, *stains_on("cuda"), 240.0)
    assert found.stride() == images.stride()
    if dtype == torch.uint8:
        assert_levels_agree(found, expected)
    else:
        # Exponents below 16 in float32, eight roundings each.
        torch.testing.assert_close(found.cpu(), expected, rtol=16 * 2.0**-24 * 8, atol=0)


@pytest.mark.parametrize("percentile", ["linear", "nearest"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_normalisation_equals_the_reference(dtype, percentile):
    images = images_of(4, 61, 47, torch.uint8, False)
    images[2] = 255
    images = images.to(dtype)
    for policy in ("reference", "identity"):
        options = {"percentile": percentile, "on_degenerate": policy, "return_status": True}
        expected, statuses = reference.macenko_normalize(images, TARGET, **options)
        found, status = macenko_normalize(images.cuda(), TARGET, **options)
        assert found.is_cuda and found.dtype == dtype and status.tolist() == statuses.tolist() == [0, 0, 1, 0]
        if dtype == torch.uint8:
            assert_levels_agree(found, expected)
        else:
            rtol = 2e-5 + torch.finfo(dtype).eps  # float32 arithmetic, then one rounding
            torch.testing.assert_close(found.cpu().double(), expected.double(), rtol=rtol, atol=0)
    with pytest.raises(ValueError, match="image 2: fewer than 10 tissue pixels"):
        macenko_normalize(images.cuda(), TARGET, on_degenerate="raise")


@pytest.mark.parametrize("parameter", real_parameters()[:6])
def test_real_images_equal_the_reference(parameter):
    image = load(parameter)
    expected = reference.macenko_normalize(image, TARGET)
    found = macenko_normalize(batch(image).cuda(), TARGET)[0].permute(1, 2, 0).cpu().numpy()
    difference = np.abs(found.astype(int) - expected)
    assert difference.max() <= 1 and (difference == 0).mean() >= 0.9995


def test_kernels_run_on_the_current_stream():
    """The image is made on a side stream behind a long wait: a kernel on another stream would read it too early."""
    expected_images = images_of(2, 64, 64, torch.uint8, False)
    source = expected_images.cuda()
    expected = macenko_fit(source).stain_matrix
    for _ in range(3):
        images = torch.zeros_like(source)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            images.copy_(source)
            found = macenko_fit(images).stain_matrix
            rebuilt = torch.ops.ernet.macenko_reconstruct(images, *stains_on("cuda"), *stains_on("cuda"), 240.0)
        stream.synchronize()
        assert torch.equal(found, expected)
        again = torch.ops.ernet.macenko_reconstruct(source, *stains_on("cuda"), *stains_on("cuda"), 240.0)
        assert torch.equal(rebuilt, again)


def test_reconstruction_is_captured_in_a_graph():
    images = images_of(2, 40, 56, torch.uint8, False).cuda()
    other = images_of(4, 40, 56, torch.uint8, False)[2:].cuda()
    stains = (*stains_on("cuda"), *stains_on("cuda"))
    torch.ops.ernet.macenko_reconstruct(images, *stains, 240.0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fitted = macenko_fit(images).stain_matrix
        out = torch.ops.ernet.macenko_reconstruct(images, *stains, 240.0)
    images.copy_(other)
    graph.replay()
    assert torch.equal(out, torch.ops.ernet.macenko_reconstruct(other, *stains, 240.0))
    assert torch.equal(fitted, macenko_fit(other).stain_matrix)


def test_batch_size_and_repeats_give_the_same_bits():
    images = images_of(5, 50, 70, torch.uint8, False).cuda()
    whole = macenko_normalize(images, TARGET)
    assert torch.equal(whole, macenko_normalize(images, TARGET))
    for i in range(5):
        assert torch.equal(whole[i : i + 1], macenko_normalize(images[i : i + 1], TARGET))


def test_gradients_equal_those_of_the_cpu():
    images = images_of(2, 20, 30, torch.float32, False).clamp(max=200)
    source = macenko_fit(images)
    grads = []
    for device in ("cpu", "cuda"):
        x = images.detach().to(device).requires_grad_()
        macenko_normalize(x, TARGET, source).square().sum().backward()
        grads.append(x.grad.cpu())
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-4 * float(grads[0].abs().max()))


def test_module_moves_to_the_device():
    images = images_of(2, 32, 32, torch.uint8, False)
    normalizer = MacenkoNormalizer().fit(synthetic_tissue(64, 64, 3))
    expected = normalizer(images)
    assert_levels_agree(normalizer.cuda()(images.cuda()), expected)
    found = normalizer.normalize(images.cuda())
    for part, wanted in zip(found, normalizer.cpu().normalize(images), strict=True):
        assert_levels_agree(part, wanted)


def test_devices_are_checked():
    images = images_of(1, 8, 8, torch.uint8, False).cuda()
    with pytest.raises(RuntimeError, match="source stains must be on the device of the images"):
        torch.ops.ernet.macenko_reconstruct(images, *stains_on("cpu"), *stains_on("cuda"), 240.0)
    with pytest.raises(RuntimeError, match="uint8 or float32 on CUDA"):
        torch.ops.ernet.macenko_fit(images.double(), 240.0, 1.0, 0.15, False)


def test_augmentation_separation_and_network_input_equal_the_cpu():
    images = images_of(3, 61, 47, torch.float32, True)
    on_device = images.cuda()
    changed = [macenko_augment(part, generator=torch.Generator().manual_seed(3)) for part in (images, on_device)]
    parts = [separate(part) for part in (images, on_device)]
    scaled = [
        macenko_normalize(part, TARGET, output=torch.float32, std=(0.2, 0.3, 0.4)) for part in (images, on_device)
    ]
    colours = [ReinhardNormalizer().fit(images[0]).to(part.device)(part) for part in (images, on_device)]
    pairs = [changed, [part.haematoxylin for part in parts], [part.eosin for part in parts], scaled, colours]
    for expected, found in pairs:
        assert found.is_cuda and found.stride() == expected.stride()
        # Exponents below 16 in float32, eight roundings each, and twice that for an augmented image.
        torch.testing.assert_close(found.cpu(), expected, rtol=16 * 2.0**-24 * 16, atol=1e-6)
    # Concentrations are differences of optical densities below 6.
    torch.testing.assert_close(parts[1].concentrations.cpu(), parts[0].concentrations, rtol=0, atol=1e-5)


def test_lists_and_masks_equal_the_cpu():
    images = [images_of(1, *size, torch.uint8, False)[0] for size in ((61, 47), (33, 65), (61, 47))]
    masks = [torch.rand(image.shape[1:], generator=torch.Generator().manual_seed(1)) < 0.7 for image in images]
    expected = macenko_normalize(images, TARGET, mask=masks)
    found = macenko_normalize([image.cuda() for image in images], TARGET, mask=[mask.cuda() for mask in masks])
    for a, b in zip(found, expected, strict=True):
        assert a.is_cuda
        assert_levels_agree(a, b)
