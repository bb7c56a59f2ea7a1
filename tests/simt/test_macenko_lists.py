"""Order statistics from a list that a sample points to: the same bits as by counts of all keys, on any image.

The streaming plan counts all keys, so it tells what must come out. How often a list served or failed is recorded by the
emulator: each of the two ways is known to be taken.
"""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from emulator import Emulator, pointer
from kernel_images import channels_last, degenerate, stack, tissue
from stain_images import load, real_images, synthetic_tissue

CLUSTERS = [("resident", 1), ("cluster", 2), ("cluster", 8)]
DEFAULT = 240.0, 1.0, 0.15, False


def assert_same_fit(found, expected):
    for part, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(part, other)


def fit_in_every_cluster(library, images, parameters=DEFAULT, **changes):
    """Compares the fits of every size of cluster with those of the streaming plan; returns what each has listed."""
    expected = Emulator(library, 1).fit(images, parameters)
    lists = []
    for seed, (kind, blocks) in enumerate(CLUSTERS):
        emulator = Emulator(library, 30 + seed)
        plan = emulator.choose_plan(images, kind, blocks)._replace(**changes)
        assert_same_fit(emulator.fit(images, parameters, plan=plan), expected)
        lists.append(emulator.lists())
    return lists


def sampled_pixels(library, pixels):
    """Positions that the sample of an image in one block takes."""
    lib = ctypes.CDLL(str(library))
    lib.simt_sample_step.restype = lib.simt_sampled_pixel.restype = ctypes.c_int64
    step = lib.simt_sample_step(ctypes.c_int64(pixels))
    found = [lib.simt_sampled_pixel(ctypes.c_int64(k), ctypes.c_int64(step)) for k in range(-(-pixels // step))]
    assert step > 1
    return np.array([pixel for pixel in found if pixel < pixels])


def test_a_sample_takes_one_pixel_of_every_stratum(simt_library):
    found = sampled_pixels(simt_library, 100 * 100)
    np.testing.assert_array_equal(found // 16, np.arange(len(found)))
    assert len(found) >= 10000 // 16
    assert len(set(found % 16)) == 16  # no lattice


@pytest.mark.parametrize("nearest", [False, True])
def test_lists_serve_ordinary_tissue(simt_library, nearest):
    images = tissue(97, 90, 2)
    for laid_out in (images, channels_last(images)):
        for lists in fit_in_every_cluster(simt_library, laid_out, (240.0, 1.0, 0.15, nearest)):
            assert (lists.rounds, lists.missed) == (4, 0)
            assert lists.listed < 0.12 * lists.keys


def test_real_images_need_few_pixels(simt_library):
    """Of crops of 224x224 at most three hundredths of the keys are listed, and no list is in vain."""
    paths = real_images()
    if not paths:
        pytest.skip("no real images: set ERNET_TEST_DATA")
    keys = listed = 0
    for path in paths[::3]:
        images = stack(load(path)[100:324, 200:424])
        expected = Emulator(simt_library, 1).fit(images)
        emulator = Emulator(simt_library, 3)
        assert_same_fit(emulator.fit(images, plan=emulator.choose_plan(images, "resident")), expected)
        lists = emulator.lists()
        assert (lists.rounds, lists.missed) == (2, 0)
        keys, listed = keys + 2 * images[0, 0].size, listed + lists.listed
    assert listed <= 0.03 * keys


def test_without_lists_all_keys_are_counted(simt_library):
    for lists in fit_in_every_cluster(simt_library, tissue(60, 61, 2), listed=0):
        assert lists == (0, 0, 0, 0)


@pytest.mark.parametrize(("alpha", "listed"), [(0.0, 6), (5.0, 6), (25.0, 1), (49.99, 1)])
def test_other_percentiles(simt_library, alpha, listed):
    """Far from the ends a list would be longer than the memory for it, and that of the angles is not begun."""
    images = stack(synthetic_tissue(90, 90, 2))
    in_one_block, *_ = fit_in_every_cluster(simt_library, images, (240.0, alpha, 0.15, False), listed=listed)
    assert in_one_block == (2, *in_one_block[1:3], 0) if listed == 6 else in_one_block.rounds <= 1


def test_lists_that_are_too_short(simt_library):
    """Half of the pixels have one colour, and they are the ones at the end."""
    few = np.array([[100, 50, 120], [101, 50, 120], [160, 90, 150], [200, 150, 190]], np.uint8)
    rng = np.random.default_rng(5)
    images = stack(*(few[rng.choice(4, (64, 63), p=p)] for p in ([0.4, 0.3, 0.2, 0.1], [0.49, 0.01, 0.01, 0.49])))
    for lists in fit_in_every_cluster(simt_library, images, listed=1):
        assert lists.rounds > 0 and lists.missed > 0


def test_a_sample_that_misleads(simt_library):
    """Extreme colours at sampled pixels alone: the border lies beyond the statistics, which are missed."""
    image = synthetic_tissue(100, 100, 3).reshape(-1, 3)
    taken = sampled_pixels(simt_library, len(image))
    rng = np.random.default_rng(1)
    extreme = rng.choice(taken, 90, replace=False)
    image[extreme[::2]] = (60, 150, 190)
    image[extreme[1::2]] = (190, 60, 150)
    images = stack(image.reshape(100, 100, 3))
    assert fit_in_every_cluster(simt_library, images)[0].missed > 0
    image[taken] = (120, 70, 140)  # and one that sees a single colour
    fit_in_every_cluster(simt_library, stack(image.reshape(100, 100, 3)))


def sorted_by(image, key):
    pixels = image.reshape(-1, 3)
    return pixels[np.argsort(key(pixels.astype(int)), kind="stable")].reshape(image.shape)


@pytest.mark.parametrize("channel", [0, 2])
def test_sorted_pixels(simt_library, channel):
    """All that matters is in one block of a cluster, or spread as evenly as the sample."""
    image = synthetic_tissue(80, 90, 4)
    by_ratio = sorted_by(image, lambda p: p[:, 1] * 256 // (p[:, channel] + 1))
    images = stack(by_ratio, sorted_by(image, lambda p: p.sum(1)), np.ascontiguousarray(by_ratio[::-1]))
    assert all(lists.rounds == 6 for lists in fit_in_every_cluster(simt_library, images))


def test_little_tissue(simt_library):
    """So little that the sample holds none of it, or a few pixels."""
    colours = synthetic_tissue(60, 60, 6).reshape(-1, 3)
    colours = colours[(colours <= 180).all(1)]
    images = []
    for count in (10, 12, 40, 150):
        image = np.full((90 * 80, 3), 245, np.uint8)
        image[7 :: len(image) // count][:count] = colours[:count]
        images.append(image.reshape(90, 80, 3))
    fit_in_every_cluster(simt_library, stack(*images))


def test_colours_on_both_sides_of_the_plane(simt_library):
    """A principal direction with a negative component: angles are not compared by cross products."""
    rng = np.random.default_rng(8)
    turn = rng.integers(0, 90, (70, 71, 1))
    image = np.concatenate([90 + turn, 190 - turn, 120 + rng.integers(0, 20, turn.shape)], 2).astype(np.uint8)
    assert fit_in_every_cluster(simt_library, stack(image))[0].rounds == 1
    tissue_of_any_kind = 240.0, 1.0, -0.05, False  # white is tissue, and its optical density may be negative
    assert fit_in_every_cluster(simt_library, tissue(70, 71, 1), tissue_of_any_kind)[0].rounds == 1


def test_degenerate_images(simt_library):
    for nearest in (False, True):
        for alpha, beta in ((1.0, 0.15), (10.0, 0.0)):
            fit_in_every_cluster(simt_library, degenerate(), (240.0, alpha, beta, nearest))


@pytest.mark.parametrize("angles", [True, False])
def test_no_pixel_is_left_out_that_may_matter(simt_library, angles):
    """Forms in float32 against keys in double precision, for 770,000 colours; every border is the key of one."""
    rng = np.random.default_rng(2)
    lib = ctypes.CDLL(str(simt_library))
    every = np.stack(np.meshgrid(*3 * [np.arange(0, 256, 3)], indexing="ij"), -1).reshape(-1, 3)
    colours = np.concatenate([every, rng.integers(0, 240, (1 << 17, 3))]).astype(np.uint8)
    od = -np.log((colours.astype(float) + 1) / 240)
    for case in range(6):
        second = np.abs(rng.normal(size=3)) + 0.01
        second /= np.linalg.norm(second)
        first = np.cross(second, rng.normal(size=3))
        first /= np.linalg.norm(first)
        rows = np.ascontiguousarray([first, second] if angles else rng.normal(size=(2, 3)) * 10.0 ** rng.integers(0, 3))
        used, low = colours, case % 2 == 0 and angles
        x, y = od @ rows[0], od @ rows[1]
        if angles:  # of tissue, as the forms are meant for
            used = colours[(od >= 0).all(1)]
            x, y = x[(od >= 0).all(1)], y[(od >= 0).all(1)]
        norm = np.abs(x) + np.abs(y)
        keys = 1 - x / np.where(norm > 0, norm, 1) if angles else x
        for border in np.sort(keys)[[len(keys) // 100, len(keys) // 2, -len(keys) // 100]]:
            found = (ctypes.c_int64 * 2)()
            lib.simt_try_form(
                pointer(rows), ctypes.c_double(240), ctypes.c_double(border), angles, low,
                pointer(used), ctypes.c_int64(len(used)), found,
            )  # fmt: skip
            meant = int((keys <= border).sum() if low else (keys >= border).sum())
            assert found[0] == 0
            assert meant - 1 <= found[1] <= meant + 1e-3 * len(used) + 100
