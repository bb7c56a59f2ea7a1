"""The Triton kernels on the CPU, in Triton's interpreter, against float64 formulas.

Run by test_triton_interpreter.py in a process of its own with TRITON_INTERPRET=1, which must be set before the kernels
are imported.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from er_cases import DTYPES, LAYOUTS, maps_like, relative_error, tolerance

from ernet_fast.er.triton import map_launch, tiling

# N, C, H, W: multiples of nothing, single pixels and samples, several tiles along either side
SHAPES = [(2, 3, 7, 11), (1, 65, 7, 7), (5, 33, 1, 1), (3, 1, 1, 49), (2, 136, 5, 5), (1, 2, 31, 67)]
# Every shape in both layouts, per channel in one of them and per sample in the other, and so that every dtype has both
# in both layouts: the interpreter takes long.
CASES = [
    *((shape, torch.float32, LAYOUTS[k], (i + k) % 2 == 1) for i, shape in enumerate(SHAPES) for k in (0, 1)),
    *(
        (shape, dtype, LAYOUTS[k], (i + k) % 2 == 1)
        for (i, shape), dtype, k in itertools.product(enumerate([(2, 3, 7, 11), (2, 16, 4, 4)]), DTYPES[1:], (0, 1))
    ),
    ((1, 2, 31, 67), torch.float64, torch.contiguous_format, False),
]


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def spread(t: torch.Tensor) -> torch.Tensor:
    """[..., C] or [..., N, C] coefficients, as they multiply [N, C, H, W]."""
    return t[..., None, None] if t.dim() == 2 else t[None, :, None, None]


def stored(dtype: torch.dtype, terms: int) -> float:
    """The interpreter truncates where hardware rounds to the nearest bfloat16: one more roundoff there."""
    return tolerance(dtype, terms) + (torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0.0)


@pytest.mark.parametrize(("shape", "dtype", "layout", "per_sample"), CASES)
def test_weighted_sum(shape, dtype, layout, per_sample):
    for num_maps, with_b, relu in ((1, True, False), (3, True, True), (9, False, True)):
        maps = maps_like(shape, num_maps, dtype, layout)
        sizes = shape[:2] if per_sample else shape[1:2]
        a = torch.randn(num_maps, *sizes, dtype=acc_dtype(dtype))
        b = torch.randn(sizes, dtype=acc_dtype(dtype)) if with_b else None
        y = map_launch.weighted_sum(maps, a, b, relu)
        expected = sum(spread(a[i]).double() * x.double() for i, x in enumerate(maps))
        expected = expected if b is None else expected + spread(b).double()
        expected = expected.relu() if relu else expected
        assert relative_error(y, expected) <= stored(dtype, num_maps)
        assert y.dtype == dtype and y.stride() == maps[0].stride()


@pytest.mark.parametrize("num_maps", [2, 7, 8, 16, 17, 40])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weighted_sum_of_many_maps(num_maps, layout):
    maps = maps_like((2, 5, 4, 3), num_maps, torch.float32, layout)
    a = torch.randn(num_maps, 5)
    expected = sum(spread(a[i]).double() * x.double() for i, x in enumerate(maps))
    assert relative_error(map_launch.weighted_sum(maps, a, None, False), expected) <= stored(torch.float32, num_maps)


@pytest.mark.parametrize(("shape", "dtype", "layout", "per_sample"), CASES)
def test_weighted_dot(shape, dtype, layout, per_sample):
    for num_maps, with_y in ((3, True), (9, True), (2, False)):
        dy, y, *maps = maps_like(shape, num_maps + 2, dtype, layout)
        mask = y.relu() if with_y else None
        da, db, g = map_launch.weighted_dot(dy, maps, mask, per_sample)
        g64 = dy.double() if mask is None else dy.double() * (mask.double() > 0)
        if mask is None:
            assert g.numel() == 0
        else:
            assert torch.equal(g.double(), g64) and g.stride() == dy.stride()
        dims = (2, 3) if per_sample else (0, 2, 3)
        bound = tolerance(dtype, shape[0] * shape[2] * shape[3], stored=False)
        for i, x in enumerate(maps):
            products = g64 * x.double()
            assert float((da[i].double() - products.sum(dims)).norm()) <= bound * float(products.abs().sum(dims).norm())
        assert float((db.double() - g64.sum(dims)).norm()) <= bound * float(g64.abs().sum(dims).norm())
        assert da.dtype == db.dtype == acc_dtype(dtype)


@pytest.mark.parametrize(("shape", "dtype", "layout"), [case[:3] for case in CASES if not case[3]])
def test_map_dots(shape, dtype, layout):
    """With and without a gradient and a ReLU of its own; no later blocks, some, and more than one launch holds."""
    for num_later, with_dy, with_y in ((0, True, True), (3, True, True), (9, True, True), (8, True, False), (2, 0, 0)):
        z, dy, y, *later = maps_like(shape, num_later + 3, dtype, layout)
        check_map_dots(z, dy if with_dy else None, y.relu() if with_y else None, later, per_sample=num_later == 3)


def check_map_dots(z, dy, y, later, per_sample=False):
    """Against sums in float64, whose error bound is relative to the sums of magnitudes."""
    sums, g = map_launch.map_dots(z, dy, y, later, per_sample)
    products = [z.double() * x.double() for x in later]
    if dy is not None:
        g64 = dy.double() if y is None else dy.double().where(~(y.double() <= 0), 0)
        products += [z.double() * g64, g64]
    if y is None:
        assert g.numel() == 0
    else:
        assert g.dtype == dy.dtype and g.stride() == dy.stride() and torch.equal(g.double(), g64)
    bound = tolerance(z.dtype, z.numel() // z.shape[1], stored=False)
    assert sums.dtype == torch.float64 and sums.shape == (len(products), *z.shape[0 if per_sample else 1 : 2])
    over = (2, 3) if per_sample else (0, 2, 3)
    for found, product in zip(sums, products, strict=True):
        error = (found - product.sum(over)).norm()
        assert float(error) <= bound * float(product.abs().sum(over).norm())


@pytest.mark.parametrize(("shape", "dtype", "layout", "per_sample"), CASES)
def test_channel_moments(shape, dtype, layout, per_sample):
    (x,) = maps_like(shape, 1, dtype, layout)
    mean, var = map_launch.channel_moments(x, per_sample)
    dims = (2, 3) if per_sample else (0, 2, 3)
    bound = tolerance(dtype, shape[0] * shape[2] * shape[3], stored=False)
    scale = x.double().square().mean(dims).sqrt().norm()
    assert float((mean.double() - x.double().mean(dims)).norm() / scale) <= bound
    error = (var.double() - x.double().var(dims, correction=0)).norm()
    assert float(error / scale.square().clamp_min(1)) <= bound
    assert mean.dtype == var.dtype == acc_dtype(dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("per_sample", [False, True])
def test_moments_of_a_large_mean(layout, per_sample):
    """Mean 1e4 and standard deviations of 1 and 1e-3 in float32: the variance must survive, across slabs too."""
    x = torch.randn((4, 8, 40, 41), generator=torch.Generator().manual_seed(0))
    x = x * torch.tensor([1.0, 1e-3]).repeat(4)[:, None, None] + 1e4
    x = x.contiguous(memory_format=layout)
    mean, var = map_launch.channel_moments(x, per_sample)
    dims = (2, 3) if per_sample else (0, 2, 3)
    # the means of slabs are rounded to half an ulp, which is half of the smaller deviation
    for channels, rtol in ((slice(0, None, 2), 1e-3), (slice(1, None, 2), 1e-2)):
        expected = x.double().var(dims, correction=0)[..., channels]
        torch.testing.assert_close(var.double()[..., channels], expected, rtol=rtol, atol=0)
    torch.testing.assert_close(mean.double(), x.double().mean(dims), rtol=torch.finfo(torch.float32).eps, atol=0)


@pytest.fixture
def small_tiles(monkeypatch):
    """Cut small maps into as many tiles as large ones get; the value sets the least number of tiles in a slab."""

    def cut(least_units: int) -> None:
        monkeypatch.setattr(map_launch, "merge_tile", lambda slabs: (16, 16))
        monkeypatch.setattr(tiling, "_LEAST_UNITS", least_units)
        monkeypatch.setattr(tiling, "_LOAD_BYTES", 8)
        monkeypatch.setattr(tiling, "_CHANNELS", 8)
        monkeypatch.setattr(tiling, "_PLANAR_COLS", (8, 16))
        tiling.reduction.cache_clear()

    yield cut
    tiling.reduction.cache_clear()


@pytest.mark.parametrize("least_units", [1, 20])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("per_sample", [False, True])
def test_many_slabs_and_long_ones(small_tiles, layout, per_sample, least_units):
    """More slabs than are merged at once, or slabs of more tiles than channel_moments loads at once."""
    small_tiles(least_units)
    width = 40 if layout == torch.channels_last else 20
    height = 20 if per_sample and least_units == 1 else 28
    shape, dims = (2, 5, height, width), (2, 3) if per_sample else (0, 2, 3)
    dy, y, x = maps_like(shape, 3, torch.float32, layout)
    x += 100 + torch.linspace(0, 3, height)[:, None]  # tiles whose means differ
    cut = tiling.reduction(tiling.Shape(2, 5, height * width, layout == torch.channels_last, per_sample), 4)
    if least_units == 1:
        assert cut.slabs > 20
    else:
        assert cut.slabs > 1 and cut.units_per_slab > 16
    bound = tolerance(torch.float32, 2 * height * width, stored=False)
    da, db, _ = map_launch.weighted_dot(dy, [x], y, per_sample)
    g = dy.double() * (y.double() > 0)
    assert float((da[0].double() - (g * x).sum(dims)).norm()) <= bound * float((g * x).abs().sum(dims).norm())
    assert float((db.double() - g.sum(dims)).norm()) <= bound * float(g.abs().sum(dims).norm())
    if not per_sample:
        check_map_dots(x, dy, y, [y])
    mean, var = map_launch.channel_moments(x, per_sample)
    # A mean of n numbers near 100 is known to roundoff; deviations from it, squared, are off by the square of that.
    torch.testing.assert_close(mean.double(), x.double().mean(dims), rtol=2e-7, atol=0)
    torch.testing.assert_close(var.double(), x.double().var(dims, correction=0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_moments_of_a_slab_that_begins_elsewhere(small_tiles, layout):
    """Deviations are taken from the mean of the first pixels, and those are far off: few digits are lost."""
    small_tiles(20)
    shape = (2, 3, 28, 40 if layout == torch.channels_last else 20)
    (x,) = maps_like(shape, 1, torch.float32, layout)
    cut = tiling.reduction(tiling.Shape(*shape[:2], shape[2] * shape[3], layout == torch.channels_last, False), 4)
    assert cut.units_per_slab > map_launch._MOMENT_UNITS
    x[0, :, :7] += 1000
    mean, var = map_launch.channel_moments(x, False)
    torch.testing.assert_close(mean.double(), x.double().mean((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), x.double().var((0, 2, 3), correction=0), rtol=1e-6, atol=0)


def test_offsets_of_64_bits(monkeypatch):
    """The specialisation for rows so long that a tile spans 2^31 elements, at a size that fits here."""
    maps = maps_like((2, 5, 4, 3), 3, torch.float32, torch.channels_last)
    a, dy = torch.randn(3, 5), maps[0]
    narrow = map_launch.weighted_sum(maps, a, None, False)
    reductions = (
        lambda: map_launch.weighted_dot(dy, maps, dy, False),
        lambda: map_launch.map_dots(maps[1], dy, dy, maps),
        lambda: map_launch.channel_moments(dy, False),
    )
    narrow_results = [result for reduction in reductions for result in reduction()]
    original = tiling._tile
    monkeypatch.setattr(tiling, "_tile", lambda *args: original(*args)._replace(wide=True))
    tiling.sum_tile.cache_clear(), tiling.reduction.cache_clear()
    try:
        assert torch.equal(map_launch.weighted_sum(maps, a, None, False), narrow)
        wide_results = [result for reduction in reductions for result in reduction()]
        assert all(torch.equal(*pair) for pair in zip(wide_results, narrow_results, strict=True))
    finally:
        tiling.sum_tile.cache_clear(), tiling.reduction.cache_clear()


def test_per_sample_results_do_not_depend_on_the_batch():
    dy, y, *maps = maps_like((4, 37, 13, 9), 4, torch.float32, torch.channels_last)
    whole = map_launch.weighted_dot(dy, maps, y, True)
    one = map_launch.weighted_dot(dy[2:3], [x[2:3] for x in maps], y[2:3], True)
    assert torch.equal(whole[0][:, 2:3], one[0]) and torch.equal(whole[1][2:3], one[1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_relu_and_nan_are_those_of_torch(layout):
    x = torch.tensor([float("nan"), float("inf"), float("-inf"), -0.0, 0.0, 1.0]).reshape(1, 6, 1, 1)
    x = x.contiguous(memory_format=layout)
    y = map_launch.weighted_sum([x], torch.ones(1, 6), None, True)
    torch.testing.assert_close(y, x.relu(), equal_nan=True, rtol=0, atol=0)
    leaf = x.clone().requires_grad_()
    leaf.relu().sum().backward()
    torch.testing.assert_close(map_launch.weighted_dot(torch.ones_like(x), [x], x.relu(), False)[2], leaf.grad)
    sums, g = map_launch.map_dots(torch.ones_like(x), torch.ones_like(x), x.relu(), [])
    torch.testing.assert_close(g, leaf.grad, rtol=0, atol=0)
    torch.testing.assert_close(sums, leaf.grad.sum((0, 2, 3)).expand(2, -1).double(), rtol=0, atol=0)
    mean, var = map_launch.channel_moments(x, False)
    assert not bool(mean[:3].isfinite().any()) and bool(var[:3].isnan().all())
    assert torch.equal(mean[3:], x.flatten()[3:]) and not bool(var[3:].any())


@pytest.mark.parametrize("shape", [(0, 5, 3, 3), (2, 5, 0, 3), (2, 0, 3, 3)])
def test_empty_maps(shape):
    x = torch.ones(shape)
    assert map_launch.weighted_sum([x, x], torch.ones(2, shape[1]), None, False).shape == shape
    da, db, _ = map_launch.weighted_dot(x, [x], None, False)
    assert torch.equal(da, torch.zeros(1, shape[1])) and torch.equal(db, torch.zeros(shape[1]))
    sums, g = map_launch.map_dots(x, x, x, [x, x])
    assert torch.equal(sums, torch.zeros(4, shape[1], dtype=torch.float64)) and g.shape == x.shape
    mean, var = map_launch.channel_moments(x, False)
    assert torch.equal(mean, torch.zeros(shape[1])) and var.shape == (shape[1],) and bool(var.isnan().all())


def test_no_sums():
    x = torch.ones(2, 3, 4, 5)
    sums, g = map_launch.map_dots(x, None, None, [])
    assert sums.shape == (0, 3) and sums.dtype == torch.float64 and g.shape == (0,)


def test_operators_name_what_is_wrong():
    x, a = torch.ones(2, 3, 4, 4), torch.ones(1, 3)
    mixed = [x, x.contiguous(memory_format=torch.channels_last)]
    for maps, a_, b, message in [
        ([], a, None, "at least one map"),
        ([x] * 257, torch.ones(257, 3), None, "at most 256 maps"),
        ([x[0]], a, None, "4 dimensions"),
        ([x.int()], a, None, "float32, float64, bfloat16 or float16"),
        ([x, x[:1]], torch.ones(2, 3), None, r"one shape; maps\[1\]"),
        ([x, x.double()], torch.ones(2, 3), None, "one dtype"),
        ([x, x.to("meta")], torch.ones(2, 3), None, "one device"),
        ([x], torch.ones(2, 3), None, r"a must have shape \[1, 3\]; got \[2, 3\]"),
        ([x], a.double(), None, "a must be float32"),
        ([x], a.to("meta"), None, "a must be on the device of the maps"),
        ([x], a, torch.ones(4), r"b must have shape \[3\]"),
        ([x], torch.ones(1, 6)[:, ::2], None, "contiguous"),
        ([x[..., ::2]], a, None, "dense in one layout"),
        (mixed, torch.ones(2, 3), None, "one layout"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            map_launch.weighted_sum(maps, a_, b, False)
    with pytest.raises(RuntimeError, match="one shape; y"):
        map_launch.weighted_dot(x, [x], x[:1], False)
    for arguments, message in [
        ((x, None, x, []), "y needs dy"),
        ((x, x[:1], None, []), "one shape; dy"),
        ((x, x, x[:1], [x]), "one shape; y"),
        ((x, None, None, [x, x.double()]), r"one dtype; later_g\[1\]"),
        ((x, x, None, [mixed[1]]), "one layout"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            map_launch.map_dots(*arguments)
