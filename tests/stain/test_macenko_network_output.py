"""Normalised images as a network's input, in one pass, against normalisation followed by scaling."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from stain_images import batch, synthetic_tissue

from ernet_fast import _backend
from ernet_fast.stain import MacenkoNormalizer, macenko_fit, macenko_normalize, network_output, operators

TARGET = MacenkoNormalizer().target
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGES = [synthetic_tissue(45, 53, seed) for seed in range(3)]  # more than two blocks of pixels
WHITE = np.full((45, 53, 3), 255, np.uint8)


def scaled(images, dtype, mean=MEAN, std=STD, unit=255.0):
    """(I / unit - mean) / std of images [B, 3, H, W] in float64, rounded once to float32 and once to `dtype`."""
    mean, std = (torch.tensor(part, dtype=torch.float64)[:, None, None] for part in (mean, std))
    return ((images.double() / unit - mean) / std).float().to(dtype)


@pytest.mark.parametrize("path", ["one operator", "two operators", "composed"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("given", [torch.uint8, torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_normalisation_then_scaling(dtype, given, channels_last, path, monkeypatch):
    if path != "one operator":
        monkeypatch.setattr(operators, "normalize", lambda *arguments: None)
    if path == "composed":
        plain = operators.reconstruct
        monkeypatch.setattr(
            operators,
            "reconstruct",
            lambda x, source, target, options, network=None: (
                plain(x, source, target, options)
                if network is None
                else network_output.scale(plain(x, source, target, options), network, options.range)
            ),
        )
    images = batch(*IMAGES, WHITE).to(given)
    images = images.to(memory_format=torch.channels_last) if channels_last else images
    for policy in ("reference", "identity"):
        normalised, statuses = macenko_normalize(images, TARGET, on_degenerate=policy, return_status=True)
        out, status = macenko_normalize(
            images, TARGET, output=dtype, mean=MEAN, std=STD, on_degenerate=policy, return_status=True
        )
        assert out.dtype == dtype and out.shape == images.shape and torch.equal(status, statuses)
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(out, scaled(normalised, dtype))


def test_forms_give_tensors():
    image = IMAGES[0]
    expected = scaled(batch(macenko_normalize(image, TARGET)), torch.float32, (0, 0, 0), (1, 1, 1))
    assert 0 <= expected.min() and expected.max() <= 1
    for given in (image, torch.from_numpy(image), batch(image)[0], image.transpose(2, 0, 1)):
        out = macenko_normalize(given, TARGET, output=torch.float32)
        assert isinstance(out, torch.Tensor) and torch.equal(out, expected[0])
        assert out.stride() == (1, 3 * 53, 3)
    listed = macenko_normalize([image, image[:20]], TARGET, output=torch.float32)
    assert torch.equal(listed[0], expected[0]) and listed[1].shape == (3, 20, 53)
    assert macenko_normalize(batch(image)[:0], TARGET, output=torch.bfloat16).shape == (0, 3, 45, 53)


def test_unit_range_and_undefined_pixels():
    images = batch(*IMAGES).float() / 255
    out = macenko_normalize(images, TARGET, output=torch.float32, mean=MEAN, std=STD, range=1)
    assert torch.equal(out, scaled(macenko_normalize(images, TARGET, range=1), torch.float32, unit=1.0))
    images[1, 0, 4, 5] = math.nan
    for dtype in (torch.float32, torch.bfloat16):
        out = macenko_normalize(images, TARGET, macenko_fit(images[:1], range=1), output=dtype, range=1)
        assert out[1, :, 4, 5].isnan().all() and out.isnan().sum() == 3


def test_a_large_image_is_the_same_for_any_number_of_threads():
    image = batch(np.tile(synthetic_tissue(260, 260, 9), (2, 2, 1)))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(macenko_normalize(image, TARGET, output=torch.bfloat16, mean=MEAN, std=STD))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_gradients_flow_through_the_scaling():
    images = batch(synthetic_tissue(5, 7, 1)).double().clamp(max=200)
    source = macenko_fit(IMAGES[0])
    weight = torch.linspace(-1, 1, images.numel()).reshape(images.shape)
    one, two = (images.clone().requires_grad_() for _ in range(2))
    (macenko_normalize(one, TARGET, source, output=torch.float32, std=STD) * weight).sum().backward()
    std = torch.tensor(STD, dtype=torch.float64)[:, None, None]
    (macenko_normalize(two, TARGET, source) / 255 / std * weight).sum().backward()
    torch.testing.assert_close(one.grad, two.grad, rtol=2.0**-22, atol=1e-12)


def test_normalizer_gives_networks_their_input():
    normalizer = MacenkoNormalizer(output=torch.bfloat16, mean=MEAN, std=STD).fit(IMAGES[2])
    images = batch(*IMAGES[:2])
    expected = scaled(MacenkoNormalizer().fit(IMAGES[2])(images), torch.bfloat16)
    assert torch.equal(normalizer(images), expected)
    assert normalizer.normalize(images, stains=False)[0].dtype == torch.uint8


@pytest.mark.skipif(not _backend.extension_available(), reason="the compiled operators are not built")
@pytest.mark.parametrize("given", [torch.uint8, torch.float32, torch.float64])
def test_opcheck_and_argument_checks(given):
    images = batch(*IMAGES[:2]).to(given)
    stains = TARGET.stain_matrix, TARGET.max_concentration
    numbers = torch.tensor(MEAN, dtype=torch.float64), torch.tensor(STD, dtype=torch.float64)
    mean, std = numbers
    operator, whole = torch.ops.ernet.macenko_reconstruct, torch.ops.ernet.macenko_normalize
    given = images, *stains, *stains, 240.0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        scaling = {"dtype": dtype, "mean": mean, "std": std}
        torch.library.opcheck(operator.default, given, scaling)
        torch.library.opcheck(whole.default, (images, *stains, 240.0, 1.0, 0.15, False, True), scaling)
    unscaled = operator(*given, dtype=torch.float32)
    assert torch.equal(unscaled, operator(*given, dtype=torch.float32, mean=mean * 0, std=std * 0 + 1))
    with pytest.raises(RuntimeError, match="must be float32, bfloat16 or float16"):
        operator(*given, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="pass its dtype too"):
        operator(*given, mean=mean)
    with pytest.raises(RuntimeError, match=r"std must be \[3\] float64 on the CPU; got \[2\]"):
        operator(*given, dtype=torch.float32, mean=mean, std=std[:2])
    with pytest.raises(RuntimeError, match="mean must be"):
        operator(*given, dtype=torch.float32, mean=mean.float())
    with pytest.raises(RuntimeError, match="std must be positive"):
        operator(*given, dtype=torch.float32, std=-std)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": "tensor"}, "output='tensor'"),
        ({"output": torch.float64}, "output=torch.float64"),
        ({"mean": MEAN}, "pass output=torch.float32"),
        ({"output": torch.float32, "mean": (0.5,)}, "mean="),
        ({"output": torch.float32, "mean": (0.5, 0.5, math.nan)}, "mean="),
        ({"output": torch.float32, "std": (1, 1, 0)}, "three positive numbers"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        macenko_normalize(IMAGES[0], TARGET, **options)
    with pytest.raises(ValueError, match=message):
        MacenkoNormalizer(**options)


def test_scaling_elsewhere_uploads_nothing(monkeypatch):
    """While a CUDA graph is captured no copy from the host is allowed; a device without data stands for a GPU."""

    images = torch.empty(2, 3, 4, 5, device="meta")
    output = network_output.read_output(torch.float32, (0.5, 0.4, 0.3), (0.2, 0.2, 0.1))
    uploaded = []
    for name in ("to", "cuda", "pin_memory"):
        real = getattr(torch.Tensor, name)

        def noted(tensor, *given, real=real, **named):
            uploaded.extend([tensor] if tensor.device.type == "cpu" else [])
            return real(tensor, *given, **named)

        monkeypatch.setattr(torch.Tensor, name, noted)
    assert network_output.scale(images, output, 1.0).device.type == "meta"
    assert uploaded == []
    output.mean.to("meta")
    assert len(uploaded) == 1, "what this test would see"
