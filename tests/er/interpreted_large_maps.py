"""The last program of each Triton kernel on maps of more than 2^31 elements, in Triton's interpreter.

The maps are address space only: memory is used for the pages that the one program touches. NumPy's 32-bit integers,
of which the interpreter makes the kernels', wrap around as those of a GPU do. Run by test_triton_interpreter.py.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from er_cases import LAYOUTS
from triton.runtime import interpreter

from ernet_fast.er.triton import map_kernels, map_launch, tiling
from ernet_fast.er.triton.tiling import Shape, reduction, sum_tile

SHAPE = (17, 128, 1024, 1024)
ELEMENTS = 2**31 + 2**27


def address_space(layout: torch.memory_format) -> torch.Tensor:
    """A bfloat16 map of zeros that takes no memory before it is touched."""
    pages = mmap.mmap(-1, 2 * ELEMENTS, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    flat = torch.from_numpy(np.frombuffer(pages, dtype=np.int16)).view(torch.bfloat16)
    n, c, h, w = SHAPE
    return flat.view(n, c, h, w) if layout == torch.contiguous_format else flat.view(n, h, w, c).permute(0, 3, 1, 2)


class LastPrograms:
    """Stands for the module of kernels: runs the last program of a launch, and keeps the launch's arguments."""

    def __init__(self) -> None:
        self.launches: list[tuple[str, int, tuple[Any, ...]]] = []

    def __getattr__(self, name: str) -> Any:
        kernel, launches = getattr(map_kernels, name), self.launches

        class Kernel:
            def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
                def launch(*arguments: Any, **constants: Any) -> None:
                    launches.append((name, grid[0], arguments))
                    if not name.startswith("merge"):
                        kernel[(1,)](*arguments, **constants)

                return launch

        return Kernel()


@pytest.fixture
def last_programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[LastPrograms]:
    kernels = LastPrograms()
    builder = interpreter.interpreter_builder

    def last(*_: int) -> None:
        builder.grid_idx = (kernels.launches[-1][1] - 1, 0, 0)

    monkeypatch.setattr(builder, "set_grid_idx", last)
    # tensors of the CPU are not copied there and back; the interpreter would touch all of them
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)
    monkeypatch.setattr(map_launch, "kernels", lambda: kernels)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    monkeypatch.setattr(tiling, "_PROGRAMS", 1 << 15)  # short slabs: the interpreter is slow
    tiling.reduction.cache_clear()
    yield kernels
    tiling.reduction.cache_clear()


@pytest.fixture(params=LAYOUTS)
def large(request: pytest.FixtureRequest) -> torch.Tensor:
    """Zeros, with 1, 2, 3, ... in the channels of its last pixel and 7 in its first value."""
    x = address_space(request.param)
    x[-1, :, -1, -1] = torch.arange(1, 129)
    x[0, 0, 0, 0] = 7
    return x


def shape_of(x: torch.Tensor, per_sample: bool) -> Shape:
    return Shape(17, 128, 1 << 20, not x.is_contiguous(), per_sample)


@pytest.mark.parametrize("per_sample", [False, True])
def test_weighted_sum(last_programs, large, per_sample):
    scale = 2.0 ** (torch.arange(128) % 3)  # exact: the interpreter rounds to bfloat16 its own way
    a = scale[None].clone()
    if per_sample:
        a = torch.zeros(1, 17, 128)
        a[:, -1] = scale
    y = map_launch.weighted_sum([large], a, None, False)
    tile, _ = sum_tile(shape_of(large, per_sample), 2)
    channels = min(tile.rows, 128) if large.is_contiguous() else 128  # of the last tile
    expected = (large[-1, :, -1, -1].float() * scale).bfloat16()
    assert torch.equal(y[-1, -channels:, -1, -1], expected[-channels:])
    assert float(y[0, 0, 0, 0]) == 0  # nothing was written there instead


@pytest.mark.parametrize("per_sample", [False, True])
def test_reductions(last_programs, large, per_sample):
    """The last program of weighted_dot, map_dots and channel_moments: sums over the last slab of pixels."""
    cut = reduction(shape_of(large, per_sample), 2)
    channels = cut.tile.rows if large.is_contiguous() else 128
    values = torch.arange(1.0, 129.0)[-channels:]
    map_launch.weighted_dot(large, [large], large, per_sample)
    name, programs, (_, _, _, g, _, partial, *_) = last_programs.launches[0]
    assert name == "map_dots_kernel" and programs == cut.programs
    assert torch.equal(partial[-1, 0, -1, -channels:], values.square())
    assert torch.equal(partial[-1, 1, -1, -channels:], values)
    assert torch.equal(g[-1, -channels:, -1, -1].float(), values) and float(g[0, 0, 0, 0]) == 0

    if not per_sample:
        last_programs.launches.clear()
        map_launch.map_dots(large, large, large, [large])
        name, programs, (_, _, _, g, _, partial, *_) = last_programs.launches[0]
        assert name == "map_dots_kernel" and programs == cut.programs
        assert torch.equal(partial[-1, :, 0, -channels:], torch.stack([values**2, values**2, values]))
        assert torch.equal(g[-1, -channels:, -1, -1].float(), values) and float(g[0, 0, 0, 0]) == 0

    last_programs.launches.clear()
    map_launch.channel_moments(large, per_sample)
    name, programs, (_, partial, *_) = last_programs.launches[0]
    pixels = cut.runs * cut.run_length - (cut.slabs - 1) * cut.units_per_slab * cut.step
    assert name == "channel_moments_kernel" and programs == cut.programs and pixels > 0
    torch.testing.assert_close(partial[-1, 0, -1, -channels:], values / pixels)
    torch.testing.assert_close(partial[-1, 1, -1, -channels:], values.square() * (1 - 1 / pixels))
