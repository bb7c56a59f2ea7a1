"""The algebra on per-channel vectors of a block with batch norm as two Triton kernels, one launch each way.

    block_coefficients_kernel          moments, BatchNorm, weights -> a, b; the table; running statistics
    map_coefficients_backward_kernel   inner products -> gradients of weights, gamma, beta; coefficients of dz

A program serves COLS channels. With SLABS they merge the slabs of a reduction themselves, SLABS at a time, in the order
and with the results of `merge_moments_kernel` and `merge_dot_kernel`, which spares the launch of these. A pointer or
number that is None is compiled for as such, like a constant. Everything is computed in float64, which costs nothing
beside a launch. What the rows of the table hold is written in
`epilogue_arguments`; the formulas are in docs/er-shortcuts.md.
"""

# Triton has no starred tuples, and its tuples grow in loops that it unrolls.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

from ernet_fast.er.triton.map_kernels import merged_moments, merged_rows

TABLE_ROWS = tl.constexpr(7)
SCALE, RSTD, CENTRE, SHIFT, MEAN, VAR, NORM = (tl.constexpr(row) for row in range(7))
NO_NORM, BATCH_NORM, RUNNING_NORM = (tl.constexpr(kind) for kind in range(3))
# map_coefficients_backward: later blocks whose vectors are loaded together, before any result of theirs is stored.
BLOCKS_TOGETHER = tl.constexpr(4)


@triton.jit
def _read(vector, place, inside):
    value = tl.load(vector + place, mask=inside, other=0.0)
    if vector.dtype.element_ty.primitive_bitwidth == 16:  # hardware and interpreter go by way of float32
        value = value.to(tl.float32)
    return value.to(tl.float64)


@triton.jit
def _write(vector, place, value, inside):
    if vector.dtype.element_ty.primitive_bitwidth == 16:
        value = value.to(tl.float32)
    tl.store(vector + place, value.to(vector.dtype.element_ty), mask=inside)


@triton.jit
def _read_rows(rows, channels, col, inside):
    """Rows 0 to 3 of a matrix: of the table's for a map, SCALE to SHIFT, or of totals."""
    return (
        _read(rows, col, inside),
        _read(rows + channels, col, inside),
        _read(rows + 2 * channels, col, inside),
        _read(rows + 3 * channels, col, inside),
    )


@triton.jit
def _inverse_sqrt(x):
    return 1.0 / tl.sqrt(x)


@triton.jit
def _count_batch(batches, momentum):
    """The momentum, whose bits are given, for this batch; counts the batch, which for cumulative averages has been done
    before.
    """
    if momentum is None:
        step = 1.0 / tl.load(batches).to(tl.float64)
    else:
        if batches is not None:
            if tl.program_id(0) == 0:
                tl.store(batches, tl.load(batches) + 1)
        step = tl.cast(momentum, tl.int64).to(tl.float64, bitcast=True)
    return step


@triton.jit
def _update(running, place, value, momentum, inside):
    old = _read(running, place, inside)
    _write(running, place, old + momentum * (value - old), inside)


@triton.jit(
    do_not_specialize=[
        "slabs", "runs", "run_length", "units_per_slab", "index", "channels", "elements", "norm_momentum", "momentum"
    ]
)  # fmt: skip
def block_coefficients_kernel(
    table,
    mean,
    var,
    slabs,
    runs,
    run_length,
    units_per_slab,
    count,
    gamma,
    beta,
    norm_mean,
    norm_var,
    norm_batches,
    weight,
    running_mean,
    running_var,
    batches,
    a,
    b,
    index,
    channels,
    elements,
    norm_momentum,
    momentum,
    NORM_EPS: tl.constexpr,
    EPS: tl.constexpr,
    BRANCH: tl.constexpr,
    UPDATE_NORM: tl.constexpr,
    USE_RUNNING: tl.constexpr,
    UPDATE: tl.constexpr,
    STEP: tl.constexpr,
    SLABS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Row `index` of the table, running statistics, a [index + 1, channels] and b [channels].

    With SLABS `mean` is what `channel_moments_kernel` leaves, [slabs, 2, channels], and there is no `var`.
    """
    channels = tl.cast(channels, tl.int64)
    col = tl.program_id(0).to(tl.int64) * COLS + tl.arange(0, COLS)
    inside = col < channels
    values = tl.cast(elements, tl.float64) if count is None else tl.load(count)
    unbiased = values / tl.maximum(values - 1.0, 1.0)
    own = tl.cast(index, tl.int64) * TABLE_ROWS * channels + col

    z_mean = tl.zeros([COLS], tl.float64)
    z_var = tl.zeros([COLS], tl.float64)
    if SLABS > 0:
        z_mean, z_var = merged_moments(
            mean, slabs, channels, runs, run_length, units_per_slab, col, inside, STEP, SLABS
        )
    elif mean is not None:
        z_mean = _read(mean, col, inside)
        z_var = _read(var, col, inside)
    scale = tl.full([COLS], 1.0, tl.float64)
    rstd = tl.zeros([COLS], tl.float64)
    centre = tl.zeros([COLS], tl.float64)
    shift = tl.zeros([COLS], tl.float64)
    if BRANCH != NO_NORM:
        centre = z_mean if BRANCH == BATCH_NORM else _read(norm_mean, col, inside)
        rstd = _inverse_sqrt((z_var if BRANCH == BATCH_NORM else _read(norm_var, col, inside)) + NORM_EPS)
        scale = rstd if gamma is None else _read(gamma, col, inside) * rstd
        shift = (shift if beta is None else _read(beta, col, inside)) - scale * centre
    norm = _inverse_sqrt(scale * scale * z_var + EPS)
    rows = (scale, rstd, centre, shift, z_mean, z_var, norm)
    for i in tl.static_range(TABLE_ROWS):
        tl.store(table + own + i * channels, rows[i], mask=inside)
    if UPDATE_NORM:
        step = _count_batch(norm_batches, norm_momentum)
        _update(norm_mean, col, z_mean, step, inside)
        _update(norm_var, col, z_var * unbiased, step, inside)

    if weight is not None:
        if UPDATE:
            step = _count_batch(batches, momentum)
        # The constants go with the coefficients as they are stored: rounding one is not to move a large mean.
        stored = scale.to(a.dtype.element_ty)
        constant = shift + (scale - stored.to(tl.float64)) * centre
        tl.store(a + index * channels + col, stored, mask=inside)
        for i in range(index):
            row = tl.cast(i, tl.int64) * TABLE_ROWS * channels + col
            pair = tl.cast(i, tl.int64) * channels + col
            w = _read(weight, pair, inside)
            row_scale = _read(table, row + SCALE * channels, inside)
            row_shift = _read(table, row + SHIFT * channels, inside)
            if USE_RUNNING:
                s = w * _inverse_sqrt(_read(running_var, pair, inside) + EPS)
                _write(a, pair, s * row_scale, inside)
                constant += s * (row_shift - _read(running_mean, pair, inside))
            else:
                row_mean = _read(table, row + MEAN * channels, inside)
                kept = (w * _read(table, row + NORM * channels, inside) * row_scale).to(a.dtype.element_ty)
                tl.store(a + pair, kept, mask=inside)
                constant -= kept.to(tl.float64) * row_mean
                if UPDATE:
                    row_var = _read(table, row + VAR * channels, inside)
                    _update(running_mean, pair, row_scale * row_mean + row_shift, step, inside)
                    _update(running_var, pair, row_scale * row_scale * row_var * unbiased, step, inside)
        _write(b, col, constant, inside)


@triton.jit
def _add_later_block(dscale, dshift, dmean, dvar, row, vectors, running, EPS: tl.constexpr):
    """Gradient of a later block's weight, and what that block adds to those of a map's scale, shift, mean, variance.

    row: scale, shift, mean and 1 / deviation of x of the map. vectors: inner product of the map with the block's g, sum
    of that g, weight, running mean and variance (used where the block is `running`).
    """
    scale, shift, mean, norm = row
    dot, constant, weight, running_mean, running_var = vectors
    if running:
        s = _inverse_sqrt(running_var + EPS)
        dweight = s * (scale * dot + (shift - running_mean) * constant)
        dscale += weight * s * dot
        dshift += weight * s * constant
    else:
        factor = norm * scale
        centred = dot - mean * constant
        dweight = factor * centred
        dscale += weight * centred * EPS * norm * norm * norm
        dvar -= weight * centred * 0.5 * factor * factor * factor
        dmean -= weight * factor * constant
    return dscale, dshift, dmean, dvar, dweight


@triton.jit
def _read_sums(sums, row, num_rows, slabs, stride, channels, col, inside, SLABS: tl.constexpr, ROWS: tl.constexpr):
    """ROWS rows of sums, of which `num_rows` are there, from row `row` on; with SLABS those of the slabs are merged."""
    first = sums + tl.cast(row, tl.int64) * channels
    if SLABS > 0:
        found = merged_rows(first, slabs, stride, channels, num_rows, col, inside, SLABS, ROWS)
    else:
        found = ()
        for i in tl.static_range(ROWS):
            found = found + (_read(first + i * channels, col, inside & (i < num_rows)),)
    return found


@triton.jit(
    do_not_specialize=[
        "slabs", "num_later", "first_later", "all_later", "running", "index", "channels", "elements"
    ]
)  # fmt: skip
def map_coefficients_backward_kernel(
    table,
    sums,
    slabs,
    a,
    later_a,
    later_db,
    later_weight,
    later_running_mean,
    later_running_var,
    later_dweight,
    count,
    totals,
    rows,
    k0,
    dgamma,
    dbeta,
    dmoments,
    db,
    num_later,
    first_later,
    all_later,
    running,
    index,
    channels,
    elements,
    EPS: tl.constexpr,
    BRANCH: tl.constexpr,
    MEASURED: tl.constexpr,
    PASS_ON: tl.constexpr,
    LAST: tl.constexpr,
    SLABS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Gradients of the vectors that map `index` depends on, and the coefficients and constant of dz.

    With SLABS `sums` is what `map_dots_kernel` leaves, [slabs, rows, channels], and the sum of g goes to `db`.
    The lists hold `num_later` of `all_later` later blocks, from `first_later` on; bit i of `running` says that the
    i-th of them normalised with running statistics. A launch that is not the LAST leaves its sums in totals
    [4, channels], gradients of scale, shift, mean and variance, for the next one.
    """
    channels = tl.cast(channels, tl.int64)
    col = tl.program_id(0).to(tl.int64) * COLS + tl.arange(0, COLS)
    inside = col < channels
    place = tl.cast(index, tl.int64) * channels + col
    own = table + tl.cast(index, tl.int64) * TABLE_ROWS * channels
    scale, rstd, centre, shift = _read_rows(own, channels, col, inside)
    mean = _read(own + MEAN * channels, col, inside)
    row = (scale, shift, mean, _read(own + NORM * channels, col, inside))
    dscale, dshift, dmean, dvar = _read_rows(totals, channels, col, inside & (first_later > 0))

    first_row = rows + ((0 if a is None else 1) + tl.cast(first_later, tl.int64)) * channels
    stride = (tl.cast(all_later, tl.int64) + (0 if a is None else 2)) * channels  # of a slab
    for first in tl.static_range(0, len(later_a), BLOCKS_TOGETHER):
        if first < num_later:
            kept = ()
            vectors = ()
            dots = _read_sums(
                sums, first_later + first, num_later - first, slabs, stride, channels, col, inside, SLABS,
                min(BLOCKS_TOGETHER, len(later_a) - first),
            )  # fmt: skip
            for i in tl.static_range(first, min(first + BLOCKS_TOGETHER, len(later_a))):
                here = inside & (i < num_later)
                with_running = here & (((running >> i) & 1) != 0)
                kept = kept + (tl.load(later_a[i] + place, mask=here, other=0.0),)
                vector = (
                    dots[i - first],
                    _read(later_db[i], col, here),
                    _read(later_weight[i], place, here),
                    _read(later_running_mean[i], place, with_running),
                    _read(later_running_var[i], place, with_running),
                )
                vectors = vectors + (vector,)
            for i in tl.static_range(first, min(first + BLOCKS_TOGETHER, len(later_a))):
                if i < num_later:
                    dscale, dshift, dmean, dvar, dweight = _add_later_block(
                        dscale, dshift, dmean, dvar, row, vectors[i - first], ((running >> i) & 1) != 0, EPS
                    )
                    tl.store(first_row + i * channels + col, kept[i - first], mask=inside)
                    _write(later_dweight[i], place, dweight, inside)

    if LAST:
        last = rows + tl.cast(all_later, tl.int64) * channels + col
        if a is not None:
            own_dot, own_sum = _read_sums(sums, all_later, 2, slabs, stride, channels, col, inside, SLABS, 2)
            dscale += own_dot
            dshift += own_sum
            if SLABS > 0:
                tl.store(db + col, own_sum, mask=inside)
            tl.store(rows + col, tl.load(a + place, mask=inside), mask=inside)
            last += channels
        if BRANCH != NO_NORM:
            dscale -= centre * dshift
            _write(dgamma, col, dscale * rstd, inside)
            _write(dbeta, col, dshift, inside)
            if BRANCH == BATCH_NORM:
                dmean -= scale * dshift
                dvar -= 0.5 * dscale * scale * rstd * rstd
        tl.store(dmoments + col, dmean, mask=inside)
        tl.store(dmoments + channels + col, dvar, mask=inside)
        if MEASURED:
            values = tl.cast(elements, tl.float64) if count is None else tl.load(count)
            k1 = (dvar * 2.0 / values).to(rows.dtype.element_ty)
            tl.store(last, k1, mask=inside)
            _write(k0, col, dmean / values - k1.to(tl.float64) * mean, inside)
            last += channels
        if PASS_ON:
            tl.store(last, tl.full([COLS], 1.0, rows.dtype.element_ty), mask=inside)
    else:
        gradients = (dscale, dshift, dmean, dvar)
        for i in tl.static_range(4):
            tl.store(totals + i * channels + col, gradients[i], mask=inside)
