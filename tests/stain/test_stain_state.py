"""What a normaliser keeps: through state dicts, casts, tensor subclasses, and torch's default device and dtype."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from stain_images import batch, synthetic_tissue

from ernet_fast.stain import (
    ColourCounts,
    MacenkoNormalizer,
    ReinhardNormalizer,
    StainAugment,
    macenko_augment,
    macenko_fit,
    macenko_normalize,
    reinhard_fit,
    reinhard_normalize,
    separate,
)

A, B = synthetic_tissue(60, 70, 1), synthetic_tissue(61, 73, 2)
NORMALIZERS = [MacenkoNormalizer, ReinhardNormalizer]


def reloaded(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class Tagged(torch.Tensor):
    """A tensor with metadata, as MONAI's MetaTensor is one."""


@pytest.mark.parametrize("changes", [{"Io": 255}, {"beta": 0.3}, {"alpha": 5}, {"percentile": "nearest"}])
def test_settings_travel_with_the_target(changes):
    fitted = MacenkoNormalizer(**changes).fit(A)
    other = MacenkoNormalizer()
    assert not np.array_equal(fitted(B), MacenkoNormalizer().fit(A)(B))
    other.load_state_dict(reloaded(fitted.state_dict()))
    np.testing.assert_array_equal(other(B), fitted(B))
    assert all(getattr(other, name) == value for name, value in changes.items())
    whole = torch.nn.Sequential(torch.nn.Identity(), MacenkoNormalizer())
    whole.load_state_dict(reloaded(torch.nn.Sequential(torch.nn.Identity(), fitted).state_dict()))
    np.testing.assert_array_equal(whole[1](B), fitted(B))


def test_settings_that_are_none_are_refused():
    state = MacenkoNormalizer().state_dict()
    for wrong in (torch.tensor([0.5, 1, 0.15, 0]), torch.tensor([240.0, 1, 0.15, 7]), torch.tensor(3.0)):
        with pytest.raises(RuntimeError, match="settings holds no settings of a MacenkoNormalizer"):
            MacenkoNormalizer().load_state_dict({**state, "settings": wrong})
    with pytest.raises(RuntimeError, match="Unexpected key.*other"):
        MacenkoNormalizer().load_state_dict({**state, "other": torch.ones(1)})


def test_options_may_be_set_and_are_checked():
    normalizer = MacenkoNormalizer()
    normalizer.Io, normalizer.on_degenerate = 250, "identity"
    assert normalizer.settings.tolist() == [250, 1, 0.15, 0]
    np.testing.assert_array_equal(normalizer(B), macenko_normalize(B, normalizer.target, Io=250))
    with pytest.raises(ValueError, match="alpha=60"):
        normalizer.alpha = 60


@pytest.mark.parametrize("cast", ["half", "bfloat16", "float"])
@pytest.mark.parametrize("kind", NORMALIZERS)
def test_casts_leave_the_target_in_single_precision_at_least(kind, cast):
    normalizer = kind().fit(A)
    expected = {name: buffer.clone() for name, buffer in normalizer.named_buffers()}
    whole = torch.nn.Sequential(normalizer, torch.nn.Conv2d(3, 3, 1))
    getattr(whole, cast)()
    for name, buffer in normalizer.named_buffers():
        assert buffer.dtype in (torch.float32, torch.float64)
        torch.testing.assert_close(buffer.double(), expected[name], rtol=2.0**-24 if cast == "float" else 0, atol=0)
    assert whole[1].weight.dtype == {"half": torch.half, "bfloat16": torch.bfloat16, "float": torch.float}[cast]


@pytest.mark.parametrize("kind", NORMALIZERS)
def test_the_state_of_a_subclassed_target_is_plain(kind):
    image = batch(A)[0]
    normalizer = kind().fit(image.as_subclass(Tagged))
    state = reloaded(normalizer.state_dict())
    assert all(type(value) is torch.Tensor for value in state.values())
    assert torch.equal(normalizer(image), kind().fit(image)(image))


def test_results_of_a_subclass_are_of_it_and_fits_are_plain():
    plain = batch(A, B[:60, :70])
    images = plain.as_subclass(Tagged)
    target = MacenkoNormalizer().target
    assert all(type(part) is torch.Tensor for part in macenko_fit(images))
    for call in (lambda x: macenko_normalize(x, target), lambda x: separate(x).eosin, MacenkoNormalizer()):
        assert type(call(images)) is Tagged and torch.equal(call(images).as_subclass(torch.Tensor), call(plain))
        assert type(call([images[0]])[0]) is Tagged
    parameter = torch.nn.Parameter(plain.double())
    assert type(macenko_normalize(parameter, target)) is torch.Tensor


def test_status_is_returned_on_request():
    images = batch(A, A * 0 + 255)
    out, status = MacenkoNormalizer()(images, return_status=True)
    assert status.tolist() == [0, 1] and torch.equal(out, MacenkoNormalizer()(images))
    network, status = MacenkoNormalizer(output=torch.float32)(images, return_status=True)
    assert status.tolist() == [0, 1] and network.dtype == torch.float32
    out, status = ReinhardNormalizer().fit(A)(images, return_status=True)
    assert status.tolist() == [0, 0] and out.shape == images.shape


@pytest.mark.parametrize("setting", ["device", "dtype"])
def test_defaults_of_torch_change_nothing(setting):
    """The device "meta" stands for a GPU, which images on the CPU have nothing to do with."""
    images = batch(A, B[:60, :70])
    target, source, colours = macenko_fit(A), macenko_fit(images), reinhard_fit(A)
    normalizer, reinhard = MacenkoNormalizer().fit(A), ReinhardNormalizer().fit(A)

    def everything():
        listed = [images[0], images[1, :, :30]]
        mask = images[:, 0] < 200
        counts = ColourCounts().add(images)
        generator = torch.Generator().manual_seed(1)
        return [
            macenko_normalize(images, target),
            macenko_normalize(images, target, source),
            *macenko_normalize(listed, target),
            *macenko_fit(images, mask=mask),
            *macenko_fit([]),
            macenko_augment(images, generator=generator),
            *separate(images),
            macenko_normalize(images, target, output=torch.bfloat16, mean=(0.5,) * 3, std=(0.2,) * 3),
            *counts.fit(),
            reinhard_normalize(images, colours),
            *normalizer.normalize(images),
            normalizer(images.double()),
            reinhard(images),
            StainAugment(p=1.0, gain=0, shift=0)(images),
        ]

    expected = everything()
    before = torch.get_default_dtype()
    try:
        if setting == "device":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(torch.float64)
        found = everything()
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)
    for a, b in zip(found, expected, strict=True):
        assert a.device == b.device and a.dtype == b.dtype and torch.equal(a.nan_to_num(7), b.nan_to_num(7))


@pytest.mark.parametrize("numpy", [False, True])
def test_interleaved_images_stay_interleaved(numpy):
    """Dense [H, W, 3] results for [H, W, 3] images, alone, in batches and in lists."""
    whole = np.stack([A, A[::-1]])
    cases = [whole, whole[0], [whole[0], np.ascontiguousarray(whole[1][:40])]]
    for case in cases if numpy else [torch.from_numpy(c) if isinstance(c, np.ndarray) else c for c in cases]:
        for result in MacenkoNormalizer(layout="HWC").normalize(case):
            for one in result if isinstance(result, list) else [result]:
                assert one.flags.c_contiguous if isinstance(one, np.ndarray) else one.is_contiguous()
