"""Stains of whole slides from their colours, and normalisation strip by strip."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from stain_images import load, real_parameters, synthetic_parameters, synthetic_tissue

from ernet_fast import _backend
from ernet_fast.reference import macenko as reference
from ernet_fast.stain import ColourCounts, MacenkoNormalizer, MacenkoStatus, macenko_fit, macenko_normalize
from ernet_fast.stain import macenko_normalize_slide as normalize_slide

compiled = pytest.mark.skipif(not _backend.extension_available(), reason="the compiled operators are not built")
TARGET = MacenkoNormalizer().target
SLIDE = synthetic_tissue(150, 211, 3)
WHITE = np.full_like(SLIDE, 255)
OPTIONS = [
    {},
    {"percentile": "nearest"},
    {"Io": 255, "alpha": 5, "beta": 0.3},
    {"Io": 250, "alpha": 0, "beta": 0.0, "percentile": "nearest"},
]


def assert_same_fit(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.nan_to_num(-1), b.nan_to_num(-1))


def cut(image, height, width):
    return [
        image[y : y + height, x : x + width]
        for y in range(0, len(image), height)
        for x in range(0, len(image[0]), width)
    ]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("parameter", [*real_parameters()[:2], *synthetic_parameters()[:3]])
def test_colours_give_the_fit_of_the_image(parameter, options):
    image = load(parameter)
    assert_same_fit(ColourCounts().add(image).fit(**options), macenko_fit(image, **options))


def test_any_cut_into_tiles_gives_the_same():
    whole = macenko_fit(SLIDE)
    for height, width in ((1, 211), (64, 64), (37, 50)):
        assert_same_fit(ColourCounts().add(cut(SLIDE, height, width)).fit(), whole)
    parts = [ColourCounts(), ColourCounts()]
    for i, tile in enumerate(cut(SLIDE, 40, 60)):
        parts[i % 2].add(torch.from_numpy(tile.copy()).permute(2, 0, 1))
    both = parts[0].merge(parts[1])
    assert_same_fit(both.fit(), whole)
    assert both.pixels == 150 * 211
    assert repr(both) == f"ColourCounts(pixels=31650, colours={len(np.unique(SLIDE.reshape(-1, 3), axis=0))})"


def test_masks_choose_the_pixels():
    mask = np.random.default_rng(0).random(SLIDE.shape[:2]) < 0.4
    expected = macenko_fit(SLIDE, mask=mask)
    assert_same_fit(ColourCounts().add(SLIDE, mask=mask).fit(), expected)
    nothing = ColourCounts().add(SLIDE, mask=np.zeros_like(mask))
    assert nothing.pixels == 0 and nothing.fit().status.tolist() == [MacenkoStatus.TOO_FEW_TISSUE_PIXELS]


@pytest.mark.parametrize(
    "image",
    [WHITE, np.zeros_like(SLIDE), np.full_like(SLIDE, 90), np.where(np.arange(211)[:, None] < 1, SLIDE[:, :1], 255)],
    ids=["white", "black", "one colour", "little tissue"],
)
def test_slides_without_a_fit_have_the_status_of_the_image(image):
    image = np.ascontiguousarray(image, dtype=np.uint8)
    fit = macenko_fit(image)
    assert fit.status[0] != MacenkoStatus.OK
    assert_same_fit(ColourCounts().add(image).fit(), fit)


@pytest.mark.parametrize("options", OPTIONS)
def test_reference_of_colours_is_the_reference_of_the_pixels(options):
    numbers = {"Io": 240, "alpha": 1, "beta": 0.15, "percentile": "linear", **options}
    pixels = SLIDE.reshape(-1, 3)
    colours, counts = np.unique(pixels, axis=0, return_counts=True)
    found = reference.fit_pixels(colours.astype(float), counts, **numbers)
    expected = reference.fit_pixels(pixels.astype(float), **numbers)
    # The same sums in another order, over 31650 pixels.
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=31650 * np.finfo(float).eps)
    for image in (WHITE, np.full_like(SLIDE, 90), np.zeros_like(SLIDE)):
        colours, counts = np.unique(image.reshape(-1, 3), axis=0, return_counts=True)
        status = reference.fit_pixels(image.reshape(-1, 3).astype(float), **numbers)[2]
        assert reference.fit_pixels(colours.astype(float), counts, **numbers)[2] == status != MacenkoStatus.OK


def test_without_the_extension_colours_are_counted_and_fitted_in_numpy():
    code = """
import numpy as np, warnings
warnings.simplefilter("ignore")
from stain_images import synthetic_tissue
from ernet_fast.stain import ColourCounts, macenko_fit
image = synthetic_tissue(40, 50, 1)
found, expected = ColourCounts().add(image).fit(), macenko_fit(image)
assert np.allclose(found.stain_matrix, expected.stain_matrix, rtol=1e-9), found
assert np.allclose(found.max_concentration, expected.max_concentration, rtol=1e-9), found
assert ColourCounts().add(np.full_like(image, 255)).fit().status.tolist() == [1]
"""
    env = {
        **os.environ,
        "ERNET_DISABLE_EXTENSION": "1",
        "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)]),
    }
    subprocess.run([sys.executable, "-c", code], check=True, env=env)


def test_what_is_no_tile_is_refused():
    with pytest.raises(TypeError, match=r"float32; colours are counted of uint8.*macenko_fit"):
        ColourCounts().add(SLIDE.astype(np.float32))
    with pytest.raises(ValueError, match="grey image"):
        ColourCounts().add(SLIDE[..., 0])
    with pytest.raises(ValueError, match="alpha"):
        ColourCounts().fit(alpha=60)


@compiled
def test_opcheck_of_the_operators():
    images = torch.from_numpy(SLIDE).permute(2, 0, 1)[None]
    counts = ColourCounts().add(SLIDE).counts
    torch.library.opcheck(torch.ops.ernet.macenko_fit_colours, (counts, 240.0, 1.0, 0.15, False))
    torch.library.opcheck(torch.ops.ernet.macenko_count_colours, (images, torch.zeros_like(counts)))
    for wrong in (counts[:-1], counts.int(), counts[None]):
        with pytest.raises(RuntimeError, match=r"counts must be \[16777216\] int64"):
            torch.ops.ernet.macenko_fit_colours(wrong, 240.0, 1.0, 0.15, False)
    with pytest.raises(RuntimeError, match="must be uint8"):
        torch.ops.ernet.macenko_count_colours(images.float(), counts)


@pytest.mark.parametrize("rows", [1, 7, 150, 1000, None])
@pytest.mark.parametrize("channels_first", [False, True])
def test_equals_the_one_call(channels_first, rows):
    slide = np.ascontiguousarray(SLIDE.transpose(2, 0, 1)) if channels_first else SLIDE
    kept = slide.copy()
    out = np.zeros_like(slide)
    fit = normalize_slide(slide, out, TARGET, rows=rows)
    expected, status = macenko_normalize(slide, TARGET, return_status=True)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(slide, kept)
    assert_same_fit(fit, macenko_fit(slide))
    assert status.tolist() == fit.status.tolist()


def test_memory_maps_chunked_arrays_tensors_and_in_place(tmp_path):
    expected = macenko_normalize(SLIDE, TARGET)

    class Chunked:  # what HDF5 and Zarr data sets offer
        def __init__(self, array):
            self.array, self.shape, self.dtype = array, array.shape, array.dtype

        def __getitem__(self, where):
            return self.array[where].copy()

        def __setitem__(self, where, values):
            self.array[where] = values

    np.save(tmp_path / "slide.npy", SLIDE)
    slide = np.load(tmp_path / "slide.npy", mmap_mode="r")
    out = np.lib.format.open_memmap(tmp_path / "out.npy", "w+", np.uint8, SLIDE.shape)
    normalize_slide(slide, out, TARGET, rows=16)
    out.flush()
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), expected)

    chunked = Chunked(np.zeros_like(SLIDE))
    normalize_slide(Chunked(SLIDE), chunked, TARGET, rows=64)
    np.testing.assert_array_equal(chunked.array, expected)

    tensor = torch.from_numpy(SLIDE.copy())
    normalize_slide(tensor, tensor, TARGET, rows=20)
    np.testing.assert_array_equal(tensor.numpy(), expected)

    private = np.load(tmp_path / "slide.npy", mmap_mode="c")
    normalize_slide(private, private, TARGET, rows=20)
    np.testing.assert_array_equal(private, expected)
    np.testing.assert_array_equal(np.load(tmp_path / "slide.npy"), SLIDE)


def test_known_stains_masks_and_progress():
    seen = []
    mask = np.random.default_rng(0).random(SLIDE.shape[:2]) < 0.5
    out = np.zeros_like(SLIDE)
    normalize_slide(SLIDE, out, TARGET, mask=mask, rows=60, progress=lambda *steps: seen.append(steps))
    np.testing.assert_array_equal(out, macenko_normalize(SLIDE, TARGET, mask=mask))
    assert seen == [(60, 300), (120, 300), (150, 300), (210, 300), (270, 300), (300, 300)]
    source = macenko_fit(synthetic_tissue(50, 60, 9))
    seen.clear()
    assert_same_fit(normalize_slide(SLIDE, out, TARGET, source, rows=100, progress=lambda *s: seen.append(s)), source)
    np.testing.assert_array_equal(out, macenko_normalize(SLIDE, TARGET, source))
    assert seen == [(100, 150), (150, 150)]


def test_slides_without_tissue_follow_the_policy():
    out = np.zeros_like(WHITE)
    for policy in ("reference", "identity"):
        assert normalize_slide(WHITE, out, TARGET, on_degenerate=policy).status.tolist() == [1]
        np.testing.assert_array_equal(out, macenko_normalize(WHITE, TARGET, on_degenerate=policy))
    out[:] = 7
    with pytest.raises(ValueError, match="image 0: fewer than 10 tissue pixels"):
        normalize_slide(WHITE, out, TARGET, on_degenerate="raise")
    assert (out == 7).all()


READ_ONLY = SLIDE.copy()
READ_ONLY.flags.writeable = False


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((SLIDE.tolist(), SLIDE), TypeError, "slide is a list"),
        ((SLIDE.astype(np.float32), SLIDE), TypeError, "slide has dtype float32.*macenko_normalize"),
        ((SLIDE[None], SLIDE[None]), ValueError, "expected one image"),
        ((SLIDE[..., :1], SLIDE[..., :1]), ValueError, "grey image"),
        ((SLIDE[:, :0], SLIDE[:, :0]), ValueError, "without pixels"),
        ((SLIDE, SLIDE[:-1].copy()), ValueError, r"out has shape \(149, 211, 3\)"),
        ((SLIDE, SLIDE.astype(np.int16)), ValueError, "out has .*dtype int16"),
        ((SLIDE, "out.npy"), TypeError, "out is a str"),
        ((SLIDE, READ_ONLY), ValueError, "out is read-only"),
        ((SLIDE[:-1], SLIDE[1:]), ValueError, "out overlaps slide"),
    ],
)
def test_arguments_are_checked(arguments, error, message):
    with pytest.raises(error, match=message):
        normalize_slide(*arguments, TARGET)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rows": 0}, ValueError, "rows=0"),
        ({"rows": 2.5}, ValueError, "rows=2.5"),
        ({"layout": "CHW"}, ValueError, "150 channels as CHW"),
        ({"mask": np.ones((3, 3), bool)}, ValueError, r"mask has shape \(3, 3\)"),
        ({"mask": np.ones(SLIDE.shape[:2])}, ValueError, "mask has .*float64"),
        ({"mask": np.ones(SLIDE.shape[:2], bool), "source": TARGET}, ValueError, "pass one of the two"),
        ({"on_degenerate": "skip"}, ValueError, "on_degenerate"),
    ],
)
def test_options_are_checked(options, error, message):
    with pytest.raises(error, match=message):
        normalize_slide(SLIDE, np.zeros_like(SLIDE), TARGET, **options)


SLIDES_IN_TURN = """
import mmap, sys
import numpy as np
from stain_images import synthetic_tissue
from ernet_fast.stain import MacenkoNormalizer, macenko_normalize_slide

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

strip = np.tile(synthetic_tissue(256, 512, 1), (1, 4, 1))
for height in (256, 2048, 16384):
    shape = (height, 2048, 3)
    slide = np.lib.format.open_memmap(f"{sys.argv[1]}/in{height}.npy", "w+", np.uint8, shape)
    out = np.lib.format.open_memmap(f"{sys.argv[1]}/out{height}.npy", "w+", np.uint8, shape)
    for y in range(0, height, 256):
        slide[y : y + 256] = strip
        slide.base.madvise(mmap.MADV_DONTNEED)
    macenko_normalize_slide(slide, out, MacenkoNormalizer().target, rows=64)
    print(peak())
    assert (out[:256] == out[-256:]).all() and not (out[:256] == strip).all()
"""


@compiled
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak of the memory in use from /proc")
def test_memory_does_not_grow_with_the_slide(tmp_path):
    """The peak of all memory of the process, mapped pages of files included, for a slide and one eight times as high.

    Strips are of 64 rows, 0.4 MB; the larger slide and its result are 200 MB, of which 1/25 may show.
    """
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])}
    command = [sys.executable, "-c", SLIDES_IN_TURN, str(tmp_path)]
    done = subprocess.run(command, check=True, env=env, capture_output=True, text=True)
    _, small, large = map(int, done.stdout.split())
    assert large - small < 8 << 20
