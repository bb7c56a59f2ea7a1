"""Floating-point images that began as bytes: the fit of the 8-bit image bit for bit, found out value by value."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from stain_images import batch, synthetic_tissue

from ernet_fast import reference
from ernet_fast.stain import MacenkoStatus, macenko_fit, macenko_normalize

IMAGE = batch(synthetic_tissue(67, 93, 3))
TARGET = macenko_fit(batch(synthetic_tissue(60, 80, 5)))
FIT = macenko_fit(IMAGE)
FORMS = {
    "divided by 255": lambda x: (x.float() / 255, 1),
    "times 1 / 255": lambda x: (x.float() * torch.tensor(1 / 255), 1),
    "levels": lambda x: (x.float(), 255),
    "float64": lambda x: (x.double() / 255, 1),
    "float64 of float32": lambda x: ((x.float() / 255).double(), 1),
    "another range": lambda x: (x.double() * (0.7 / 255), 0.7),
    "channels-last": lambda x: ((x.float() / 255).contiguous(memory_format=torch.channels_last), 1),
    "NumPy HWC": lambda x: (x[0].permute(1, 2, 0).numpy() / 255, 1),
}


def is_same_fit(a, b) -> bool:
    return all(torch.equal(ours, theirs) for ours, theirs in zip(a, b, strict=True))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("percentile", ["linear", "nearest"])
def test_fit_is_that_of_the_bytes(form, percentile):
    images, value_range = FORMS[form](IMAGE)
    expected = macenko_fit(IMAGE, percentile=percentile)
    assert expected.status.item() == MacenkoStatus.OK
    assert is_same_fit(macenko_fit(images, range=value_range, percentile=percentile), expected)


@pytest.mark.parametrize("form", FORMS)
def test_results_are_exact_to_rounding(form):
    images, value_range = FORMS[form](IMAGE)
    found = np.asarray(macenko_normalize(images, TARGET, range=value_range), dtype=np.float64)
    found = found[0] if found.ndim == 4 else found.transpose(2, 0, 1)
    single = images.dtype in (torch.float32, np.dtype("float32"))
    expected = reference.macenko_normalize(IMAGE.double(), TARGET, FIT)[0].numpy() * (value_range / 255)
    np.testing.assert_allclose(found, expected, rtol=2.0**-23 if single else 1e-12)


def test_truncated_they_are_those_of_the_bytes():
    found = macenko_normalize(IMAGE.double(), TARGET)
    eight_bit = macenko_normalize(IMAGE, TARGET).double()
    near = (found - found.round()).abs() < 1e-4  # 8-bit results are computed in float32
    assert ((found.floor() == eight_bit) | near).all()
    assert near.double().mean() < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("at", [0, 4095, 4096, -1])
def test_one_other_value_is_seen(dtype, at):
    """The fit follows a value that is no whole level, by what float32 or float64 can tell."""
    images = IMAGE.to(dtype)
    changed = images.clone()
    flat = changed.view(3, -1)
    flat[:, at] = 100
    before = macenko_fit(changed)
    flat[0, at] += 0.25
    after = macenko_fit(changed)
    assert before.status.item() == after.status.item() == MacenkoStatus.OK
    assert not torch.equal(before.stain_matrix, after.stain_matrix)
    np.testing.assert_allclose(after.stain_matrix, before.stain_matrix, atol=1e-3)
    flat[0, at] = float("nan")
    assert macenko_fit(changed).status.item() == MacenkoStatus.NON_FINITE


def test_float64_steps_of_a_numerical_derivative_are_no_bytes():
    images = IMAGE.double()
    shifted = images + 1e-6
    assert not torch.equal(macenko_normalize(images, TARGET, FIT), macenko_normalize(shifted, TARGET, FIT))
    assert not torch.equal(macenko_fit(images).stain_matrix, macenko_fit(shifted).stain_matrix)


def test_images_of_a_batch_are_told_apart():
    generic = (IMAGE.float() + torch.rand(IMAGE.shape, generator=torch.Generator().manual_seed(0)) * 0.4).clamp(max=255)
    images = torch.cat([IMAGE.float(), generic, IMAGE.float()])
    together = macenko_fit(images)
    alone = [macenko_fit(image[None]) for image in images]
    for i, fit in enumerate(alone):
        assert is_same_fit([part[i : i + 1] for part in together], fit)
    assert is_same_fit(alone[0], FIT)
    assert not torch.equal(alone[1].stain_matrix, FIT.stain_matrix)


@pytest.mark.parametrize("whole", [True, False])
def test_threads_that_share_an_image_change_nothing(whole):
    """Shared from 2^18 pixels on; the one other value stands in the last thread's part."""
    images = IMAGE.float().repeat(1, 1, 8, 6)
    if not whole:
        images[0, 1, -1, -1] += 0.5
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append((macenko_fit(images), macenko_normalize(images, TARGET)))
    finally:
        torch.set_num_threads(before)
    assert is_same_fit(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("channels_last", [False, True])
def test_network_input(channels_last):
    images = IMAGE.float() / 255
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    found = macenko_normalize(images, TARGET, range=1, output=torch.float32, mean=mean, std=std)
    plain = macenko_normalize(images, TARGET, range=1)
    expected = (plain - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
