"""Every public function against what is no RGB image, huge shapes, and drawn images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stain_images import synthetic_tissue
from torch._subclasses.fake_tensor import FakeTensorMode

from ernet_fast import _backend, reference
from ernet_fast.stain import (
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

TARGET = MacenkoNormalizer().target
TISSUE = synthetic_tissue(24, 33, 1)
WHITE = np.full_like(TISSUE, 255)
REINHARD = reinhard_fit(TISSUE)
compiled = pytest.mark.skipif(not _backend.extension_available(), reason="the compiled operators are not built")

FUNCTIONS = {
    "macenko_fit": macenko_fit,
    "macenko_normalize": lambda x, **options: macenko_normalize(x, TARGET, **options),
    "macenko_normalize for a network": lambda x, **options: macenko_normalize(
        x, TARGET, output=torch.float32, **options
    ),
    "macenko_augment": macenko_augment,
    "separate": separate,
    "reinhard_fit": reinhard_fit,
    "reinhard_normalize": lambda x, **options: reinhard_normalize(x, REINHARD, **options),
    "MacenkoNormalizer": lambda x, **options: MacenkoNormalizer(**options)(x),
    "MacenkoNormalizer.normalize": lambda x, **options: MacenkoNormalizer(**options).normalize(x),
    "MacenkoNormalizer.fit": lambda x, **options: MacenkoNormalizer(**options).fit(x),
    "ReinhardNormalizer.fit": lambda x, **options: ReinhardNormalizer(**options).fit(x),
    "StainAugment": lambda x, **options: StainAugment(**options)(x),
}
REFUSED = {
    "grey": (TISSUE[..., 0], ValueError, "grey image"),
    "grey with a channel": (TISSUE[..., :1], ValueError, "grey image"),
    "RGBA": (np.dstack([TISSUE, TISSUE[..., 0]]), ValueError, "alpha channel"),
    "RGBA first": (np.dstack([TISSUE, TISSUE[..., 0]]).transpose(2, 0, 1), ValueError, "alpha channel"),
    "int16": (TISSUE.astype(np.int16), TypeError, r"int16.*uint8"),
    "int64 tensor": (torch.from_numpy(TISSUE).long(), TypeError, r"int64.*uint8"),
    "bool": (TISSUE > 9, TypeError, "bool"),
    "complex": (TISSUE.astype(complex), TypeError, "complex"),
    "object": (TISSUE.astype(object), TypeError, "object"),
    "no pixels": (TISSUE[:0], ValueError, "without pixels"),
    "no columns": (TISSUE[:, :0], ValueError, "without pixels"),
    "five dimensions": (TISSUE[None, None], ValueError, "shape"),
    "ambiguous": (TISSUE[:3], ValueError, "layout='CHW' or 'HWC'"),
    "text": ("image.png", TypeError, "str"),
    "long double": (TISSUE.astype(np.longdouble), TypeError, "expected uint8 or a floating-point type"),
    "masked": (np.ma.masked_greater(TISSUE, 200), TypeError, "masked array; pass its .data"),
    "sparse": (torch.from_numpy(TISSUE).float().to_sparse(), TypeError, "expected a dense one"),
    "in a list": ([TISSUE, TISSUE.astype(np.int16)], TypeError, r"\[1\] has dtype int16"),
    "grey in a list": ([TISSUE, TISSUE[..., 0]], ValueError, r"\[1\] has shape"),
}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_rgb_image_is_refused_everywhere(case, function):
    images, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        FUNCTIONS[function](images)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_layouts_mixed_up_are_refused_everywhere(function):
    for images, layout in ((TISSUE, "CHW"), (TISSUE.transpose(2, 0, 1), "HWC"), (TISSUE[None], "CHW")):
        with pytest.raises(ValueError, match=rf"channels as {layout}; expected 3"):
            FUNCTIONS[function](images, layout=layout)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_wrong_range_is_refused_everywhere(function):
    image = TISSUE.astype(np.float32)
    with pytest.raises(ValueError, match="pass range=255"):
        FUNCTIONS[function](image, range=1)
    with pytest.raises(ValueError, match="pass range=1"):
        FUNCTIONS[function](image / 255)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_read_only_arrays_are_left_alone_everywhere(function, dtype):
    image = TISSUE.astype(dtype)
    kept = image.copy()
    image.flags.writeable = False
    FUNCTIONS[function](image)
    np.testing.assert_array_equal(image, kept)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("shape", [(0, 16, 20, 3), (0, 3, 16, 20)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_empty_batches_give_nothing_everywhere(function, shape, dtype):
    images = np.empty(shape, dtype)
    if function.endswith(".fit"):
        with pytest.raises(ValueError, match="one target image; got 0"):
            FUNCTIONS[function](images)
        return
    found = FUNCTIONS[function](images)
    for part in found if isinstance(found, tuple) else (found,):
        assert len(part) == 0
    if "fit" not in function and function not in ("separate", "MacenkoNormalizer.normalize"):
        assert function.endswith("network") or found.shape == shape


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("level", [0, 90, 255])
def test_one_pixel_is_an_image_everywhere(function, level):
    """It has no stains, so only the fit of a target refuses it; Reinhard's statistics need but one."""
    for images in (np.full((1, 1, 3), level, np.uint8), torch.full((3, 1, 1), float(level), dtype=torch.float64)):
        if function == "MacenkoNormalizer.fit":
            with pytest.raises(ValueError, match="fewer than 10 tissue pixels"):
                FUNCTIONS[function](images)
            continue
        found = FUNCTIONS[function](images)
        if function in ("macenko_normalize", "reinhard_normalize", "macenko_augment"):
            assert found.shape == images.shape and np.isfinite(np.asarray(found)).all()


@pytest.mark.parametrize("function", [name for name in FUNCTIONS if "fit" not in name and "separate" not in name])
def test_one_white_tile_changes_no_other_anywhere(function):
    call = FUNCTIONS[function]
    good = np.stack([TISSUE, TISSUE[::-1]])
    with_white = np.stack([TISSUE, TISSUE[::-1], WHITE])
    torch.manual_seed(0)
    expected = call(good)
    torch.manual_seed(0)
    found = call(with_white)
    if not isinstance(found, tuple):
        found, expected = (found,), (expected,)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(a[:2]), np.asarray(b))


@compiled
def test_shapes_beyond_two_to_the_31():
    """One image of 2.5e9 pixels as shapes alone, and a batch whose elements are counted beyond 32 bits."""
    with FakeTensorMode():
        images = torch.empty((1, 3, 50000, 50000), dtype=torch.uint8)
        stains = torch.empty((1, 3, 2), dtype=torch.float64), torch.empty((1, 2), dtype=torch.float64)
        out, stain, maximum, status = torch.ops.ernet.macenko_normalize(images, *stains, 240.0, 1.0, 0.15, False, False)
        assert out.shape == images.shape and out.numel() > 2**31
        assert (stain.shape, maximum.shape, status.shape) == ((1, 3, 2), (1, 2), (1,))
        network = torch.ops.ernet.macenko_reconstruct(images, *stains, *stains, 240.0, dtype=torch.bfloat16)
        assert network.shape == (1, 50000, 50000, 3)
    tile = torch.from_numpy(np.tile(TISSUE, (40, 30, 1))).permute(2, 0, 1)[None]
    many = tile.expand(2**31 // tile.numel() + 1, -1, -1, -1)
    assert many.numel() > 2**31
    for found, expected in zip(macenko_fit(many), macenko_fit(tile), strict=True):
        assert torch.equal(found, expected.expand_as(found))


@st.composite
def drawn_images(draw):
    """A batch [B, H, W, 3] of tissue, noise, few colours, one colour or white, sometimes with an undefined value."""
    height, width, count = draw(st.integers(1, 40)), draw(st.integers(1, 40)), draw(st.integers(1, 3))
    dtype = draw(st.sampled_from([np.uint8, np.float32, np.float64]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    images = []
    for kind in draw(st.lists(st.sampled_from("tnfow"), min_size=count, max_size=count)):
        if kind == "t":
            image = synthetic_tissue(height, width, int(rng.integers(100)))
        elif kind == "n":
            image = rng.integers(0, 256, (height, width, 3))
        elif kind == "f":
            palette = rng.integers(0, 256, (4, 3))
            image = palette[rng.integers(0, 4, (height, width))]
        else:
            image = np.broadcast_to(rng.integers(0, 256, 3) if kind == "o" else 255, (height, width, 3))
        images.append(np.array(image, dtype=dtype))
    batch = np.stack(images)
    if dtype != np.uint8 and draw(st.booleans()):
        value = draw(st.sampled_from([np.nan, np.inf, -np.inf, -1.0, -7.0, 300.0]))
        batch[tuple(int(rng.integers(size)) for size in batch.shape)] = value
    return batch


def in_form(batch, channels_first, contiguous, as_tensor):
    """The batch in one of its layouts, kinds of array and strides."""
    if channels_first:
        batch = batch.transpose(0, 3, 1, 2)
    batch = np.ascontiguousarray(batch) if contiguous else np.repeat(batch, 2, axis=1 + channels_first)
    batch = batch if contiguous else batch[:, :, ::2] if channels_first else batch[:, ::2]
    return torch.from_numpy(batch) if as_tensor else batch


fuzz = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@fuzz
@given(drawn_images(), st.booleans(), st.booleans(), st.booleans(), st.sampled_from(["reference", "identity"]))
def test_drawn_images_in_drawn_forms(batch, channels_first, contiguous, as_tensor, policy):
    """Statuses are the reference's, results the reference's for the same stains, and inputs stay as they are."""
    floating = batch.dtype != np.uint8
    with np.errstate(invalid="ignore"):
        refused = floating and 0 < np.max(batch) <= 1
    if refused:
        return
    images = in_form(batch, channels_first, contiguous, as_tensor)
    kept = np.asarray(images).copy()
    layout = "CHW" if channels_first else "HWC"
    fit = macenko_fit(images, layout=layout)
    wanted = reference.macenko_fit(images, layout=layout)
    assert fit.status.tolist() == wanted.status.tolist()
    assert fit.stain_matrix.isfinite().all(dim=(1, 2)).tolist() == (fit.status == 0).tolist()
    out, status = macenko_normalize(images, TARGET, layout=layout, on_degenerate=policy, return_status=True)
    assert status.tolist() == fit.status.tolist()
    assert type(out) is type(images) and out.dtype == images.dtype and out.shape == images.shape
    expected = np.asarray(reference.macenko_normalize(images, TARGET, fit, layout=layout, on_degenerate=policy))
    if floating:
        # The exponents of a strange image are larger than those of tissue, and float32 rounds them.
        np.testing.assert_allclose(np.asarray(out), expected, rtol=1e-4, atol=1e-30)
    else:
        assert np.abs(np.asarray(out).astype(int) - expected).max() <= 1
    for i in range(len(batch)):
        alone = macenko_normalize(images[i : i + 1], TARGET, layout=layout, on_degenerate=policy)
        np.testing.assert_array_equal(np.asarray(alone[0]), np.asarray(out[i]))
    macenko_augment(images, layout=layout)
    separate(images, layout=layout)
    reinhard_normalize(images, REINHARD, layout=layout)
    np.testing.assert_array_equal(np.asarray(images), kept)


@st.composite
def drawn_list(draw):
    """Images of several sizes, kinds and layouts, each with a mask."""
    images, masks = [], []
    for _ in range(draw(st.integers(0, 5))):
        height, width, seed = draw(st.integers(1, 30)), draw(st.integers(1, 30)), draw(st.integers(0, 99))
        rng = np.random.default_rng(seed)
        white = draw(st.booleans())
        image = np.full((height, width, 3), 255, np.uint8) if white else synthetic_tissue(height, width, seed)
        image = image.astype(draw(st.sampled_from([np.uint8, np.float32])))
        # A side of 3 fits both layouts, which the list as a whole cannot say.
        if 3 not in image.shape[:2] and draw(st.booleans()):
            image = np.ascontiguousarray(image.transpose(2, 0, 1))
        elif 3 in image.shape[:2]:
            image = np.pad(image, ((0, 4 if height == 3 else 0), (0, 4 if width == 3 else 0), (0, 0)), mode="edge")
        rows, columns = image.shape[1:] if image.shape[0] == 3 else image.shape[:2]
        masks.append(rng.random((rows, columns)) < draw(st.sampled_from([0.0, 0.3, 1.0])))
        images.append(torch.from_numpy(image) if draw(st.booleans()) else image)
    return images, masks


@fuzz
@given(drawn_list(), st.booleans(), st.sampled_from(["reference", "identity"]))
def test_drawn_lists_and_masks_give_what_each_image_gives_alone(drawn, masked, policy):
    images, masks = drawn
    if any(image.dtype in (np.float32, torch.float32) and np.asarray(image).max() <= 1 for image in images):
        return
    kept = [np.asarray(image).copy() for image in images]
    found, status = macenko_normalize(
        images, TARGET, mask=masks if masked else None, on_degenerate=policy, return_status=True
    )
    fit = macenko_fit(images, mask=masks if masked else None)
    assert len(found) == len(images) and fit.status.tolist() == status.tolist()
    for i, (image, mask) in enumerate(zip(images, masks, strict=True)):
        alone = macenko_normalize(image, TARGET, mask=mask if masked else None, on_degenerate=policy)
        assert type(found[i]) is type(image) and found[i].dtype == image.dtype and found[i].shape == image.shape
        np.testing.assert_array_equal(np.asarray(found[i]), np.asarray(alone))
        np.testing.assert_array_equal(np.asarray(image), kept[i])
