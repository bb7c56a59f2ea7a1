"""The ER operators on feature maps as Triton kernels: device code only, launched by `map_launch`.

    weighted_sum_kernel      y = sum_l a_l * maps_l + b, then ReLU if asked
    map_dots_kernel          g = dy where y > 0;  of each slab: inner products of one map, x or g, with several; sum g
    merge_dot_kernel         the sums over all slabs
    channel_moments_kernel   of each slab: mean and sum of squared deviations
    merge_moments_kernel     mean and biased variance of all slabs

A map is seen as a matrix whose rows are contiguous. Channels-last: a row is a pixel, its columns are channels. Planar
(contiguous [N, C, H, W]): a row is a plane, its columns are pixels. Programs work on tiles of ROWS x COLS elements.
A pointer that is None is compiled for as such, like a constant. Maps come as a tuple of pointers, padded to a few
lengths; `num_maps` of them are real and the loads of the others are masked off. So no table of addresses is copied to
the device, and no kernel is compiled for every count.

The place of a tile is a 64-bit scalar; offsets in it are 32-bit, or 64-bit with WIDE. ALIGN divides the length of a
row: with it the compiler proves that loads and stores of 16 bytes are aligned. Values are converted to float32
(float64 for float64 maps) as soon as they are loaded.
"""

# Triton has no starred tuples, and its tuples grow in loops that it unrolls.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

import triton
import triton.language as tl

# weighted_sum: maps that are loaded together. More loads in flight would need more registers and gain nothing.
MAPS_TOGETHER = tl.constexpr(8)


@triton.jit
def _aligned(length, ALIGN: tl.constexpr):
    """`length`, which ALIGN divides, in a form that shows it to the compiler."""
    return length // ALIGN * ALIGN


@triton.jit
def _tile(row_length, ROWS: tl.constexpr, COLS: tl.constexpr, WIDE: tl.constexpr):
    """Row numbers [ROWS, 1] and column numbers [1, COLS] of a tile, and the offsets of its elements [ROWS, COLS]."""
    row = tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, COLS)[None, :]
    if WIDE:
        return row, col, row.to(tl.int64) * row_length + col
    return row, col, row * row_length + col


@triton.jit(do_not_specialize=["num_maps", "groups", "rows", "row_length", "coefficients"])
def weighted_sum_kernel(
    maps,
    a,
    b,
    y,
    num_maps,
    groups,
    rows,
    row_length,
    coefficients,
    CHANNELS_LAST: tl.constexpr,
    RELU: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
):
    """`y = sum_l a_l * maps_l + b, then ReLU if asked`: a program writes one tile of y.

    Bytes: each map is read once and y written once, (L + 1) * elements * itemsize. That over the copy bandwidth is the
    floor. Coefficients (4 or 8 bytes for ROWS elements of a map, or COLS in the planar layout) come from the caches.

    Channels-last: `groups` groups of `rows` pixels, each with coefficients of its own for its `row_length` = C columns.
    Planar: one group of `rows` = N * C planes of `row_length` pixels. There are `coefficients` of them, C or N * C:
    a is [L, coefficients] and b [coefficients].
    """
    row_length = _aligned(row_length, ALIGN)
    col_tiles = tl.cdiv(row_length, COLS)
    row_tiles = tl.cdiv(rows, ROWS)
    tile = tl.program_id(0)
    col0 = (tile % col_tiles) * COLS
    tile_row = tile // col_tiles
    row0 = (tile_row % row_tiles).to(tl.int64) * ROWS
    group = (tile_row // row_tiles).to(tl.int64)

    row, col, offsets = _tile(row_length, ROWS, COLS, WIDE)
    row_mask = row < tl.minimum(rows - row0, ROWS).to(tl.int32)
    col_mask = col < row_length - col0
    inside = row_mask & col_mask
    place = (group * rows + row0) * row_length + col0
    if CHANNELS_LAST:
        coefficient = group * row_length + col0 + col
        stride = tl.cast(groups, tl.int64) * row_length  # = coefficients, but known to be a multiple of ALIGN
        known = col_mask
    else:
        coefficient = ((row0 % coefficients).to(tl.int32) + row) % coefficients
        stride = tl.cast(coefficients, tl.int64)
        known = row_mask

    total = tl.zeros([ROWS, COLS], a.dtype.element_ty)
    if b is not None:
        total += tl.load(b + coefficient, mask=known, other=0.0)
    for first in tl.static_range(0, len(maps), MAPS_TOGETHER):
        if first < num_maps:
            for i in tl.static_range(first, min(first + MAPS_TOGETHER, len(maps))):
                x = tl.load(maps[i] + place + offsets, mask=inside & (i < num_maps), other=0.0).to(total.dtype)
                total += x * tl.load(a + i * stride + coefficient, mask=known & (i < num_maps), other=0.0)
    if RELU:
        total = tl.where(total < 0.0, 0.0, total)  # NaN stays NaN
    tl.store(y + place + offsets, total.to(y.dtype.element_ty), mask=inside)


# The reductions see a map as groups (one, or one a sample) of `runs` runs of `run_length` pixels: a plane of each of
# its samples, or in channels-last one run of all its pixels. A unit is up to ROWS (planar: COLS) consecutive pixels of
# a run, a slab is `units_per_slab` units. A program reduces COLS (planar: ROWS) channels of one slab, tile by tile.


@triton.jit
def _start(
    channels,
    runs,
    run_length,
    units_per_slab,
    CHANNELS_LAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Where this program works, and how elements of a tile are numbered.

    Returns `channels` and `run_length`, one of which is known to be a multiple of ALIGN; tiles of a run; row, col and
    offsets of a tile; group, slab and first channel; the first unit and the one after the last, and the first one's
    run and tile.
    """
    if CHANNELS_LAST:
        channels = _aligned(channels, ALIGN)
        tiles = tl.cdiv(run_length, ROWS)
        blocks = tl.cdiv(channels, COLS)
        row, col, offsets = _tile(channels, ROWS, COLS, WIDE)
    else:
        run_length = _aligned(run_length, ALIGN)
        tiles = tl.cdiv(run_length, COLS)
        blocks = tl.cdiv(channels, ROWS)
        row, col, offsets = _tile(run_length, ROWS, COLS, WIDE)
    units = runs * tiles
    slabs = tl.cdiv(units, units_per_slab)
    program = tl.program_id(0)
    slab = (program // blocks) % slabs
    group = program // blocks // slabs
    channel0 = (program % blocks) * (COLS if CHANNELS_LAST else ROWS)
    begin = slab * units_per_slab
    end = tl.minimum(begin + units_per_slab, units)
    run = tl.cast(group, tl.int64) * runs + begin // tiles
    return channels, run_length, tiles, row, col, offsets, group, slab, channel0, begin, end, run, begin % tiles


@triton.jit
def _place(
    run,
    tile,
    channel0,
    channels,
    run_length,
    row,
    col,
    CHANNELS_LAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Where tile `tile` of a run starts in the map, and which of its elements [ROWS, COLS] exist."""
    step: tl.constexpr = ROWS if CHANNELS_LAST else COLS
    pixel0 = tile.to(tl.int64) * step
    left = tl.minimum(run_length - pixel0, step).to(tl.int32)
    if CHANNELS_LAST:
        return (run * run_length + pixel0) * channels + channel0, (row < left) & (col < channels - channel0)
    return (run * channels + channel0) * run_length + pixel0, (row < channels - channel0) & (col < left)


@triton.jit
def _next_tile(run, tile, tiles):
    """Run and number of the tile after this one."""
    last = tile + 1 == tiles
    return tl.where(last, run + 1, run), tl.where(last, 0, tile + 1)


@triton.jit
def _load_gradient(dy, y, g, place, inside, dtype: tl.constexpr):
    """A tile of dy as `dtype`; with y a tile of `g = dy where y > 0 or y is NaN`, which is written too."""
    gradient = tl.load(dy + place, mask=inside, other=0.0)
    if y is not None:
        off = tl.load(y + place, mask=inside, other=0.0).to(dtype) <= 0.0  # false for NaN
        gradient = tl.where(off, tl.zeros_like(gradient), gradient)
        tl.store(g + place, gradient, mask=inside)
    return gradient.to(dtype)


@triton.jit(do_not_specialize=["num_others", "num_rows", "groups", "channels", "runs", "run_length", "units_per_slab"])
def map_dots_kernel(
    x,
    dy,
    y,
    g,
    others,
    partial,
    num_others,
    num_rows,
    groups,
    channels,
    runs,
    run_length,
    units_per_slab,
    CHANNELS_LAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
):
    """`g = dy where y > 0`; partial[slab] = (sum x * others_l for each l, then with dy: sum x * g, sum g) of a slab.

    Without x: (sum g * others_l for each l, then sum g). partial is [slabs, num_rows, groups, channels], from the row
    of the first of `others` on; the sums of g, which is made by the launch that starts at row 0, are the last rows.
    More others than have accumulators in registers take further launches, without dy.

    Bytes: x, dy, y and n others are read once and g is written once, (n + 4) * elements * itemsize; without y (n + 2),
    without dy (n + 1), without x one less. Each further launch reads x, or g, once more. partial adds 4 bytes a slab,
    channel and row.
    """
    axis: tl.constexpr = 0 if CHANNELS_LAST else 1
    own: tl.constexpr = 0 if dy is None else 1 if x is None else 2
    channels, run_length, tiles, row, col, offsets, group, slab, channel0, begin, end, run, tile = _start(
        channels, runs, run_length, units_per_slab, CHANNELS_LAST, ROWS, COLS, ALIGN, WIDE
    )
    zeros = tl.zeros([ROWS, COLS], partial.dtype.element_ty)
    sums = ()  # of g, and with x of x * g; then of the others
    for _ in tl.static_range(own + len(others)):
        sums = sums + (zeros,)
    for _ in range(begin, end):
        place, inside = _place(run, tile, channel0, channels, run_length, row, col, CHANNELS_LAST, ROWS, COLS)
        run, tile = _next_tile(run, tile, tiles)
        added = ()
        if dy is not None:
            factor = _load_gradient(dy, y, g, place + offsets, inside, zeros.dtype)
            added = (sums[0] + factor,)
        if x is not None:
            value = tl.load(x + place + offsets, mask=inside, other=0.0).to(zeros.dtype)
            if dy is not None:
                added = added + (sums[1] + value * factor,)
            factor = value
        for i in tl.static_range(len(others)):
            other = tl.load(others[i] + place + offsets, mask=inside & (i < num_others), other=0.0)
            added = added + (sums[i + own] + factor * other.to(zeros.dtype),)
        sums = added

    kept = tl.arange(0, COLS if CHANNELS_LAST else ROWS)
    here = kept < channels - channel0
    first_row = tl.cast(slab, tl.int64) * num_rows
    for i in tl.static_range(len(others)):
        result = ((first_row + i) * groups + group) * channels + channel0 + kept
        tl.store(partial + result, tl.sum(sums[i + own], axis), mask=here & (i < num_others))
    for i in tl.static_range(own):
        result = ((first_row + num_rows - 1 - i) * groups + group) * channels + channel0 + kept
        tl.store(partial + result, tl.sum(sums[i], axis), mask=here)


@triton.jit
def merged_rows(partial, slabs, stride, row_length, num_rows, col, inside, SLABS: tl.constexpr, ROWS: tl.constexpr):
    """Sums over the slabs, in float64, of the first `num_rows` of ROWS rows [row_length]; slabs are `stride` apart."""
    slab = tl.arange(0, SLABS)[:, None]
    totals = ()
    for _ in tl.static_range(ROWS):
        totals = totals + (tl.zeros([SLABS, col.shape[0]], tl.float64),)
    for first in range(0, slabs, SLABS):
        offsets = (first + slab).to(tl.int64) * stride + col[None, :]
        here = (first + slab < slabs) & inside[None, :]
        added = ()
        for i in tl.static_range(ROWS):
            value = tl.load(partial + i * row_length + offsets, mask=here & (i < num_rows), other=0.0)
            added = added + (totals[i] + value.to(tl.float64),)
        totals = added
    sums = ()
    for i in tl.static_range(ROWS):
        sums = sums + (tl.sum(totals[i], 0),)
    return sums


@triton.jit(do_not_specialize=["slabs", "columns", "split"])
def merge_dot_kernel(partial, da, db, slabs, columns, split, SLABS: tl.constexpr, COLS: tl.constexpr):
    """The sums over the slabs of partial [slabs, columns], in float64: the first `split` go to da, the others to db."""
    column = tl.program_id(0).to(tl.int64) * COLS + tl.arange(0, COLS)
    inside = column < columns
    (total,) = merged_rows(partial, slabs, columns, 0, 1, column, inside, SLABS, 1)
    result = total.to(da.dtype.element_ty)
    tl.store(da + column, result, mask=inside & (column < split))
    tl.store(db + (column - split), result, mask=inside & (column >= split))


@triton.jit
def _add_units(
    x,
    run,
    tile,
    tiles,
    units,
    channel0,
    channels,
    run_length,
    row,
    col,
    offsets,
    count,
    pivot,
    first,
    second,
    CHANNELS_LAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    UNITS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """The first `units` of UNITS units added to count, sum of deviations from a pivot, and sum of their squares.

    pivot: [ROWS, COLS], or None for the mean of these units. WHOLE: all of them are there, in one run, with all their
    pixels. Returns the next run and tile, count, pivot, and the two sums.
    """
    values = ()
    masks = ()
    step: tl.constexpr = ROWS if CHANNELS_LAST else COLS
    pixel = row if CHANNELS_LAST else col
    exists = (col if CHANNELS_LAST else row) < channels - channel0
    place, _inside = _place(run, tile, channel0, channels, run_length, row, col, CHANNELS_LAST, ROWS, COLS)
    if WHOLE:
        source = x + place + offsets
        for _ in tl.static_range(UNITS):
            # nothing is stored of channels that do not exist, so their values may be any
            values = values + (tl.load(source, mask=exists).to(first.dtype),)
            source += (ROWS * channels) if CHANNELS_LAST else COLS
        run, tile = _next_tile(run, tile + (UNITS - 1), tiles)
        count += UNITS
    else:
        for i in tl.static_range(UNITS):
            place, _inside = _place(run, tile, channel0, channels, run_length, row, col, CHANNELS_LAST, ROWS, COLS)
            left = tl.minimum(run_length - tile.to(tl.int64) * step, step).to(tl.int32)
            counted = (pixel < left) & (i < units)
            run, tile = _next_tile(run, tile, tiles)
            value = tl.load(x + place + offsets, mask=counted & exists, other=0.0).to(first.dtype)
            count += counted.to(first.dtype)
            values = values + (value,)
            masks = masks + (counted,)
    if pivot is None:
        pivot = tl.zeros_like(first)
        for i in tl.static_range(UNITS):
            pivot += values[i]
        pivot /= tl.maximum(count, 1.0)
    for i in tl.static_range(UNITS):
        deviation = values[i] - pivot
        if not WHOLE:
            deviation = tl.where(masks[i], deviation, 0.0)
        first += deviation
        second += deviation * deviation
    return run, tile, count, pivot, first, second


@triton.jit(do_not_specialize=["groups", "channels", "runs", "run_length", "units_per_slab"])
def channel_moments_kernel(
    x,
    partial,
    groups,
    channels,
    runs,
    run_length,
    units_per_slab,
    CHANNELS_LAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    DOUBLE: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Mean, and sum of squared deviations from it, of each channel in a slab: partial [slabs, 2, groups, channels].

    Each element of the tile adds up deviations d = x - p of the pixels that it sees, and their squares, from a pivot p
    of its own, the mean of its first UNITS pixels; each pixel of the tile keeps a count. UNITS units at a time are
    loaded; units all of whose pixels exist need neither masks nor counts:

        mean = p + sum d / n,    m2 = sum d^2 - (sum d)^2 / n

    A mean much larger than the deviation costs no digits, since d is small then. Nor does a bad pivot cost many: that
    of k of n values has (p - mean)^2 <= (n / k - 1) m2 / n by Cauchy and Schwarz, so sum d^2 <= n / k m2. In the end
    the elements of a channel are merged, from their deviations (Chan, Golub and LeVeque 1983).

    Bytes: the map is read once, elements * itemsize, which over the read bandwidth is the floor.
    """
    axis: tl.constexpr = 0 if CHANNELS_LAST else 1
    dtype: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    channels, run_length, tiles, row, col, offsets, group, slab, channel0, begin, end, run, tile = _start(
        channels, runs, run_length, units_per_slab, CHANNELS_LAST, ROWS, COLS, ALIGN, WIDE
    )

    count = tl.zeros([ROWS, 1] if CHANNELS_LAST else [1, COLS], dtype)
    zeros = tl.zeros([ROWS, COLS], dtype)
    run, tile, count, pivot, first, second = _add_units(
        x, run, tile, tiles, end - begin, channel0, channels, run_length, row, col, offsets, count, None, zeros, zeros,
        CHANNELS_LAST, ROWS, COLS, UNITS, False,
    )  # fmt: skip
    whole_tiles = run_length // (ROWS if CHANNELS_LAST else COLS)
    for unit in range(begin + UNITS, end, UNITS):
        if (unit + UNITS <= end) & (tile + UNITS <= whole_tiles):
            run, tile, count, _same, first, second = _add_units(
                x, run, tile, tiles, UNITS, channel0, channels, run_length, row, col, offsets, count, pivot, first,
                second, CHANNELS_LAST, ROWS, COLS, UNITS, True,
            )  # fmt: skip
        else:
            run, tile, count, _same, first, second = _add_units(
                x, run, tile, tiles, end - unit, channel0, channels, run_length, row, col, offsets, count, pivot, first,
                second, CHANNELS_LAST, ROWS, COLS, UNITS, False,
            )  # fmt: skip

    # Means as deviations from a rough one: small numbers, to which the rounding errors of large ones are known.
    total = tl.maximum(tl.sum(count, axis), 1.0)
    rough = tl.sum(count * pivot, axis) / total
    shift = first / tl.maximum(count, 1.0)
    difference = pivot - tl.expand_dims(rough, axis) + shift
    correction = tl.sum(count * difference, axis) / total
    m2 = second - first * shift
    m2 = tl.where(m2 < 0.0, 0.0, m2)  # NaN stays NaN
    squares = tl.sum(m2 + count * difference * difference, axis) - total * correction * correction
    kept = tl.arange(0, COLS if CHANNELS_LAST else ROWS)
    here = kept < channels - channel0
    result = (tl.cast(slab, tl.int64) * 2 * groups + group) * channels + channel0 + kept
    tl.store(partial + result, rough + correction, mask=here)
    tl.store(partial + result + tl.cast(groups, tl.int64) * channels, squares, mask=here)


@triton.jit
def _pixels_before(unit, tiles, run_length, STEP: tl.constexpr):
    """How many pixels of a group come before a unit."""
    return (unit // tiles).to(tl.int64) * run_length + (unit % tiles).to(tl.int64) * STEP


@triton.jit
def merged_moments(
    partial, slabs, columns, runs, run_length, units_per_slab, column, inside, STEP: tl.constexpr, SLABS: tl.constexpr
):
    """Mean and biased variance of some columns of partial [slabs, 2, columns], in float64.

    With n_s pixels in slab s and d_s = mean_s - mean_0:  mean = mean_0 + D,  D = sum n_s d_s / n,
    var = sum (m2_s + n_s d_s^2) / n - D^2.
    """
    tiles = tl.cdiv(run_length, STEP)
    units = runs * tiles
    slab = tl.arange(0, SLABS)[:, None]
    pivot = tl.load(partial + column, mask=inside, other=0.0).to(tl.float64)
    first_moment = tl.zeros([SLABS, column.shape[0]], tl.float64)
    second_moment = tl.zeros([SLABS, column.shape[0]], tl.float64)
    for first in range(0, slabs, SLABS):
        begin = tl.minimum((first + slab) * units_per_slab, units)
        end = tl.minimum(begin + units_per_slab, units)
        here = (first + slab < slabs) & inside[None, :]
        offsets = (first + slab).to(tl.int64) * 2 * columns + column[None, :]
        difference = tl.load(partial + offsets, mask=here, other=0.0).to(tl.float64) - pivot[None, :]
        squares = tl.load(partial + columns + offsets, mask=here, other=0.0).to(tl.float64)
        count = _pixels_before(end, tiles, run_length, STEP) - _pixels_before(begin, tiles, run_length, STEP)
        weighted = tl.where(here, difference * count.to(tl.float64), 0.0)
        first_moment += weighted
        second_moment += squares + weighted * difference
    pixels = (tl.cast(runs, tl.int64) * run_length).to(tl.float64)
    shift = tl.sum(first_moment, 0) / pixels
    variance = tl.sum(second_moment, 0) / pixels - shift * shift
    return pivot + shift, tl.where(variance < 0.0, 0.0, variance)  # NaN stays NaN


@triton.jit(do_not_specialize=["slabs", "columns", "runs", "run_length", "units_per_slab"])
def merge_moments_kernel(
    partial,
    mean,
    var,
    slabs,
    columns,
    runs,
    run_length,
    units_per_slab,
    STEP: tl.constexpr,
    SLABS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Mean and biased variance of each column from partial [slabs, 2, columns]."""
    column = tl.program_id(0).to(tl.int64) * COLS + tl.arange(0, COLS)
    inside = column < columns
    found, variance = merged_moments(
        partial, slabs, columns, runs, run_length, units_per_slab, column, inside, STEP, SLABS
    )
    tl.store(mean + column, found.to(mean.dtype.element_ty), mask=inside)
    tl.store(var + column, variance.to(var.dtype.element_ty), mask=inside)
