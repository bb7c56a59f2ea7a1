"""A stage as CUDA devices compute it, with its kernels in Triton's interpreter, against that of the CPU.

Run by test_triton_interpreter.py in a process of its own with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from er_cases import LAYOUTS
from map_gradient_cases import Stage as Algebra
from stage_cases import CHANNELS, STEPS, Tails
from test_coefficients import COUNT, EPS, NORM_EPS, vectors
from triton_operators import as_on_cuda

from ernet_fast.er.epilogue_arguments import TABLE_ROWS, BranchNorm
from ernet_fast.er.triton import coefficient_launch, map_launch, tiling


def trained(stage: Tails, maps: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Outputs, gradients and updated statistics of a step."""
    maps = [z.detach().clone(memory_format=torch.preserve_format).requires_grad_() for z in maps]
    ys = stage(*maps)
    (ys * torch.linspace(-1, 1, ys.numel(), dtype=ys.dtype).view_as(ys)).sum().backward()
    found = {f"z {i}": z.grad for i, z in enumerate(maps)} | {"y": ys.detach()} | dict(stage.named_buffers())
    return found | {name: p.grad for name, p in stage.named_parameters()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False])
def test_a_step(training, layout):
    stage = Tails(4, "batch" + STEPS).double().train(training)
    maps = [torch.randn(3, CHANNELS, 7, 5, dtype=torch.float64).contiguous(memory_format=layout) for _ in range(4)]
    expected = trained(copy.deepcopy(stage), maps)
    with as_on_cuda() as found:
        actual = trained(stage, maps)
    counts = {name: found.calls.count(f"ernet::{name}") for name in ("measured_coefficients", "map_backward")}
    # in evaluation no map is measured
    assert counts == {"measured_coefficients": 4 if training else 0, "map_backward": 4}, found.calls
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name],
            value,
            rtol=1e-10,
            atol=1e-11 * float(value.double().norm()),
            msg=lambda m, n=name: f"{n}: {m}",
        )


SHAPE = (2, 8, 12, 13)
# one slab, or more than are merged together, which take the interpreter long
CUTS = [(torch.channels_last, False), (torch.contiguous_format, False), (torch.channels_last, True)]


@pytest.fixture
def many_slabs(request, monkeypatch):
    """Cuts maps into more slabs than are merged together, or not."""
    if request.param:
        for name, value in (("_LEAST_UNITS", 1), ("_LOAD_BYTES", 8), ("_CHANNELS", 8)):
            monkeypatch.setattr(tiling, name, value)
        for module in (map_launch, coefficient_launch):
            monkeypatch.setattr(module, "merge_tile", lambda slabs: (8, 8))
    tiling.reduction.cache_clear()
    yield request.param
    tiling.reduction.cache_clear()


@pytest.mark.parametrize(("layout", "many_slabs"), CUTS, indirect=["many_slabs"])
def test_measured_coefficients(layout, many_slabs):
    """Those of `block_coefficients` with the same moments, which it gets in float64."""
    z = torch.randn(SHAPE, dtype=torch.float64).contiguous(memory_format=layout) + 50
    if many_slabs:
        assert tiling.reduction(tiling.Shape(2, 8, 12 * 13, True, False), 8).slabs > 16
    results: list[list[torch.Tensor]] = []
    for together in (True, False):
        table, results_of = torch.zeros(3, TABLE_ROWS, SHAPE[1], dtype=torch.float64), []
        for index, v in enumerate(vectors(SHAPE[1], 1 if many_slabs else 3, BranchNorm.BATCH, torch.float64)):
            moving = [v[name].clone() for name in ("norm_mean", "norm_var", "running_mean", "running_var")]
            rest = (
                int(BranchNorm.BATCH), v["gamma"], v["beta"], *moving[:2], torch.tensor(3), 0.1, NORM_EPS, v["weight"],
                *moving[2:], torch.tensor(5), False, 0.1, EPS,
            )  # fmt: skip
            if together:
                found = coefficient_launch.measured_coefficients(z, table, index, *rest)
            else:
                moments = map_launch.channel_moments(z, False)
                found = coefficient_launch.block_coefficients(
                    table, index, True, *moments, None, z[:, 0].numel(), *rest
                )
            results_of += [*found, *moving]
        results.append([table, *results_of])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize(("own", "num_later"), [(True, 0), (True, 5), (False, 2), (True, 18)])
@pytest.mark.parametrize(("layout", "many_slabs"), CUTS, indirect=["many_slabs"])
def test_map_backward(own, num_later, layout, many_slabs):
    """The bits of `map_coefficients_backward` with the sums of `map_dots`."""
    channels = SHAPE[1]
    z, dy, y, *later_g = (
        torch.randn(SHAPE, generator=torch.Generator().manual_seed(k)).contiguous(memory_format=layout)
        for k in range(num_later + 3)
    )
    dy, y = (dy, y.relu()) if own else (None, None)
    algebra = Algebra(channels, BranchNorm.BATCH, torch.float32, [k % 3 == 1 for k in range(num_later + own)])
    index = int(own)
    results: list[list[Any]] = []
    for together in (True, False):
        arguments = algebra.arguments(index, elements=z[:, 0].numel())
        arguments["a"] = arguments["a"] if own else None
        arguments["later_dweight"] = [torch.full_like(t, torch.nan) for t in arguments["later_dweight"]]
        if together:
            rest = {name: v for name, v in arguments.items() if name not in ("sums", "count", "elements")}
            found = list(coefficient_launch.map_backward(z, dy, y, later_g, *rest.values()))
        else:
            sums, g = map_launch.map_dots(z, dy, y, later_g)
            found = [*coefficient_launch.map_coefficients_backward(**(arguments | {"sums": sums}))[:4]]
            found += [sums[-1] if own else sums.new_empty(0), g]
        results.append([*found, *(t[index] for t in arguments["later_dweight"])])
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


def test_no_pixels():
    z = torch.ones(0, 3, 4, 5)
    table = torch.zeros(1, TABLE_ROWS, 3, dtype=torch.float64)
    none = (None,) * 5
    coefficient_launch.measured_coefficients(z, table, 0, 0, *none, 0.0, 0.0, *none[:4], False, 0.0, EPS)
    assert bool(table[0, 4].eq(0).all()) and bool(table[0, 5].isnan().all())
    algebra = Algebra(3, BranchNorm.BATCH, torch.float32, [False])
    rest = [v for k, v in algebra.arguments(1).items() if k not in ("sums", "count", "elements")]
    *_, db, g = coefficient_launch.map_backward(z, z, z, [], *rest)
    assert torch.equal(db, torch.zeros(3, dtype=torch.float64)) and g.shape == z.shape
    assert COUNT > 0


def test_what_is_wrong():
    z, table = torch.ones(2, 4, 3, 3), torch.zeros(1, TABLE_ROWS, 3, dtype=torch.float64)
    none = (None,) * 5
    with pytest.raises(RuntimeError, match="z must have the 3 channels of the table; got 4"):
        coefficient_launch.measured_coefficients(z, table, 0, 0, *none, 0.0, 0.0, *none[:4], False, 0.0, EPS)
    rest = [v for k, v in Algebra(3, BranchNorm.BATCH, torch.float32, [False]).arguments(0).items()
            if k not in ("sums", "count", "elements")]  # fmt: skip
    with pytest.raises(RuntimeError, match="z must have the 3 channels of the table; got 4"):
        coefficient_launch.map_backward(z, None, None, [z], *rest)
    with pytest.raises(RuntimeError, match="one map for each of later_a, and a goes with dy"):
        coefficient_launch.map_backward(z[:, :3].contiguous(), None, None, [], *rest)
