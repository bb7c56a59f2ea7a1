"""The three ER operators against float64 formulas, in every dtype and layout."""

from __future__ import annotations

import itertools

import pytest
import torch
from er_cases import DTYPES, LAYOUTS, SHAPES, maps_like, relative_error, tolerance

from ernet_fast.er import operators

CASES = list(itertools.product(SHAPES, DTYPES, LAYOUTS, [False, True]))


def spread(t: torch.Tensor) -> torch.Tensor:
    """[..., C] or [..., N, C] coefficients, as they multiply [N, C, H, W]."""
    return t[..., None, None] if t.dim() == 2 else t[None, :, None, None]


@pytest.mark.parametrize(("shape", "dtype", "layout", "per_sample"), CASES)
def test_channel_moments(shape, dtype, layout, per_sample):
    (x,) = maps_like(shape, 1, dtype, layout)
    mean, var = operators.channel_moments(x, per_sample)
    dims = (2, 3) if per_sample else (0, 2, 3)
    bound = tolerance(dtype, shape[0] * shape[2] * shape[3], stored=False)
    expected = x.double().mean(dims)
    scale = x.double().square().mean(dims).sqrt().norm()  # a mean near zero is known to roundoff of its terms
    assert float((mean.double() - expected).norm() / scale) <= bound
    expected = x.double().var(dims, correction=0)
    assert float((var.double() - expected).norm() / scale.square().clamp_min(1)) <= bound
    assert mean.dtype == var.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("per_sample", [False, True])
def test_moments_of_a_large_mean(layout, per_sample):
    """Mean 1e4 and standard deviation 1 in float32: the variance must survive."""
    x = (torch.randn((4, 16, 56, 56), generator=torch.Generator().manual_seed(0)) + 1e4).contiguous(
        memory_format=layout
    )
    mean, var = operators.channel_moments(x, per_sample)
    dims = (2, 3) if per_sample else (0, 2, 3)
    torch.testing.assert_close(var.double(), x.double().var(dims, correction=0), rtol=1e-3, atol=0)
    torch.testing.assert_close(mean.double(), x.double().mean(dims), rtol=1e-7, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("outliers", [1, 4, 300])
def test_moments_with_outliers_at_the_start(outliers, layout):
    """Deviations are taken from the mean of a tile's first values; those may lie far from all others."""
    x = torch.randn((4, 3, 96, 96), generator=torch.Generator().manual_seed(0))
    for sample in x:
        sample.flatten(1)[:, :outliers] = 1e4
    mean, var = operators.channel_moments(x.contiguous(memory_format=layout))
    torch.testing.assert_close(mean.double(), x.double().mean((0, 2, 3)), rtol=1e-5, atol=0)
    # at most 1 + 32 times the rounding errors of a plain sum of squares
    bound = 33 * tolerance(torch.float32, 4 * 96 * 96, stored=False)
    torch.testing.assert_close(var.double(), x.double().var((0, 2, 3), correction=0), rtol=bound, atol=0)


@pytest.mark.parametrize("num_maps", [1, 2, 6, 7, 40])
@pytest.mark.parametrize(("shape", "dtype", "layout", "per_sample"), CASES)
def test_weighted_sum(shape, dtype, layout, per_sample, num_maps):
    if num_maps == 40 and shape not in SHAPES[:2]:
        num_maps = 13
    maps = maps_like(shape, num_maps, dtype, layout)
    acc = operators.acc_dtype(maps[0])
    sizes = shape[:2] if per_sample else shape[1:2]
    generator = torch.Generator().manual_seed(num_maps)
    a, b = (torch.randn(s, dtype=acc, generator=generator) for s in ((num_maps, *sizes), sizes))
    before = [x.clone() for x in maps]
    for bias, relu in ((b, False), (b, True), (None, True)):
        y = operators.weighted_sum(maps, a, bias, relu)
        expected = sum(spread(a[i]).double() * x.double() for i, x in enumerate(maps))
        expected = expected if bias is None else expected + spread(bias).double()
        expected = expected.relu() if relu else expected
        terms = sum((spread(a[i]).double() * x.double()).abs() for i, x in enumerate(maps))
        terms = terms if bias is None else terms + spread(bias).double().abs()
        assert float((y.double() - expected).norm() / terms.norm()) <= tolerance(dtype, num_maps)
        assert y.dtype == dtype and y.stride() == maps[0].stride()
    assert all(torch.equal(x, kept) for x, kept in zip(maps, before, strict=True))


@pytest.mark.parametrize("num_maps", [1, 5])
@pytest.mark.parametrize(("shape", "dtype", "layout", "per_sample"), CASES)
def test_weighted_dot(shape, dtype, layout, per_sample, num_maps):
    dy, y, *maps = maps_like(shape, num_maps + 2, dtype, layout)
    y = y.relu()
    dims = (2, 3) if per_sample else (0, 2, 3)
    bound = tolerance(dtype, shape[0] * shape[2] * shape[3], stored=False)
    for mask in (y, None):
        da, db, g = operators.weighted_dot(dy, maps, mask, per_sample)
        g64 = dy.double() if mask is None else dy.double() * (mask.double() > 0)
        if mask is not None:
            assert torch.equal(g.double(), g64) and g.stride() == dy.stride()
        for i, x in enumerate(maps):
            products = g64 * x.double()
            assert float((da[i].double() - products.sum(dims)).norm()) <= bound * float(products.abs().sum(dims).norm())
        assert float((db.double() - g64.sum(dims)).norm()) <= bound * float(g64.abs().sum(dims).norm())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_do_not_depend_on_threads(dtype, layout):
    dy, y, *maps = maps_like((6, 37, 23, 29), 5, dtype, layout)
    a = torch.randn(3, 37, dtype=operators.acc_dtype(dy))

    def everything() -> list[torch.Tensor]:
        return [
            *operators.channel_moments(dy),
            *operators.channel_moments(dy, True),
            operators.weighted_sum(maps, a),
            *operators.weighted_dot(dy, maps, y),
            *operators.weighted_dot(dy, maps, y, True),
        ]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = everything()
        for count in (2, 3):
            torch.set_num_threads(count)
            assert all(torch.equal(x, y) for x, y in zip(single, everything(), strict=True))
    finally:
        torch.set_num_threads(threads)


def test_per_sample_results_do_not_depend_on_the_batch():
    dy, y, *maps = maps_like((6, 37, 13, 9), 5, torch.float32, torch.channels_last)
    whole = operators.weighted_dot(dy, maps, y, True)
    one = operators.weighted_dot(dy[2:3], [x[2:3] for x in maps], y[2:3], True)
    assert torch.equal(whole[0][:, 2:3], one[0]) and torch.equal(whole[1][2:3], one[1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_relu_and_nan_are_those_of_torch(layout):
    x = torch.tensor([float("nan"), float("inf"), float("-inf"), -0.0, 0.0, 1.0]).reshape(1, 6, 1, 1)
    x = x.contiguous(memory_format=layout)
    for dtype in DTYPES:
        ones = torch.ones(1, 6, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        y = operators.weighted_sum([x.to(dtype)], ones, None, True)
        torch.testing.assert_close(y, x.to(dtype).relu(), equal_nan=True, rtol=0, atol=0)
    g = operators.weighted_dot(torch.ones_like(x), [x], x.relu())[2]
    leaf = x.clone().requires_grad_()
    leaf.relu().sum().backward()
    torch.testing.assert_close(g, leaf.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_number_survives(dtype):
    """All 65,536 bit patterns pass unchanged through a sum with coefficient 1: conversions are exact."""
    bits = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16)
    x = bits.view(dtype).reshape(1, 1, 256, 256)
    y = operators.weighted_sum([x], torch.ones(1, 1))
    torch.testing.assert_close(y, x, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_to_half_is_to_nearest_even(dtype):
    exact = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(1)) * torch.logspace(-9, 5, 64)
    x, factor = torch.ones(1, 4096, 1, 1, dtype=dtype), exact.reshape(1, 4096)
    y = operators.weighted_sum([x], factor)
    torch.testing.assert_close(y.flatten(), factor.flatten().to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(0, 5, 3, 3), (2, 5, 0, 3), (2, 0, 3, 3)])
def test_empty_maps(shape):
    x = torch.ones(shape)
    assert operators.weighted_sum([x, x], torch.ones(2, shape[1])).shape == shape
    da, db, _ = operators.weighted_dot(x, [x], None)
    assert torch.equal(da, torch.zeros(1, shape[1])) and torch.equal(db, torch.zeros(shape[1]))
    mean, var = operators.channel_moments(x)
    assert mean.shape == var.shape == (shape[1],) and bool(var.isnan().all())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_opcheck(dtype, layout):
    dy, *maps = maps_like((2, 3, 5, 4), 3, dtype, layout)
    a, b = torch.randn(2, 3, dtype=operators.acc_dtype(dy)), torch.randn(3, dtype=operators.acc_dtype(dy))
    leaves = [x.clone(memory_format=torch.preserve_format).requires_grad_() for x in (dy, *maps, a, b)]
    dy, *maps, a, b = leaves
    ops = torch.ops.ernet
    torch.library.opcheck(ops.channel_moments.default, (dy, False))
    torch.library.opcheck(ops.channel_moments.default, (dy, True))
    torch.library.opcheck(ops.weighted_sum.default, (maps, a, b, True))
    torch.library.opcheck(ops.weighted_sum.default, (maps, a, None, False))
    torch.library.opcheck(ops.weighted_dot.default, (dy, maps, maps[0].detach(), False))
    torch.library.opcheck(ops.weighted_dot.default, (dy, maps, None, True))


def test_operator_gradients():
    dy, y, *maps = (x.requires_grad_() for x in maps_like((2, 3, 3, 2), 4, torch.float64, torch.contiguous_format))
    a, b = (
        torch.randn(2, 3, dtype=torch.float64, requires_grad=True),
        torch.randn(3, dtype=torch.float64, requires_grad=True),
    )
    mask = y.detach().relu()
    assert torch.autograd.gradcheck(lambda x: operators.channel_moments(x), (dy,))
    assert torch.autograd.gradgradcheck(lambda *t: operators.weighted_sum(t[:2], t[2], t[3]), (*maps, a, b))
    assert torch.autograd.gradgradcheck(lambda *t: operators.weighted_sum(t[:2], t[2], t[3], True), (*maps, a, b))
    assert torch.autograd.gradcheck(lambda d, *x: operators.weighted_dot(d, x, mask), (dy, *maps))
    assert torch.autograd.gradcheck(lambda d, *x: operators.weighted_dot(d, x, None, True)[:2], (dy, *maps))


def test_operators_name_what_is_wrong():
    x = torch.ones(2, 3, 4, 4)
    a = torch.ones(1, 3)
    for call, message in [
        (lambda: operators.weighted_sum([], a), "at least one map"),
        (lambda: operators.weighted_sum([x[0]], a), "4 dimensions"),
        (lambda: operators.weighted_sum([x.int()], a), "float32, float64, bfloat16 or float16"),
        (lambda: operators.weighted_sum([x, x[:1]], torch.ones(2, 3)), "one shape"),
        (lambda: operators.weighted_sum([x, x.double()], torch.ones(2, 3)), "one dtype"),
        (lambda: operators.weighted_sum([x], torch.ones(2, 3)), r"a must have shape \[1, 3\]; got \[2, 3\]"),
        (lambda: operators.weighted_sum([x], a.double()), "a must be float32"),
        (lambda: operators.weighted_sum([x], a, torch.ones(4)), r"b must have shape \[3\]"),
        (lambda: operators.weighted_sum([x], torch.ones(1, 6)[:, ::2]), "contiguous"),
        (lambda: operators.weighted_sum([x[..., ::2]], a), "dense in one layout"),
        (
            lambda: operators.weighted_sum([x, x.contiguous(memory_format=torch.channels_last)], torch.ones(2, 3)),
            "one layout",
        ),
        (lambda: operators.weighted_dot(x, [x], x[:1]), "one shape"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            call()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1800, 1803])
def test_sums_that_are_written_past_the_cache(channels, dtype, layout):
    """Of 2 MiB and more, with planes that are no whole cache lines, and samples that begin within one."""
    maps = maps_like((12, channels, 7, 7), 2, dtype, layout)
    assert maps[0].numel() * maps[0].element_size() >= 2 << 20
    acc = operators.acc_dtype(maps[0])
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(size, generator=generator, dtype=acc) for size in ((2, channels), (channels,)))
    y = operators.weighted_sum(maps, a, b, True)
    expected = sum(x.double() * spread(k.double()) for x, k in zip(maps, a, strict=True)) + spread(b.double())
    assert y.stride() == maps[0].stride()
    assert relative_error(y, expected.relu()) <= tolerance(dtype, 3)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("num_later", [0, 1, 4, 9])
@pytest.mark.parametrize("own", ["none", "plain", "relu"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_map_dots(shape, dtype, layout, own, num_later, per_sample):
    z, dy, y, *later = maps_like(shape, num_later + 3, dtype, layout)
    y = y.relu()
    y[0, 0, 0, 0] = float("nan")  # as threshold_backward has it, NaN lets the gradient through
    sums, g = torch.ops.ernet.map_dots(
        z, None if own == "none" else dy, y if own == "relu" else None, later, per_sample
    )
    exact = dy.double().masked_fill(y.double() <= 0, 0) if own == "relu" else dy.double()
    assert sums.dtype == torch.float64
    if own == "relu":
        assert torch.equal(g.double(), exact) and g.stride() == dy.stride()
    else:
        assert g.shape == (0,)
    products = [z.double() * other.double() for other in later]
    products += [] if own == "none" else [z.double() * exact, exact]
    assert sums.shape == (len(products), *shape[0 if per_sample else 1 : 2])
    over = (2, 3) if per_sample else (0, 2, 3)
    bound = tolerance(dtype, shape[0] * shape[2] * shape[3], stored=False)
    for found, terms in zip(sums, products, strict=True):
        error = (found - terms.sum(over)).norm()
        assert float(error) <= bound * float(terms.abs().sum(over).norm())


@pytest.mark.parametrize("shape", [(0, 5, 3, 3), (2, 5, 0, 3), (2, 0, 3, 3)])
def test_map_dots_of_empty_maps(shape):
    x = torch.ones(shape)
    sums, g = torch.ops.ernet.map_dots(x, x, x, [x], False)
    assert torch.equal(sums, torch.zeros(3, shape[1], dtype=torch.float64)) and g.shape == shape


@pytest.mark.parametrize("layout", LAYOUTS)
def test_map_dots_as_the_operators_of_the_library_are(layout):
    z, dy, y, *later = maps_like((6, 37, 23, 29), 8, torch.float32, layout)
    checks = ("test_schema", "test_faketensor")
    for arguments in ((z, dy, y, later, False), (z, dy, None, [], True), (z, None, None, later[:1], False)):
        torch.library.opcheck(torch.ops.ernet.map_dots.default, arguments, test_utils=checks)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(torch.ops.ernet.map_dots(z, dy, y, later, False))
        assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    finally:
        torch.set_num_threads(threads)
    for call, message in [
        (lambda: torch.ops.ernet.map_dots(z, None, y, later, False), "y is given without dy"),
        (lambda: torch.ops.ernet.map_dots(z, dy[:1], None, [], False), "one shape"),
        (
            lambda: torch.ops.ernet.map_dots(z, None, None, [later[0].double()], False),
            r"one dtype; later_g\[0\] differs",
        ),
    ]:
        with pytest.raises(RuntimeError, match=message):
            call()
