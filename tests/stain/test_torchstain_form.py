"""compat="torchstain": shapes, dtypes and values of torchstain's two backends."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from stain_images import batch, load, real_parameters, synthetic_parameters, synthetic_tissue

from ernet_fast.stain import MacenkoNormalizer, ReinhardNormalizer

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
    with pytest.raises(TypeError, match="stains is 240; expected True or False"):
        ours.normalize(image, stains=240)
    with pytest.raises(TypeError, match="got Io both by position and by name"):
        ours.normalize(image, 240, Io=250)
    with pytest.raises(TypeError, match="at most 4 numbers after the image"):
        ours.normalize(image, 240, 1, 0.15, True, 3)


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
        (TARGET.transpose(1, 2, 0), r"takes one image, as NumPy arrays \[H, W, 3\]"),
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
    with pytest.raises(ValueError, match="backend='tensorflow'; expected one of torchstain's backends"):
        MacenkoNormalizer(backend="tensorflow")
    for dtype in (bool, complex):
        with pytest.raises(TypeError, match=np.dtype(dtype).name):
            MacenkoNormalizer(compat="torchstain").normalize(TARGET.astype(dtype))
    with pytest.raises(TypeError, match="list"):
        MacenkoNormalizer(compat="torchstain").normalize([TARGET])
    assert "compat='torchstain'" in repr(MacenkoNormalizer(compat="torchstain"))


def assert_levels_agree(found, expected, share):
    assert (found is None) == (expected is None)
    if found is not None:
        found, expected = np.asarray(found), np.asarray(expected)
        assert found.dtype == expected.dtype and found.shape == expected.shape
        difference = np.abs(found.astype(int) - expected.astype(int))
        assert difference.max() <= 1 and (difference == 0).mean() >= share


BACKENDS = [("torch", chw, 0.96), ("numpy", lambda image: image, 0.9995)]


@pytest.mark.parametrize(("backend", "form", "share"), BACKENDS)
def test_a_program_written_for_torchstain_runs(backend, form, share):
    """Construction by backend, numbers by position, stains at the end, transform, arrays as target."""
    normalizers = pytest.importorskip("torchstain").normalizers
    target, image = form(TARGET), form(synthetic_tissue(64, 90, 3))
    for arguments in ({"backend": backend}, None):
        theirs = normalizers.MacenkoNormalizer(**arguments) if arguments else normalizers.MacenkoNormalizer(backend)
        ours = MacenkoNormalizer(**arguments) if arguments else MacenkoNormalizer(backend)
        theirs.fit(target, 250)
        ours.fit(target, 250)
        for numbers in ((), (250,), (250, 2, 0.2), (240, 1, 0.15, False)):
            for a, b in zip(ours.normalize(image, *numbers), theirs.normalize(image, *numbers), strict=True):
                assert_levels_agree(a, b, share)
        assert_levels_agree(ours.transform(image, 250), theirs.normalize(image, 250)[0], share)
        found = MacenkoNormalizer(backend).fit_transform(target, 250)
        assert_levels_agree(found, theirs.normalize(target, 250)[0], share)
    theirs.HERef, theirs.maxCRef = np.array([[0.6, 0.2], [0.7, 0.85], [0.4, 0.5]]), np.array([1.8, 1.2])
    ours.HERef, ours.maxCRef = theirs.HERef, theirs.maxCRef.tolist()
    if backend == "torch":
        theirs.HERef, theirs.maxCRef = (torch.from_numpy(part).float() for part in (theirs.HERef, theirs.maxCRef))
    assert_levels_agree(ours.normalize(image)[0], theirs.normalize(image)[0], share)
    with pytest.raises(ValueError, match=r"maxCRef has shape \(3,\); expected \(2,\)"):
        ours.maxCRef = np.ones(3)
    with pytest.raises(TypeError, match="HERef is 'purple'; expected numbers"):
        ours.HERef = "purple"


@pytest.mark.parametrize(("backend", "form", "share"), BACKENDS)
@pytest.mark.parametrize("dtype", ["int8", "int16", "uint16", "int32", "int64"])
def test_integers_of_any_width(backend, form, share, dtype):
    theirs = pytest.importorskip("torchstain").normalizers.MacenkoNormalizer(backend=backend)
    ours = MacenkoNormalizer(backend=backend)
    top = 127 if dtype == "int8" else 255
    target, image = (form(np.minimum(one, top).astype(dtype)) for one in (TARGET, synthetic_tissue(64, 90, 3)))
    theirs.fit(target)
    ours.fit(target)
    assert_levels_agree(ours.normalize(image)[0], theirs.normalize(image)[0], share)


@pytest.mark.parametrize(("backend", "form", "share"), BACKENDS)
@pytest.mark.parametrize("method", [None, "modified"])
def test_reinhard_as_torchstain(backend, form, share, method):
    theirs = pytest.importorskip("torchstain").normalizers.ReinhardNormalizer(backend=backend, method=method)
    ours = ReinhardNormalizer(backend=backend, method=method)
    target, image = form(TARGET), form(synthetic_tissue(64, 90, 3))
    theirs.fit(target)
    ours.fit(target)
    for kind in ("uint8", "float32", "int32"):
        given = image.to(getattr(torch, kind)) if backend == "torch" else image.astype(kind)
        # Theirs computes in float32.
        assert_levels_agree(ours.normalize(given), theirs.normalize(given), 0.95)
    assert ReinhardNormalizer("numpy").compat == "torchstain" and "compat='torchstain'" in repr(ours)


def test_several_targets_of_either_kind():
    """Arrays [H, W, 3] and [3, H, W], and tensors [3, H, W]."""
    other = synthetic_tissue(66, 81, 2)
    expected = MacenkoNormalizer().fit([TARGET, other], targets="avg")
    for pair in ([TARGET, other], [TARGET.transpose(2, 0, 1), other.transpose(2, 0, 1)]):
        found = MacenkoNormalizer(backend="numpy").fit(pair, targets="avg")
        assert torch.equal(found.HERef, expected.HERef) and torch.equal(found.maxCRef, expected.maxCRef)
    nearest = MacenkoNormalizer(percentile="nearest").fit([TARGET, other], targets="avg")
    found = MacenkoNormalizer(backend="torch").fit([chw(TARGET), chw(other)], "avg")
    assert torch.equal(found.HERef, nearest.HERef) and torch.equal(found.maxCRef, nearest.maxCRef)
