"""How the Triton ER kernels cut a map into tiles, slabs and programs: by shape alone, never by the device."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

SUM_WARPS = 8
REDUCTION_WARPS = 4  # these need many registers: small programs leave fewer of them unused
_LOAD_BYTES = 16
_SUM_LOADS = 2  # 16-byte loads of a map by each thread of weighted_sum: its coefficients serve both
_CHANNELS = 128  # of a channels-last tile: fewer than threads, so that coefficients are loaded straight into registers
_PLANAR_COLS = (64, 128, 256, 512)
_PROGRAMS = 2048  # of a reduction, about: several for each processor of a large GPU, with few partial results
_LEAST_UNITS = 8  # of a slab, so that the partial results stay small beside the maps; larger slabs are multiples


class Shape(NamedTuple):
    """A map of N samples, C channels and P pixels, its layout, and whether results are per sample."""

    N: int
    C: int
    P: int
    channels_last: bool
    per_sample: bool

    @property
    def groups(self) -> int:
        """How many groups of pixels have results or coefficients of their own."""
        return self.N if self.per_sample else 1


class Tile(NamedTuple):
    """Size of a tile, a power of two that divides the length of a row, and whether offsets need 64 bits."""

    rows: int
    cols: int
    align: int
    wide: bool


class Reduction(NamedTuple):
    """The work of a reduction; see the comment in `map_kernels`."""

    tile: Tile
    runs: int
    run_length: int
    step: int
    units_per_slab: int
    slabs: int
    programs: int


def ceil_div(a: int, b: int) -> int:
    """`a / b`, rounded up."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least `n`."""
    return 1 << max(n - 1, 0).bit_length()


def padded_count(num_maps: int) -> int:
    """Pointers that a kernel takes for `num_maps` maps: a power of two, 2 at least."""
    return max(2, power_of_two(num_maps))


def _tile(shape: Shape, itemsize: int, loads: int) -> Tile:
    """A tile that takes `loads` 16-byte loads."""
    elements = loads * (_LOAD_BYTES // itemsize)
    length = shape.C if shape.channels_last else shape.P
    if shape.channels_last:
        cols = min(power_of_two(length), _CHANNELS)
    elif length <= _PLANAR_COLS[0]:
        cols = power_of_two(length)
    else:  # the least padding; of equals, the widest
        widths = [width for width in reversed(_PLANAR_COLS) if width <= elements]
        cols = min(widths, key=lambda width: ceil_div(length, width) * width)
    rows = elements // cols
    wide = (rows - 1) * length + cols > 2**31 - 1
    return Tile(rows, cols, math.gcd(length, _LOAD_BYTES // itemsize), wide)


@functools.lru_cache(maxsize=1024)
def sum_tile(shape: Shape, itemsize: int) -> tuple[Tile, int]:
    """The tile of weighted_sum, and how many of them there are."""
    tile = _tile(shape, itemsize, 32 * SUM_WARPS * _SUM_LOADS)
    if shape.channels_last:
        groups, rows, length = shape.groups, shape.N * shape.P // shape.groups, shape.C
    else:
        groups, rows, length = 1, shape.N * shape.C, shape.P
    return tile, groups * ceil_div(rows, tile.rows) * ceil_div(length, tile.cols)


@functools.lru_cache(maxsize=1024)
def reduction(shape: Shape, itemsize: int) -> Reduction:
    """How weighted_dot and channel_moments are cut. With results per sample, a sample is cut as if it were alone."""
    tile = _tile(shape, itemsize, 32 * REDUCTION_WARPS)
    samples = 1 if shape.per_sample else shape.N
    if shape.channels_last:
        runs, run_length, step, channels = 1, samples * shape.P, tile.rows, tile.cols
    else:
        runs, run_length, step, channels = samples, shape.P, tile.cols, tile.rows
    units = runs * ceil_div(run_length, step)
    blocks = ceil_div(shape.C, channels)
    units_per_slab = _LEAST_UNITS * ceil_div(units, _LEAST_UNITS * max(1, _PROGRAMS // blocks))
    slabs = ceil_div(units, units_per_slab)
    return Reduction(tile, runs, run_length, step, units_per_slab, slabs, shape.groups * slabs * blocks)


def merge_tile(slabs: int) -> tuple[int, int]:
    """Slabs and columns that a program of a merge loads together: whole sectors of 32 bytes, and many programs."""
    return (1, 1024) if slabs == 1 else (128, 8)
