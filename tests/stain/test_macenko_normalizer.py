"""MacenkoNormalizer: torchstain's call style, and a module's."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
from stain_images import batch, synthetic_tissue
from torch.utils._python_dispatch import TorchDispatchMode

from ernet_fast import _backend
from ernet_fast.stain import MacenkoNormalizer, macenko_fit, macenko_normalize
from ernet_fast.stain.pipeline import usable_source

A, B = synthetic_tissue(60, 70, 1), synthetic_tissue(61, 73, 2)


def test_call_style_and_results_of_torchstain():
    torchstain = pytest.importorskip("torchstain.numpy.normalizers.macenko")
    theirs = torchstain.NumpyMacenkoNormalizer()
    ours = MacenkoNormalizer()
    for fitted in (False, True):
        if fitted:
            theirs.fit(A)
            ours.fit(A)
            np.testing.assert_allclose(ours.HERef.numpy(), theirs.HERef, atol=1e-6)
            np.testing.assert_allclose(ours.maxCRef.numpy(), theirs.maxCRef, rtol=1e-6)
        for mine, expected in zip(ours.normalize(B, stains=True), theirs.normalize(B, stains=True), strict=True):
            difference = np.abs(mine.astype(int) - expected)
            assert difference.max() <= 1 and (difference == 0).mean() >= 0.9995
    image, h, e = ours.normalize(B, stains=False)
    assert h is None and e is None
    np.testing.assert_array_equal(image, ours(B))


def test_stains_multiply_to_the_image():
    """Io (H / Io) (E / Io) is the normalised image, as concentrations add in the log domain."""
    image, h, e = MacenkoNormalizer().normalize(batch(A).double().clamp(max=150))
    unclipped = (image < 255) & (h < 255) & (e < 255)
    torch.testing.assert_close((h * e / 240)[unclipped], image[unclipped], rtol=1e-12, atol=0)


class MacenkoCalls(TorchDispatchMode):
    """The Macenko operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "ernet":
            self.names.append(function.__name__.split(".")[0])
        return function(*args, **(kwargs or {}))


@pytest.mark.skipif(not _backend.extension_available(), reason="the compiled operators are not built")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("policy", ["reference", "identity"])
def test_image_and_stains_take_one_fit_and_one_pass(dtype, layout, policy):
    """With the bits of a reconstruction each."""
    normalizer = MacenkoNormalizer(on_degenerate=policy)
    images = batch(synthetic_tissue(61, 73, 2), synthetic_tissue(61, 73, 3), A[:1, :1].repeat(61, 0).repeat(73, 1))
    images = images.to(dtype).contiguous(memory_format=layout)
    with MacenkoCalls() as calls:
        found = normalizer.normalize(images)
    assert calls.names == ["macenko_fit", "macenko_reconstruct_stains"]
    source = macenko_fit(images)
    usable = usable_source(source, normalizer.target)
    for kept, one in zip(((1, 1), (1, 0), (0, 1)), found, strict=True):
        maxima = normalizer.target.max_concentration * torch.tensor(kept)
        drawn = normalizer.target._replace(max_concentration=maxima)
        expected = macenko_normalize(images, drawn, usable)
        if policy == "identity" and kept == (1, 1):
            expected[2] = images[2]
        assert one.dtype == dtype and one.stride() == images.stride()
        torch.testing.assert_close(one, expected, rtol=0, atol=0)


def test_target_travels_in_the_state_dict():
    normalizer = MacenkoNormalizer().fit(A)
    file = io.BytesIO()
    torch.save(normalizer.state_dict(), file)
    file.seek(0)
    other = MacenkoNormalizer()
    other.load_state_dict(torch.load(file))
    np.testing.assert_array_equal(other(B), normalizer(B))
    assert set(normalizer.state_dict()) == {"HERef", "maxCRef", "settings"}
    np.testing.assert_array_equal(copy.deepcopy(normalizer)(B), normalizer(B))
    assert not list(normalizer.parameters())


def test_module_casts_keep_working():
    normalizer = MacenkoNormalizer().fit(A)
    single = copy.deepcopy(normalizer).float()
    assert np.abs(single(B).astype(int) - normalizer(B)).max() <= 1
    sequence = torch.nn.Sequential(normalizer, torch.nn.Flatten())
    assert sequence(batch(B)).shape == (1, B.size)


def test_fit_equals_macenko_fit_and_takes_one_image():
    normalizer = MacenkoNormalizer()
    assert normalizer.fit(A) is normalizer
    fit = macenko_fit(A)
    assert torch.equal(normalizer.HERef, fit.stain_matrix[0]) and torch.equal(
        normalizer.maxCRef, fit.max_concentration[0]
    )
    np.testing.assert_array_equal(normalizer(B), macenko_normalize(B, fit))
    with pytest.raises(ValueError, match="one target image; got 2"):
        normalizer.fit(batch(A, A))
    before = normalizer.HERef.clone()
    with pytest.raises(ValueError, match="target cannot be fitted .*fewer than 10 tissue pixels"):
        normalizer.fit(A * 0 + 255)
    assert torch.equal(normalizer.HERef, before)


def test_parameters_are_checked_and_shown():
    with pytest.raises(ValueError, match="alpha=70"):
        MacenkoNormalizer(alpha=70)
    with pytest.raises(ValueError, match="on_degenerate='skip'"):
        MacenkoNormalizer(on_degenerate="skip")
    assert "percentile='nearest'" in repr(MacenkoNormalizer(percentile="nearest"))


def test_parameters_are_used():
    normalizer = MacenkoNormalizer(Io=255, alpha=3, beta=0.2, percentile="nearest", range=1)
    image = A.astype(np.float64) / 255
    fit = macenko_fit(image, Io=255, alpha=3, beta=0.2, percentile="nearest", range=1)
    normalizer.fit(image)
    assert torch.equal(normalizer.HERef, fit.stain_matrix[0])
    out = normalizer(image)
    assert out.max() <= 1 and out.dtype == np.float64
