"""On a CUDA device: the Triton operators against the CPU path, streams, graphs, large maps, a stage of a network."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from er_cases import DTYPES, LAYOUTS, SHAPES, maps_like, relative_error, tolerance
from map_gradient_cases import Stage
from test_coefficients import assert_close, forward, vectors

import ernet_fast
from ernet_fast import reference
from ernet_fast.er import operators
from ernet_fast.er.epilogue_arguments import TABLE_ROWS, BranchNorm

pytestmark = pytest.mark.gpu
CASES = list(itertools.product(SHAPES, DTYPES, LAYOUTS, [False, True]))


@pytest.fixture(autouse=True)
def triton_operators():
    if not operators.supports_device(torch.empty(1, device="cuda")):
        pytest.fail("a CUDA device is present, but the Triton operators are not registered (is triton installed?)")
    if not operators.supports_device(torch.empty(1)):
        pytest.fail("the CPU path, which these tests compare with, is not built (python3 dev.py build)")


def on_gpu(*tensors):
    return [None if t is None else t.cuda() for t in tensors]


def coefficients(num_maps, shape, dtype, per_sample):
    generator = torch.Generator().manual_seed(7)
    sizes = shape[:2] if per_sample else shape[1:2]
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    return (torch.randn(s, generator=generator, dtype=acc) for s in ((num_maps, *sizes), sizes))


# Kernels of 40 maps take long to compile: two shapes only, of few channels and of many
MANY_MAPS = [case for case in CASES if case[0] in (SHAPES[0], SHAPES[6])]
SUM_CASES = [(*case, count) for count in (1, 3, 8, 40) for case in (CASES if count < 40 else MANY_MAPS)]


@pytest.mark.parametrize(("shape", "dtype", "layout", "per_sample", "num_maps"), SUM_CASES)
def test_weighted_sum(shape, dtype, layout, per_sample, num_maps):
    maps = maps_like(shape, num_maps, dtype, layout)
    a, b = coefficients(num_maps, shape, dtype, per_sample)
    exact = [x.double() for x in maps]
    before = [x.cuda() for x in maps]
    moved = [x.clone() for x in before]
    for bias, relu in ((b, True), (None, False)):
        expected = operators.weighted_sum(exact, a.double(), None if bias is None else bias.double(), relu)
        y = operators.weighted_sum(moved, *on_gpu(a, bias), relu)
        assert y.is_cuda and y.dtype == dtype and y.stride() == moved[0].stride()
        assert relative_error(y.cpu(), expected) <= tolerance(dtype, num_maps)
    assert all(torch.equal(x, kept) for x, kept in zip(moved, before, strict=True))


@pytest.mark.parametrize("num_maps", [1, 8, 23])
@pytest.mark.parametrize(("shape", "dtype", "layout", "per_sample"), CASES)
def test_weighted_dot(shape, dtype, layout, per_sample, num_maps):
    dy, y, *maps = maps_like(shape, num_maps + 2, dtype, layout)
    bound = tolerance(dtype, shape[0] * shape[2] * shape[3], stored=False)
    for mask in (y.relu(), None):
        exact = [None if t is None else t.double() for t in (dy, mask, *maps)]
        sizes = [t.abs() for t in exact if t is not None]
        da, db, g = operators.weighted_dot(exact[0], exact[2:], exact[1], per_sample)
        scale = operators.weighted_dot(sizes[0], sizes[-num_maps:], None, per_sample)
        found = operators.weighted_dot(dy.cuda(), on_gpu(*maps), *on_gpu(mask), per_sample)
        assert float((found[0].cpu().double() - da).norm()) <= bound * float(scale[0].norm())
        assert float((found[1].cpu().double() - db).norm()) <= bound * float(scale[1].norm())
        assert torch.equal(found[2].cpu().double(), g)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("num_later", [0, 1, 8, 19])
@pytest.mark.parametrize(("shape", "dtype", "layout"), list(itertools.product(SHAPES, DTYPES, LAYOUTS)))
def test_map_dots(shape, dtype, layout, num_later, per_sample):
    """With and without a gradient and a ReLU of its own, against the CPU in float64."""
    z, dy, y, *later = maps_like(shape, num_later + 3, dtype, layout)
    y = y.relu()
    y[0, 0, 0, 0] = float("nan")
    bound = tolerance(dtype, shape[0] * shape[2] * shape[3], stored=False)
    for own in ((dy, y), (dy, None), (None, None)):
        exact = [None if t is None else t.double() for t in (z, *own, *later)]
        sums, g = operators.map_dots(*exact[:3], exact[3:], per_sample)
        sizes = [None if t is None else t.abs() for t in exact]
        scale, _ = operators.map_dots(sizes[0], sizes[1], None, sizes[3:], per_sample)
        found, found_g = operators.map_dots(*on_gpu(z, *own), on_gpu(*later), per_sample)
        assert found.is_cuda and found.dtype == torch.float64 and found.shape == sums.shape
        assert torch.equal(found_g.cpu().double(), g)
        for row, wanted, size in zip(found.cpu(), sums, scale, strict=True):
            assert float((row - wanted).norm()) <= bound * float(size.norm())


@pytest.mark.parametrize(("shape", "dtype", "layout", "per_sample"), CASES)
def test_channel_moments(shape, dtype, layout, per_sample):
    (x,) = maps_like(shape, 1, dtype, layout)
    expected = operators.channel_moments(x.double(), per_sample)
    mean, var = operators.channel_moments(x.cuda(), per_sample)
    bound = tolerance(dtype, shape[0] * shape[2] * shape[3], stored=False)
    scale = (expected[0].square() + expected[1]).sqrt().norm()
    assert float((mean.cpu().double() - expected[0]).norm() / scale) <= bound
    assert float((var.cpu().double() - expected[1]).norm() / scale.square().clamp_min(1)) <= bound


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("per_sample", [False, True])
def test_moments_of_a_large_mean(layout, per_sample):
    x = torch.randn((16, 64, 56, 56), generator=torch.Generator().manual_seed(0)) + 1e4
    x = x.contiguous(memory_format=layout)
    mean, var = operators.channel_moments(x.cuda(), per_sample)
    dims = (2, 3) if per_sample else (0, 2, 3)
    torch.testing.assert_close(var.cpu().double(), x.double().var(dims, correction=0), rtol=1e-3, atol=0)
    torch.testing.assert_close(mean.cpu().double(), x.double().mean(dims), rtol=torch.finfo(x.dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_kept_and_rounded_to_nearest_even(dtype):
    bits = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16)
    x = bits.view(dtype).reshape(1, 1, 256, 256).cuda()
    y = operators.weighted_sum([x], torch.ones(1, 1, device="cuda"))
    torch.testing.assert_close(y, x, equal_nan=True, rtol=0, atol=0)
    factor = (torch.randn(64, 64) * torch.logspace(-9, 5, 64)).reshape(1, 4096).cuda()
    y = operators.weighted_sum([torch.ones(1, 4096, 1, 1, dtype=dtype, device="cuda")], factor)
    torch.testing.assert_close(y.flatten(), factor.flatten().to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("use_running", [False, True])
@pytest.mark.parametrize("norm", list(BranchNorm))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_block_coefficients(dtype, norm, use_running):
    """On the device against those of the CPU, with the table that they write."""
    results = []
    for device in ("cpu", "cuda"):
        blocks = [
            {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in block.items()}
            for block in vectors(300, 4, norm, dtype)
        ]
        table = torch.empty(4, TABLE_ROWS, 300, dtype=torch.float64, device=device)
        results.append([t for index, v in enumerate(blocks) for t in forward(table, index, v, use_running)] + [table])
    for found, wanted in zip(results[1], results[0], strict=True):
        assert found.is_cuda and found.dtype == wanted.dtype
        assert_close(found.cpu(), wanted, dtype)


@pytest.mark.parametrize("num_blocks", [3, 19])
@pytest.mark.parametrize("norm", list(BranchNorm))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_map_coefficients_backward(dtype, norm, num_blocks):
    """Against autograd in float64; every third block with running statistics, every fifth without a gradient."""
    running, reached = zip(*((k % 3 == 0, k % 5 != 1) for k in range(num_blocks)), strict=True)
    stage = Stage(300, norm, dtype, running, reached)
    operator = torch.ops.ernet.map_coefficients_backward.default
    for index in reversed(range(num_blocks + 1)):
        arguments = {
            name: on_gpu(*v) if isinstance(v, list) else v.cuda() if isinstance(v, torch.Tensor) else v
            for name, v in stage.arguments(index, pass_on=index == 0).items()
        }
        results = operator(*arguments.values())
        assert all(t.is_cuda for t in results)
        stage.check(arguments, results)


def test_not_a_number_and_infinity():
    x = torch.tensor([float("nan"), float("inf"), float("-inf"), -0.0, 0.0, 1.0], device="cuda").reshape(1, 6, 1, 1)
    y = operators.weighted_sum([x], torch.ones(1, 6, device="cuda"), None, True)
    torch.testing.assert_close(y, x.relu(), equal_nan=True, rtol=0, atol=0)
    leaf = x.clone().requires_grad_()
    leaf.relu().sum().backward()
    torch.testing.assert_close(operators.weighted_dot(torch.ones_like(x), [x], x.relu())[2], leaf.grad)
    assert bool(operators.channel_moments(x)[1][:3].isnan().all())


@pytest.mark.parametrize("shape", [(0, 5, 3, 3), (2, 5, 0, 3), (2, 0, 3, 3)])
def test_empty_maps(shape):
    x = torch.ones(shape, device="cuda")
    assert operators.weighted_sum([x, x], torch.ones(2, shape[1], device="cuda")).shape == shape
    da, db, _ = operators.weighted_dot(x, [x], None)
    assert not bool(da.any()) and not bool(db.any())
    sums, g = operators.map_dots(x, x, x, [x])
    assert sums.shape == (3, shape[1]) and not bool(sums.any()) and g.shape == shape
    mean, var = operators.channel_moments(x)
    assert mean.shape == var.shape == (shape[1],) and bool(var.isnan().all())


def everything(maps, a):
    dy, y, *rest = maps
    return [
        *operators.channel_moments(dy),
        *operators.channel_moments(dy, True),
        operators.weighted_sum(rest, a, None, True),
        *operators.weighted_dot(dy, rest, y),
        *operators.weighted_dot(dy, rest, y, True),
        *operators.map_dots(dy, rest[0], y, rest[1:]),
        *operators.map_dots(dy, rest[0], y, rest[1:], True),
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_repeats_are_identical(dtype, layout):
    maps = on_gpu(*maps_like((32, 192, 28, 28), 6, dtype, layout))
    a = torch.randn(4, 192, dtype=operators.acc_dtype(maps[0]), device="cuda")
    first = everything(maps, a)
    for _ in range(5):
        assert all(torch.equal(x, y) for x, y in zip(first, everything(maps, a), strict=True))
    one = operators.weighted_dot(maps[0][3:4], [x[3:4] for x in maps[2:]], maps[1][3:4], True)
    whole = operators.weighted_dot(maps[0], maps[2:], maps[1], True)
    assert torch.equal(whole[0][:, 3:4], one[0]) and torch.equal(whole[1][3:4], one[1])


def test_side_stream():
    """Work goes to the current stream: inputs written there, late, are what it sees."""
    maps = on_gpu(*maps_like((8, 64, 28, 28), 6, torch.float32, torch.channels_last))
    a = torch.randn(4, 64, device="cuda")
    expected = everything(maps, a)
    late = [torch.zeros_like(x) for x in maps]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        for target, source in zip(late, maps, strict=True):
            target.copy_(source)
        found = everything(late, a)
    stream.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_cuda_graph():
    maps = on_gpu(*maps_like((8, 64, 28, 28), 14, torch.bfloat16, torch.channels_last))
    a = torch.randn(12, 64, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        everything(maps, a)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = everything(maps, a)
    for seed in (1, 2):
        for target, source in zip(
            maps, maps_like((8, 64, 28, 28), 14, torch.bfloat16, torch.channels_last, seed), strict=True
        ):
            target.copy_(source)
        graph.replay()
        assert all(torch.equal(x, y) for x, y in zip(captured, everything(maps, a), strict=True))


def test_nothing_waits_for_the_device():
    maps = on_gpu(*maps_like((8, 64, 28, 28), 14, torch.bfloat16, torch.channels_last))
    a = torch.randn(12, 64, device="cuda")
    stage = ernet_fast.ERStage(64, 64, 3).cuda().to(memory_format=torch.channels_last)
    x = torch.randn(4, 64, 14, 14, device="cuda").contiguous(memory_format=torch.channels_last)
    everything(maps, a)
    stage(x).sum().backward()
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything(maps, a)
        stage(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_device_of_the_maps_not_the_current_one():
    maps = [x.to("cuda:1") for x in maps_like((2, 8, 7, 7), 6, torch.float32, torch.channels_last)]
    a = torch.randn(4, 8, device="cuda:1")
    with torch.cuda.device(0):
        found = everything(maps, a)
    with torch.cuda.device(1):
        expected = everything(maps, a)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_than_2_to_31_elements(layout):
    """The last elements of a map of 2^31 + 2^27 elements, and its sums, which are known."""
    samples, channels, size = 17, 128, 1024
    free = torch.cuda.mem_get_info()[0]
    needed = 2 * samples * channels * size * size * torch.bfloat16.itemsize
    if free < 1.3 * needed:
        pytest.skip(f"needs {1.3 * needed / 2**30:.0f} GiB of free device memory; there are {free / 2**30:.0f}")
    x = torch.empty((samples, channels, size, size), dtype=torch.bfloat16, device="cuda", memory_format=layout)
    value = torch.arange(channels, device="cuda") - 60.0
    x.copy_(value[:, None, None])
    x[-1, :, -1, -1] = 100.0
    a = torch.linspace(-2, 2, channels, device="cuda")[None]
    y = operators.weighted_sum([x], a)
    torch.testing.assert_close(y[-1, :, -1, -1], (100 * a[0]).bfloat16())
    torch.testing.assert_close(y[-1, :, -1, -2], (value * a[0]).bfloat16())
    torch.testing.assert_close(y[0, :, 0, 0], (value * a[0]).bfloat16())
    del y
    count = samples * size * size
    mean, var = operators.channel_moments(x)
    torch.testing.assert_close(mean.double(), value.double() + (100.0 - value) / count, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        var.double(), (100.0 - value).double().square() * (count - 1) / count**2, rtol=1e-3, atol=1e-12
    )
    da, db, g = operators.weighted_dot(x, [x], x)
    positive = value.clamp_min(0).double()
    torch.testing.assert_close(db.double(), positive * (count - 1) + 100, rtol=1e-5, atol=0)
    torch.testing.assert_close(da[0].double(), positive.square() * (count - 1) + 1e4, rtol=1e-5, atol=0)
    assert torch.equal(g[-1, :, -1, -2], value.clamp_min(0).bfloat16()) and bool((g[-1, :, -1, -1] == 100).all())
    del g
    sums, g = operators.map_dots(x, x, x, [])
    torch.testing.assert_close(sums, torch.stack([da[0], db]).double(), rtol=1e-6, atol=0)
    assert torch.equal(g[-1, :, -1, -2], value.clamp_min(0).bfloat16()) and bool((g[-1, :, -1, -1] == 100).all())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("norm", "groups"), [("batch", None), ("group", 4)])
def test_stage_fused_and_naive_agree(norm, groups, layout):
    """Values and every gradient of a stage in float64, and that the fused one runs the operators."""
    torch.manual_seed(0)
    fused = ernet_fast.ERStage(24, 32, 4, norm=norm, num_groups=groups).double().cuda().to(memory_format=layout)
    for parameter in fused.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    naive = copy.deepcopy(fused)
    naive.fused = False
    x = torch.randn(5, 24, 9, 7, dtype=torch.float64, device="cuda").contiguous(memory_format=layout)
    results = []
    for stage in (fused, naive):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            y = stage(leaf)
            (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device="cuda").view_as(y)).sum().backward()
        assert any(event.name.startswith("ernet::") for event in profile.events()) is (stage is fused)
        gradients = {name: p.grad for name, p in stage.named_parameters()}
        results.append({"y": y.detach(), "x": leaf.grad, **gradients, **dict(stage.named_buffers())})
    for name, expected in results[1].items():
        torch.testing.assert_close(
            results[0][name].double(),
            expected.double(),
            rtol=1e-8,
            atol=1e-9 * float(expected.double().norm()),
            msg=lambda m, n=name: f"{n}: {m}",
        )


def test_function_agrees_with_the_reference():
    xs = on_gpu(*maps_like((4, 24, 14, 14), 5, torch.float64, torch.channels_last))
    weight = torch.randn(4, 24, dtype=torch.float64, device="cuda")
    torch.testing.assert_close(
        ernet_fast.er_shortcut_sum(xs, weight, relu=True), reference.er_shortcut_sum(xs, weight, relu=True)
    )


def test_opcheck():
    dy, *maps = (x.requires_grad_() for x in on_gpu(*maps_like((2, 3, 5, 4), 3, torch.float32, LAYOUTS[1])))
    a, b = torch.randn(2, 3, device="cuda", requires_grad=True), torch.randn(3, device="cuda", requires_grad=True)
    ops = torch.ops.ernet
    torch.library.opcheck(ops.channel_moments.default, (dy, False))
    torch.library.opcheck(ops.weighted_sum.default, (maps, a, b, True))
    torch.library.opcheck(ops.weighted_dot.default, (dy, maps, maps[0].detach(), False))
    torch.library.opcheck(ops.weighted_dot.default, (dy, maps, None, True))
    z, dy, *maps = (x.detach() for x in (maps[0], dy, *maps))
    checks = ("test_schema", "test_faketensor")  # it has no autograd of its own
    torch.library.opcheck(ops.map_dots.default, (z, dy, z, maps, False), test_utils=checks)
    torch.library.opcheck(ops.map_dots.default, (z, None, None, maps, True), test_utils=checks)


def test_devices_that_differ_are_named():
    x, a = torch.ones(2, 3, 4, 4, device="cuda"), torch.ones(1, 3, device="cuda")
    with pytest.raises(RuntimeError, match="a must be on the device of the maps"):
        operators.weighted_sum([x], a.cpu())
    with pytest.raises(RuntimeError, match=r"maps\[1\] is on cpu"):
        operators.weighted_sum([x, x.cpu()], torch.ones(2, 3, device="cuda"))
