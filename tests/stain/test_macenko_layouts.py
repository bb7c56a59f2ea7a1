"""What may be passed in, and what comes back: arrays, tensors, layouts, strides, dtypes."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from stain_images import batch, synthetic_tissue

from ernet_fast import _backend, reference
from ernet_fast.stain import (
    MacenkoFit,
    MacenkoNormalizer,
    MacenkoStatus,
    macenko_augment,
    macenko_fit,
    macenko_normalize,
    macenko_normalize_slide,
    separate,
)

TARGET = MacenkoNormalizer().target
IMAGE = synthetic_tissue(31, 43, 7)
EXPECTED = macenko_normalize(batch(IMAGE), TARGET)[0].permute(1, 2, 0).numpy()


def hwc(result):
    """A result of any form as an array [H, W, 3]."""
    result = np.asarray(result)
    result = result[0] if result.ndim == 4 else result
    return result if result.shape[-1] == 3 else result.transpose(1, 2, 0)


FORMS = {
    "numpy HWC": lambda: IMAGE,
    "numpy CHW": lambda: np.ascontiguousarray(IMAGE.transpose(2, 0, 1)),
    "numpy HWC batch": lambda: IMAGE[None],
    "numpy CHW view": lambda: IMAGE.transpose(2, 0, 1),
    "tensor CHW": lambda: batch(IMAGE)[0],
    "tensor HWC": lambda: torch.from_numpy(IMAGE),
    "tensor batch": lambda: batch(IMAGE),
    "tensor batch channels-last": lambda: batch(IMAGE).to(memory_format=torch.channels_last),
    "tensor NHWC batch": lambda: torch.from_numpy(IMAGE)[None],
    "rows of a larger tensor": lambda: torch.from_numpy(np.pad(IMAGE, ((4, 2), (0, 0), (0, 0))))[4:-2],
    "columns of a larger tensor": lambda: torch.from_numpy(np.pad(IMAGE, ((0, 0), (5, 1), (0, 0))))[:, 5:-1],
    "every other pixel": lambda: torch.from_numpy(IMAGE.repeat(2, 0).repeat(2, 1))[::2, ::2],
    "rows of a planar tensor": lambda: batch(np.pad(IMAGE, ((4, 2), (0, 0), (0, 0))))[:, :, 4:-2],
    "rows of planes": lambda: batch(np.pad(IMAGE, ((4, 2), (0, 0), (0, 0))))[0, :, 4:-2],
    "every other plane": lambda: batch(IMAGE).repeat_interleave(2, dim=1)[:, ::2],
    "RGBA view": lambda: torch.from_numpy(np.dstack([IMAGE, IMAGE[..., 0]]))[..., :3],
    "planes of a CHW RGBA": lambda: torch.from_numpy(np.dstack([IMAGE, IMAGE[..., 0]]))
    .permute(2, 0, 1)
    .contiguous()[:3],
    "transposed": lambda: torch.from_numpy(IMAGE.transpose(1, 0, 2).copy()).transpose(0, 1),
    "reversed numpy rows": lambda: IMAGE[::-1].copy()[::-1],
    "reversed numpy channels": lambda: IMAGE[..., ::-1].copy()[..., ::-1],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_values_and_its_own_form(form):
    images = FORMS[form]()
    kept = np.asarray(images).copy()
    out = macenko_normalize(images, TARGET)
    assert type(out) is type(images)
    assert out.dtype == images.dtype
    assert tuple(out.shape) == tuple(images.shape)
    np.testing.assert_array_equal(hwc(out), EXPECTED)
    np.testing.assert_array_equal(np.asarray(images), kept)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("policy", ["reference", "identity"])
def test_bytes_on_the_cpu_take_the_short_way(form, policy, monkeypatch):
    """The bits, the form and the memory layout of the general way, which a call that also wants the status takes."""
    images, white = FORMS[form](), np.full((1, 3, 5, 7), 255, np.uint8)
    normalizer = MacenkoNormalizer(on_degenerate=policy)
    calls = {
        "function": lambda x, **more: macenko_normalize(x, TARGET, on_degenerate=policy, **more),
        "module": normalizer,
    }
    expected = {name: [call(x, return_status=True)[0] for x in (images, white)] for name, call in calls.items()}
    if _backend.extension_available():
        monkeypatch.setattr("ernet_fast.stain.pipeline.read", None)
    for name, call in calls.items():
        for x, general in zip((images, white), expected[name], strict=True):
            found = call(x)
            assert type(found) is type(general)
            np.testing.assert_array_equal(np.asarray(found), np.asarray(general))
            assert np.asarray(found).strides == np.asarray(general).strides


@pytest.mark.parametrize(
    ("target", "options"),
    [
        (MacenkoFit(*(part[0] for part in TARGET)), {}),  # without a dimension for images
        (TARGET._replace(stain_matrix=TARGET.stain_matrix.float()), {}),
        (TARGET._replace(stain_matrix=TARGET.stain_matrix.clone().requires_grad_()), {}),
        (TARGET, {"on_degenerate": "raise"}),
        (TARGET, {"output": torch.float32}),
        (TARGET, {"mask": np.ones(IMAGE.shape[:2], bool)}),
    ],
)
def test_what_the_short_way_leaves_to_the_general_one(target, options):
    found = macenko_normalize(IMAGE, target, **options)
    general, _ = macenko_normalize(IMAGE, target, return_status=True, **options)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(general))
    if "output" not in options:  # stains in float32 round a level here and there
        assert np.abs(hwc(found).astype(int) - EXPECTED).max() <= 1


def test_read_only_arrays_are_read_without_a_warning():
    image = IMAGE.copy()
    image.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = macenko_normalize(image, TARGET)
    np.testing.assert_array_equal(out, EXPECTED)
    assert out.flags.writeable and not np.shares_memory(out, image)


@pytest.mark.parametrize("step", [2, 3])
def test_strided_batches_are_read_in_place(step):
    images = batch(*(synthetic_tissue(20, 30, seed) for seed in range(6)))
    out = macenko_normalize(images[::step], TARGET)
    assert torch.equal(out, macenko_normalize(images[::step].clone(), TARGET))


def test_ambiguous_shapes_need_a_layout():
    square = synthetic_tissue(64, 64, 1)[:3]  # [3, 64, 3]
    with pytest.raises(ValueError, match="layout='CHW' or 'HWC'"):
        macenko_fit(square)
    assert macenko_fit(square, layout="HWC").status.shape == (1,)
    assert macenko_fit(np.stack([square] * 2), layout="CHW").status.shape == (2,)
    normalizer = MacenkoNormalizer(layout="HWC")
    assert normalizer(square).shape == square.shape


def test_empty_batch_gives_an_empty_batch():
    for shape in ((0, 3, 16, 16), (0, 16, 16, 3)):
        for images in (torch.empty(shape, dtype=torch.uint8), np.empty(shape, dtype=np.float32)):
            out, status = macenko_normalize(images, TARGET, return_status=True)
            assert tuple(out.shape) == shape and tuple(status.shape) == (0,)
            fit = macenko_fit(images)
            assert tuple(fit.stain_matrix.shape) == (0, 3, 2) and tuple(fit.max_concentration.shape) == (0, 2)


REFUSED = [
    (np.zeros((16, 16), np.uint8), ValueError, "grey image"),
    (np.zeros((16, 16, 1), np.uint8), ValueError, "grey image"),
    (np.zeros((16, 16, 4), np.uint8), ValueError, "alpha channel"),
    (np.zeros((4, 16, 16), np.uint8), ValueError, "alpha channel"),
    (np.zeros((16, 16, 5), np.uint8), ValueError, "3 channels"),
    (np.zeros((0, 16, 3), np.uint8), ValueError, "without pixels"),
    (torch.zeros((2, 3, 0, 5)), ValueError, "without pixels"),
    (np.zeros((2, 2, 3, 16, 16), np.uint8), ValueError, "shape"),
    (np.zeros((16, 16, 3), np.int16), TypeError, r"int16.*uint8"),
    (np.zeros((16, 16, 3), bool), TypeError, "bool"),
    (np.zeros((16, 16, 3), ">f4"), TypeError, "byte order"),
    (torch.zeros((3, 16, 16), dtype=torch.int32), TypeError, "int32"),
    (torch.zeros((3, 16, 16), dtype=torch.complex64), TypeError, "complex64"),
    ([[1, 2, 3]], TypeError, "list"),
    (None, TypeError, "NoneType"),
]


@pytest.mark.parametrize(("images", "error", "message"), REFUSED)
def test_what_is_no_rgb_image_is_refused_with_a_reason(images, error, message):
    for call in (macenko_fit, lambda x: macenko_normalize(x, TARGET), MacenkoNormalizer().fit, MacenkoNormalizer()):
        with pytest.raises(error, match=message):
            call(images)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"Io": 0}, ValueError, "Io=0"),
        ({"Io": float("nan")}, ValueError, "Io"),
        ({"Io": "240"}, TypeError, "Io"),
        ({"alpha": 50}, ValueError, "alpha=50"),
        ({"alpha": -1}, ValueError, "alpha=-1"),
        ({"beta": -0.1}, ValueError, "beta"),
        ({"beta": 6}, ValueError, "beta=6"),
        ({"percentile": "median"}, ValueError, "'linear', 'nearest'"),
        ({"on_degenerate": "ignore"}, ValueError, "'reference', 'identity', 'raise'"),
        ({"range": 0}, ValueError, "range=0"),
        ({"layout": "CWH"}, ValueError, "'CHW', 'HWC'"),
    ],
)
def test_parameters_are_checked(options, error, message):
    with pytest.raises(error, match=message):
        macenko_normalize(IMAGE, TARGET, **options)


def test_target_is_checked():
    with pytest.raises(TypeError, match="MacenkoFit"):
        macenko_normalize(IMAGE, TARGET.stain_matrix)
    with pytest.raises(ValueError, match=r"target has stain_matrix \(1, 2, 3\)"):
        macenko_normalize(IMAGE, TARGET._replace(stain_matrix=TARGET.stain_matrix.mT))
    with pytest.raises(ValueError, match="B = 1 or 2"):
        three = type(TARGET)(*(torch.cat([part] * 3) for part in TARGET))
        macenko_normalize(batch(IMAGE, IMAGE), three)
    with pytest.raises(ValueError, match="fewer than 10 tissue pixels"):
        macenko_normalize(IMAGE, macenko_fit(np.full((20, 20, 3), 255, np.uint8)))
    single = type(TARGET)(TARGET.stain_matrix[0], TARGET.max_concentration[0], TARGET.status[0])
    np.testing.assert_array_equal(macenko_normalize(IMAGE, single), EXPECTED)


def spoilt(**parts):
    return TARGET._replace(**{name: torch.tensor([value], dtype=torch.float64) for name, value in parts.items()})


SPOILT = [
    (spoilt(max_concentration=[1.0, float("nan")]), "is not finite, though its status is OK"),
    (spoilt(stain_matrix=[[float("inf"), 0.1], [0.7, 0.9], [0.3, 0.1]]), "is not finite"),
    (spoilt(max_concentration=[0.0, 1.0]), "has max_concentration .*expected positive"),
    (spoilt(max_concentration=[1.0, -1.0]), "has max_concentration"),
    (spoilt(stain_matrix=[[0.6, 0.3], [0.6, 0.3], [0.6, 0.3]]), "has two columns of one direction"),
]


@pytest.mark.parametrize(("source", "message"), SPOILT)
def test_given_sources_are_checked(source, message):
    for call in (
        lambda: macenko_normalize(IMAGE, TARGET, source),
        lambda: macenko_normalize(IMAGE.astype(np.float32), TARGET, source, output=torch.float32),
        lambda: MacenkoNormalizer().normalize(IMAGE, source=source),
        lambda: macenko_augment(IMAGE, source),
        lambda: separate(IMAGE, source),
        lambda: macenko_normalize_slide(IMAGE, np.empty_like(IMAGE), TARGET, source),
    ):
        with pytest.raises(ValueError, match=f"source of image 0 {message}"):
            call()
    several = type(TARGET)(*(torch.cat(parts) for parts in zip(TARGET, source, strict=True)))
    with pytest.raises(ValueError, match="source of image 1"):
        macenko_normalize(batch(IMAGE, IMAGE), TARGET, several)
    several.status[1] = MacenkoStatus.RANK_DEFICIENT  # then it is not looked at
    out = macenko_normalize(batch(IMAGE, IMAGE), TARGET, several)
    assert torch.equal(out[1], macenko_normalize(batch(IMAGE), TARGET, TARGET)[0])


def test_numbers_of_numpy_are_numbers():
    numbers = {"Io": np.int64(240), "alpha": np.float32(1), "beta": np.float64(0.15), "range": np.uint8(255)}
    np.testing.assert_array_equal(macenko_normalize(IMAGE, TARGET, **numbers), EXPECTED)
    np.testing.assert_array_equal(MacenkoNormalizer(**numbers)(IMAGE), EXPECTED)
    for wrong in (True, np.True_, "240", None, 240j):
        with pytest.raises(TypeError, match="Io is"):
            macenko_normalize(IMAGE, TARGET, Io=wrong)


def test_stated_range_is_held_against_the_values():
    image = IMAGE.astype(np.float32)
    with pytest.raises(ValueError, match="pass range=255"):
        macenko_normalize(image, TARGET, range=1)
    with pytest.raises(ValueError, match="pass range=1"):
        macenko_normalize(image / 255, TARGET)
    with pytest.raises(ValueError, match="image 1 holds values up to .*pass range=255"):
        macenko_normalize([image / 255, image[:20]], TARGET, range=1)
    with pytest.raises(ValueError, match="pass range=1"):
        macenko_normalize([image / 255, image[:20] / 255], TARGET)


@pytest.mark.parametrize("height", [31, 20])
def test_a_nearly_black_float_tile_stops_no_other(height):
    """Its values alone would contradict the range; among others it is dark."""
    image = IMAGE.astype(np.float32)
    dark = np.random.default_rng(0).random((height, 43, 3), dtype=np.float32)
    with pytest.raises(ValueError, match="pass range=1"):
        macenko_normalize(dark, TARGET)
    found = macenko_normalize([image, dark], TARGET)
    np.testing.assert_array_equal(found[0], macenko_normalize(image, TARGET))
    expected, status = reference.macenko_normalize(dark, TARGET, return_status=True)
    assert macenko_fit([dark, image]).status.tolist() == [int(status[0]), 0]
    np.testing.assert_allclose(found[1], expected, rtol=1e-4, atol=1e-30)
