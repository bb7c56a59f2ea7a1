"""compat="torchstain": shapes, dtypes and values of torchstain's two backends."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from stain_images import batch, load, real_parameters, synthetic_parameters, synthetic_tissue

from ernet_fast.stain import MacenkoNormalizer

TARGET = synthetic_tissue(70, 80, 11)
IMAGES = [*real_parameters()[:4], *synthetic_parameters()]


def chw(image):
    return torch.from_numpy(image).permute(2, 0, 1)


@pytest.mark.parametrize("fitted", [False, True])
@pytest.mark.parametrize("parameter", IMAGES)
def test_torch_tensors_as_its_torch_backend(parameter, fitted):
    theirs = pytest.importorskip("torchstain.torch.normalizers.macenko").TorchMacenkoNormalizer()
    ours = MacenkoNormalizer(compat="torchstain")
    if fitted:
        theirs.fit(chw(TARGET))
        ours.fit(chw(TARGET))
    image = load(parameter)
    for dtype in (torch.uint8, torch.float32):
        expected = theirs.normalize(chw(image).to(dtype), stains=True)
        found = ours.normalize(chw(image).to(dtype), stains=True)
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == b.dtype == torch.int32 and a.shape == b.shape == image.shape
            assert (a - b).abs().max() <= 1 and (a == b).double().mean() >= 0.96


@pytest.mark.parametrize("fitted", [False, True])
@pytest.mark.parametrize("parameter", IMAGES)
def test_arrays_as_its_numpy_backend(parameter, fitted):
    theirs = pytest.importorskip("torchstain.numpy.normalizers.macenko").NumpyMacenkoNormalizer()
    ours = MacenkoNormalizer(compat="torchstain")
    if fitted:
        theirs.fit(TARGET)
        ours.fit(TARGET)
    image = load(parameter)
    for dtype in (np.uint8, np.float64):
        expected = theirs.normalize(image.astype(dtype), stains=True)
        found = ours.normalize(image.astype(dtype), stains=True)
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == b.dtype == np.uint8 and a.shape == b.shape
            difference = np.abs(a.astype(int) - b)
            assert difference.max() <= 1 and (difference == 0).mean() >= 0.9995
    assert ours.normalize(image, stains=False)[1:] == (None, None)


@pytest.mark.parametrize("tensor", [False, True])
def test_its_parameters_may_be_given_to_the_calls(tensor):
    module, name = ("torch", "TorchMacenkoNormalizer") if tensor else ("numpy", "NumpyMacenkoNormalizer")
    theirs = getattr(pytest.importorskip(f"torchstain.{module}.normalizers.macenko"), name)()
    ours = MacenkoNormalizer(compat="torchstain")
    numbers = {"Io": 250, "alpha": 3, "beta": 0.25}
    target, image = (chw(one) if tensor else one for one in (TARGET, synthetic_tissue(64, 90, 3)))
    theirs.fit(target, **numbers)
    ours.fit(target, **numbers)
    for stains in (True, False):
        expected = theirs.normalize(I=image, stains=stains, **numbers)
        found = ours.normalize(I=image, stains=stains, **numbers)
        for a, b in zip(found, expected, strict=True):
            assert (a is None) == (b is None) == (not stains and a is not found[0])
            if a is not None:
                difference = np.abs(np.asarray(a).astype(int) - np.asarray(b))
                assert difference.max() <= 1 and (difference == 0).mean() >= (0.96 if tensor else 0.9995)
    assert ours.Io == 240 and not np.array_equal(np.asarray(found[0]), np.asarray(ours.normalize(image)[0]))
    with pytest.raises(ValueError, match="alpha=70"):
        ours.normalize(image, alpha=70)
    with pytest.raises(ValueError, match="beta=-1"):
        ours.fit(target, beta=-1)
    with pytest.raises(TypeError, match="stains is 240; expected True or False. Give Io"):
        ours.normalize(image, 240)


def test_results_are_those_without_compat_in_another_form():
    ours, plain = MacenkoNormalizer(compat="torchstain"), MacenkoNormalizer(percentile="nearest")
    assert torch.equal(ours.normalize(chw(TARGET))[0], plain.normalize(chw(TARGET))[0].permute(1, 2, 0).int())
    images = batch(TARGET, TARGET)
    assert torch.equal(ours(images), plain(images))
    white = torch.full((3, 20, 20), 255, dtype=torch.uint8)
    assert ours.normalize(white)[0].shape == (20, 20, 3)
    image = chw(TARGET).float()
    image[1, 2, 3] = float("nan")
    assert ours.normalize(image)[0][2, 3].tolist() == [0, 0, 0]
    found = ours.normalize(image.permute(1, 2, 0).numpy())[0]
    assert found.dtype == np.uint8 and found[2, 3].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.from_numpy(TARGET), r"takes one image, as torch tensors \[3, H, W\]"),
        (batch(TARGET), r"takes one image, as torch tensors \[3, H, W\]"),
        (TARGET.transpose(2, 0, 1), r"takes one image, as NumPy arrays \[H, W, 3\]"),
        (TARGET[None], "takes one image"),
    ],
)
def test_other_shapes_are_refused(image, message):
    normalizer = MacenkoNormalizer(compat="torchstain")
    for call in (normalizer.normalize, normalizer.fit):
        with pytest.raises(ValueError, match=message):
            call(image)


def test_options_are_checked_and_shown():
    with pytest.raises(ValueError, match="compat='staintools'"):
        MacenkoNormalizer(compat="staintools")
    for option in ({"percentile": "nearest"}, {"range": 1}, {"layout": "CHW"}):
        with pytest.raises(ValueError, match="beside compat='torchstain'"):
            MacenkoNormalizer(compat="torchstain", **option)
    with pytest.raises(TypeError, match="int16"):
        MacenkoNormalizer(compat="torchstain").normalize(TARGET.astype(np.int16))
    with pytest.raises(TypeError, match="list"):
        MacenkoNormalizer(compat="torchstain").normalize([TARGET])
    assert "compat='torchstain'" in repr(MacenkoNormalizer(compat="torchstain"))
