"""The ER operators on feature maps on CUDA devices: argument checks and launches of the Triton kernels.

Nothing here waits for the device, and every result is allocated by PyTorch, so calls can be captured in a CUDA graph
(after one call outside it, which compiles the kernels). Triton itself is imported by the first call.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NoReturn

import torch
from torch import Tensor

from ernet_fast.er.triton import tiling
from ernet_fast.er.triton.tiling import REDUCTION_WARPS, SUM_WARPS, Shape, ceil_div, merge_tile, padded_count

MAX_SUM_MAPS = 256
_DOT_MAPS = 8  # whose sums a program of weighted_dot keeps in registers
_MOMENT_UNITS = 8  # tiles of channel_moments that are loaded together
_ACCUMULATE = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}


@functools.lru_cache(maxsize=1)
def kernels() -> ModuleType:
    """The module of the kernels on maps."""
    from ernet_fast.er.triton import map_kernels  # here, because it imports triton

    return map_kernels


@functools.lru_cache(maxsize=1)
def _interpreted() -> bool:
    """True under TRITON_INTERPRET=1: kernels run on the CPU, and so on CPU tensors."""
    import triton

    return not isinstance(kernels().weighted_sum_kernel, triton.JITFunction)


def fail(message: str) -> NoReturn:
    """Raise the error of an operator."""
    raise RuntimeError(f"ernet: {message}")


def _check_maps(maps: Sequence[Tensor], names: Sequence[str], rest: str, per_sample: bool) -> Shape:
    """One shape, dtype, device and dense layout; returns the shape. Maps after those of `names` are `rest[i]`."""

    def name_of(i: int) -> str:
        return names[i] if i < len(names) else f"{rest}[{i - len(names)}]"

    first = maps[0]
    if first.dim() != 4:
        fail(f"{name_of(0)} must have 4 dimensions [N, C, H, W]; got {list(first.shape)}")
    if first.dtype not in _ACCUMULATE:
        fail(f"{name_of(0)} must be float32, float64, bfloat16 or float16; got {first.dtype}")
    if not (first.is_cuda or _interpreted()):
        fail(f"{name_of(0)} must be on a CUDA device here; it is on {first.device}")
    planar = channels_last = True
    for i, x in enumerate(maps):
        if x.shape != first.shape:
            fail(f"all maps must have one shape; {name_of(i)} has {list(x.shape)}, expected {list(first.shape)}")
        if x.dtype != first.dtype:
            fail(f"all maps must have one dtype; {name_of(i)} has {x.dtype}, expected {first.dtype}")
        if x.device != first.device:
            fail(f"all maps must be on one device; {name_of(i)} is on {x.device}, expected {first.device}")
        planar = planar and x.is_contiguous()
        channels_last = channels_last and x.is_contiguous(memory_format=torch.channels_last)
    if not (planar or channels_last or first.numel() == 0):
        fail(
            "all maps must be dense in one layout, contiguous or channels-last. Call .contiguous() or "
            ".contiguous(memory_format=torch.channels_last) on the others"
        )
    samples, channels, height, width = first.shape
    pixels = height * width
    # Single pixels are dense in both layouts, and as rows of channels they make wide loads.
    return Shape(samples, channels, pixels, not planar or (channels_last and pixels == 1), per_sample)


def check_vector(
    t: Tensor, name: str, sizes: list[int], of: str, device: torch.device, dtypes: Sequence[torch.dtype], kinds: str
) -> None:
    """Contiguous, of these sizes, on the device of what `of` names, and of one of `dtypes`, which `kinds` says."""
    if list(t.shape) != sizes:
        fail(f"{name} must have shape {sizes}; got {list(t.shape)}")
    if t.device != device:
        fail(f"{name} must be on the device of the {of}, {device}; it is on {t.device}")
    if t.dtype not in dtypes:
        fail(f"{name} must be {kinds}; got {t.dtype}")
    if not (t.is_contiguous() or t.numel() == 0):
        fail(f"{name} must be contiguous")


def _check_coefficients(t: Tensor, name: str, sizes: list[int], like: Tensor) -> None:
    doubles = like.dtype == torch.float64
    kinds = "float64 for float64 maps" if doubles else "float32 for float32, bfloat16 and float16 maps"
    check_vector(t, name, sizes, "maps", like.device, (_ACCUMULATE[like.dtype],), kinds)


def _channel_sizes(shape: Shape) -> list[int]:
    return [shape.N, shape.C] if shape.per_sample else [shape.C]


class on_device_of:
    """For launches: the device of `x` is the current one, and a kernel that cannot be compiled says what to set."""

    __slots__ = ("device",)

    def __init__(self, x: Tensor) -> None:
        self.device = torch.cuda.device(x.device) if x.is_cuda else None

    def __enter__(self) -> None:
        if self.device is not None:
            self.device.__enter__()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if self.device is not None:
            self.device.__exit__(kind, error, trace)
        if isinstance(error, OSError):
            folder = os.environ.get("TRITON_CACHE_DIR") or "~/.triton/cache"
            raise RuntimeError(
                f"ernet: Triton could not compile a kernel: {error}. It writes them to {folder}; set TRITON_CACHE_DIR "
                "to a folder that can be written"
            ) from error


def padded(maps: Sequence[Tensor], fill: Tensor) -> tuple[Tensor, ...]:
    """`maps` and so many times `fill`, of which nothing is loaded, that kernels are compiled for few lengths."""
    return (*maps, *([fill] * (padded_count(len(maps)) - len(maps))))


def _constants(shape: Shape, tile: tiling.Tile, num_warps: int) -> dict[str, Any]:
    return {
        "CHANNELS_LAST": shape.channels_last,
        "ROWS": tile.rows,
        "COLS": tile.cols,
        "ALIGN": tile.align,
        "WIDE": tile.wide,
        "num_warps": num_warps,
    }


def _merge_dots(partial: Tensor | None, products: Tensor, sums: Tensor) -> None:
    """Add up the slabs of `partial`: its first columns to `products`, the others to `sums`. None: of no pixels."""
    if partial is None:
        products.zero_()
        sums.zero_()
        return
    slabs, columns = partial.shape[0], partial[0].numel()
    slabs_together, columns_together = merge_tile(slabs)
    with on_device_of(partial):
        kernels().merge_dot_kernel[(ceil_div(columns, columns_together),)](
            partial, products, sums, slabs, columns, products.numel(), SLABS=slabs_together, COLS=columns_together
        )


def slab_moments(x: Tensor, per_sample: bool) -> tuple[Shape, tuple[tiling.Reduction, Tensor] | None]:
    """Moments of each slab, [slabs, 2, groups, C], see `channel_moments_kernel`, or None where maps are empty."""
    shape = _check_maps([x], ["x"], "", per_sample)
    if x.numel() == 0:
        return shape, None
    cut = tiling.reduction(shape, x.element_size())
    partial = x.new_empty((cut.slabs, 2, shape.groups, shape.C), dtype=_ACCUMULATE[x.dtype])
    with on_device_of(x):
        kernels().channel_moments_kernel[(cut.programs,)](
            x,
            partial,
            shape.groups,
            shape.C,
            cut.runs,
            cut.run_length,
            cut.units_per_slab,
            DOUBLE=x.dtype == torch.float64,
            UNITS=_MOMENT_UNITS,
            **_constants(shape, cut.tile, REDUCTION_WARPS),
        )
    return shape, (cut, partial)


def channel_moments(x: Tensor, per_sample: bool) -> tuple[Tensor, Tensor]:
    """`ernet::channel_moments` on a CUDA device: mean and biased variance, [C] or [N, C]."""
    shape, slabs = slab_moments(x, per_sample)
    mean, var = (x.new_empty(_channel_sizes(shape), dtype=_ACCUMULATE[x.dtype]) for _ in range(2))
    if slabs is None:
        return mean.zero_(), var.fill_(float("nan"))
    cut, partial = slabs
    columns = shape.groups * shape.C
    slabs_together, columns_together = merge_tile(cut.slabs)
    with on_device_of(x):
        kernels().merge_moments_kernel[(ceil_div(columns, columns_together),)](
            partial,
            mean,
            var,
            cut.slabs,
            columns,
            cut.runs,
            cut.run_length,
            cut.units_per_slab,
            STEP=cut.step,
            SLABS=slabs_together,
            COLS=columns_together,
        )
    return mean, var


def weighted_sum(maps: Sequence[Tensor], a: Tensor, b: Tensor | None, relu: bool) -> Tensor:
    """`ernet::weighted_sum` on a CUDA device: `sum_l a[l] * maps[l] + b`, then ReLU if asked."""
    if not maps:
        fail("maps must hold at least one map")
    if len(maps) > MAX_SUM_MAPS:
        fail(f"maps must hold at most {MAX_SUM_MAPS} maps on a CUDA device; got {len(maps)}")
    shape = _check_maps(maps, [], "maps", a.dim() == 3)
    sizes = _channel_sizes(shape)
    if b is not None:
        _check_coefficients(b, "b", sizes, maps[0])
    _check_coefficients(a, "a", [len(maps), *sizes], maps[0])
    y = torch.empty_like(maps[0])
    if y.numel() == 0:
        return y
    tile, tiles = tiling.sum_tile(shape, y.element_size())
    channels_last = shape.channels_last
    with on_device_of(y):
        kernels().weighted_sum_kernel[(tiles,)](
            padded(maps, maps[0]),
            a,
            b,
            y,
            len(maps),
            shape.groups,
            shape.N * shape.P // shape.groups if channels_last else shape.N * shape.C,
            shape.C if channels_last else shape.P,
            shape.groups * shape.C,
            RELU=relu,
            **_constants(shape, tile, SUM_WARPS),
        )
    return y


def slab_dots(
    z: Tensor | None, dy: Tensor | None, y: Tensor | None, others: Sequence[Tensor], others_name: str, per_sample: bool
) -> tuple[Shape, Tensor | None, Tensor]:
    """Inner products of each slab, see `map_dots_kernel`, or None where maps or rows are empty; and g."""
    own = {name: x for name, x in (("z", z), ("dy", dy), ("y", y)) if x is not None}
    shape = _check_maps([*own.values(), *others], list(own), others_name, per_sample)
    like = next(iter(own.values()))
    g = like.new_empty((0,)) if y is None else torch.empty_like(like)
    num_rows = len(others) + (0 if dy is None else 1 if z is None else 2)
    if like.numel() == 0 or num_rows == 0:
        return shape, None, g
    cut = tiling.reduction(shape, like.element_size())
    partial = like.new_empty((cut.slabs, num_rows, shape.groups, shape.C), dtype=_ACCUMULATE[like.dtype])
    with on_device_of(like):
        for first in range(0, max(1, len(others)), _DOT_MAPS):
            some = others[first : first + _DOT_MAPS]
            read: tuple[Tensor | None, ...] = (z, dy, y, g if y is not None else None)
            if first > 0:  # z or g is multiplied with the other maps alone
                read = (g if z is None and y is not None else like, None, None, None)
            kernels().map_dots_kernel[(cut.programs,)](
                *read,
                padded(some, like),
                partial[:, first:],
                len(some),
                num_rows,
                shape.groups,
                shape.C,
                cut.runs,
                cut.run_length,
                cut.units_per_slab,
                **_constants(shape, cut.tile, REDUCTION_WARPS),
            )
    return shape, partial, g


def weighted_dot(
    dy: Tensor, maps: Sequence[Tensor], y: Tensor | None, per_sample: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`ernet::weighted_dot` on a CUDA device: da, db and g (empty without `y`)."""
    if not maps:
        fail("maps must hold at least one map")
    shape, partial, g = slab_dots(None, dy, y, maps, "maps", per_sample)
    sizes, dtype = _channel_sizes(shape), _ACCUMULATE[dy.dtype]
    da, db = dy.new_empty((len(maps), *sizes), dtype=dtype), dy.new_empty(sizes, dtype=dtype)
    _merge_dots(partial, da, db)
    return da, db, g


def map_dots(
    z: Tensor, dy: Tensor | None, y: Tensor | None, later_g: Sequence[Tensor], per_sample: bool = False
) -> tuple[Tensor, Tensor]:
    """`ernet::map_dots` on a CUDA device: inner products of a map with the gradients of the sums that read it.

    Args:
        z: the map [N, C, H, W].
        dy: gradient of the output of its own block, or None.
        y: that output if it went through a ReLU, else None.
        later_g: gradients of later blocks' sums, in any number.
        per_sample: sums over H and W alone.

    Returns:
        sums: float64 [later + 2, C], or [later + 2, N, C]: of z * later_g_l, then with dy those of z * g and of g.
        g: `dy where y > 0 or y is NaN`; empty without y.
    """
    if y is not None and dy is None:
        fail("y needs dy, the gradient of y")
    shape, partial, g = slab_dots(z, dy, y, later_g, "later_g", per_sample)
    num_rows = len(later_g) + (0 if dy is None else 2)
    sums = z.new_empty((num_rows, *_channel_sizes(shape)), dtype=torch.float64)
    _merge_dots(partial, sums, sums)
    return sums, g
