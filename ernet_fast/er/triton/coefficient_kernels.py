"""The algebra on C-vectors of a block with batch norm as two Triton kernels, one launch forward and one backward.

    block_coefficients_kernel            moments, BatchNorm, weights -> a, b; the table; running statistics
    block_coefficients_backward_kernel   da, db -> gradients of weights, gamma, beta; rows and k0 of dz

A program serves COLS channels and goes through the earlier maps one by one. Everything is computed in float64, which
costs nothing beside a launch. What vectors mean, and in which rows the table and the totals hold them, is written in
`coefficients`; the formulas are in docs/er-shortcuts.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

TABLE_ROWS = tl.constexpr(7)
SCALE, RSTD, CENTRE, SHIFT, MEAN, VAR, NORM = (tl.constexpr(row) for row in range(7))
TOTAL_ROWS = tl.constexpr(4)
D_SCALE, D_SHIFT, D_MEAN, D_VAR = (tl.constexpr(row) for row in range(4))
NO_NORM, BATCH_NORM, RUNNING_NORM = (tl.constexpr(kind) for kind in range(3))


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
def _inverse_sqrt(x):
    return 1.0 / tl.sqrt(x)


@triton.jit
def _count_batch(batches, momentum, HAS_BATCHES: tl.constexpr, CUMULATIVE: tl.constexpr):
    """The momentum for this batch; counts the batch, which for cumulative averages has been done before."""
    if CUMULATIVE:
        return 1.0 / tl.load(batches).to(tl.float64)
    if HAS_BATCHES:
        if tl.program_id(0) == 0:
            tl.store(batches, tl.load(batches) + 1)
    return tl.cast(momentum, tl.float64)


@triton.jit
def _move(running, place, value, momentum, inside):
    old = _read(running, place, inside)
    _write(running, place, old + momentum * (value - old), inside)


@triton.jit(do_not_specialize=["index", "channels", "elements", "norm_momentum", "momentum"])
def block_coefficients_kernel(
    table,
    mean,
    var,
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
    MEASURED: tl.constexpr,
    HAS_COUNT: tl.constexpr,
    BRANCH: tl.constexpr,
    HAS_GAMMA: tl.constexpr,
    HAS_BETA: tl.constexpr,
    MOVE_NORM: tl.constexpr,
    NORM_BATCHES: tl.constexpr,
    NORM_CUMULATIVE: tl.constexpr,
    BLOCK: tl.constexpr,
    USE_RUNNING: tl.constexpr,
    MOVE: tl.constexpr,
    BATCHES: tl.constexpr,
    CUMULATIVE: tl.constexpr,
    COLS: tl.constexpr,
):
    """Row `index` of the table, running statistics, a [index + 1, channels] and b [channels]."""
    channels = tl.cast(channels, tl.int64)
    col = tl.program_id(0).to(tl.int64) * COLS + tl.arange(0, COLS)
    inside = col < channels
    values = tl.load(count) if HAS_COUNT else tl.cast(elements, tl.float64)
    unbiased = values / tl.maximum(values - 1.0, 1.0)
    own = tl.cast(index, tl.int64) * TABLE_ROWS * channels + col

    z_mean = tl.zeros([COLS], tl.float64)
    z_var = tl.zeros([COLS], tl.float64)
    if MEASURED:
        z_mean = _read(mean, col, inside)
        z_var = _read(var, col, inside)
    scale = tl.full([COLS], 1.0, tl.float64)
    rstd = tl.zeros([COLS], tl.float64)
    centre = tl.zeros([COLS], tl.float64)
    shift = tl.zeros([COLS], tl.float64)
    if BRANCH != NO_NORM:
        centre = z_mean if BRANCH == BATCH_NORM else _read(norm_mean, col, inside)
        rstd = _inverse_sqrt((z_var if BRANCH == BATCH_NORM else _read(norm_var, col, inside)) + NORM_EPS)
        scale = _read(gamma, col, inside) * rstd if HAS_GAMMA else rstd
        shift = (_read(beta, col, inside) if HAS_BETA else shift) - scale * centre
    norm = _inverse_sqrt(scale * scale * z_var + EPS)
    tl.store(table + own + SCALE * channels, scale, mask=inside)
    tl.store(table + own + RSTD * channels, rstd, mask=inside)
    tl.store(table + own + CENTRE * channels, centre, mask=inside)
    tl.store(table + own + SHIFT * channels, shift, mask=inside)
    tl.store(table + own + MEAN * channels, z_mean, mask=inside)
    tl.store(table + own + VAR * channels, z_var, mask=inside)
    tl.store(table + own + NORM * channels, norm, mask=inside)
    if MOVE_NORM:
        step = _count_batch(norm_batches, norm_momentum, NORM_BATCHES, NORM_CUMULATIVE)
        _move(norm_mean, col, z_mean, step, inside)
        _move(norm_var, col, z_var * unbiased, step, inside)

    if BLOCK:
        step = tl.cast(momentum, tl.float64)
        if MOVE:
            step = _count_batch(batches, momentum, BATCHES, CUMULATIVE)
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
                if MOVE:
                    row_var = _read(table, row + VAR * channels, inside)
                    _move(running_mean, pair, row_scale * row_mean + row_shift, step, inside)
                    _move(running_var, pair, row_scale * row_scale * row_var * unbiased, step, inside)
        _write(b, col, constant, inside)


@triton.jit
def _add(total, value, inside):
    tl.store(total, tl.load(total, mask=inside, other=0.0) + value, mask=inside)


@triton.jit(do_not_specialize=["num_readers", "index", "channels", "elements"])
def block_coefficients_backward_kernel(
    table,
    totals,
    da,
    db,
    count,
    weight,
    running_mean,
    running_var,
    readers,
    rows,
    k0,
    dweight,
    dgamma,
    dbeta,
    dmoments,
    num_readers,
    index,
    channels,
    elements,
    EPS: tl.constexpr,
    REACHED: tl.constexpr,
    HAS_COUNT: tl.constexpr,
    BRANCH: tl.constexpr,
    USE_RUNNING: tl.constexpr,
    MEASURED: tl.constexpr,
    PASS_ON: tl.constexpr,
    COLS: tl.constexpr,
):
    """What da and db of block `index` and the totals mean for its vectors and its map; adds to earlier maps' totals."""
    channels = tl.cast(channels, tl.int64)
    col = tl.program_id(0).to(tl.int64) * COLS + tl.arange(0, COLS)
    inside = col < channels
    own_place = tl.cast(index, tl.int64) * channels + col
    own = tl.cast(index, tl.int64) * TABLE_ROWS * channels + col
    total = tl.cast(index, tl.int64) * TOTAL_ROWS * channels + col
    dscale = _read(totals, total + D_SCALE * channels, inside)
    dshift = _read(totals, total + D_SHIFT * channels, inside)
    dmean = _read(totals, total + D_MEAN * channels, inside)
    dvar = _read(totals, total + D_VAR * channels, inside)
    if REACHED:
        constant = _read(db, col, inside)
        dshift += constant
        dscale += _read(da, own_place, inside)
        for i in range(index):
            row = tl.cast(i, tl.int64) * TABLE_ROWS * channels + col
            pair = tl.cast(i, tl.int64) * channels + col
            added = totals + tl.cast(i, tl.int64) * TOTAL_ROWS * channels + col
            w = _read(weight, pair, inside)
            d = _read(da, pair, inside)
            scale = _read(table, row + SCALE * channels, inside)
            if USE_RUNNING:
                s = _inverse_sqrt(_read(running_var, pair, inside) + EPS)
                offset = _read(table, row + SHIFT * channels, inside) - _read(running_mean, pair, inside)
                _write(dweight, pair, s * (scale * d + offset * constant), inside)
                _add(added + D_SCALE * channels, w * s * d, inside)
                _add(added + D_SHIFT * channels, w * s * constant, inside)
            else:
                s = _read(table, row + NORM * channels, inside)
                factor = s * scale
                centred = d - _read(table, row + MEAN * channels, inside) * constant
                _write(dweight, pair, factor * centred, inside)
                _add(added + D_SCALE * channels, w * centred * EPS * s * s * s, inside)
                _add(added + D_VAR * channels, w * centred * -0.5 * factor * factor * factor, inside)
                _add(added + D_MEAN * channels, -w * factor * constant, inside)
    if BRANCH != NO_NORM:
        scale = _read(table, own + SCALE * channels, inside)
        rstd = _read(table, own + RSTD * channels, inside)
        dscale -= _read(table, own + CENTRE * channels, inside) * dshift
        _write(dgamma, col, dscale * rstd, inside)
        _write(dbeta, col, dshift, inside)
        if BRANCH == BATCH_NORM:
            dmean -= scale * dshift
            dvar -= 0.5 * dscale * scale * rstd * rstd
    tl.store(dmoments + col, dmean, mask=inside)
    tl.store(dmoments + channels + col, dvar, mask=inside)

    for i in tl.static_range(len(readers)):
        here = inside & (i < num_readers)
        tl.store(rows + i * channels + col, tl.load(readers[i] + own_place, mask=here, other=0.0), mask=here)
    row = rows + tl.cast(num_readers, tl.int64) * channels + col
    if MEASURED:
        values = tl.load(count) if HAS_COUNT else tl.cast(elements, tl.float64)
        k1 = (dvar * 2.0 / values).to(rows.dtype.element_ty)
        tl.store(row, k1, mask=inside)
        _write(k0, col, dmean / values - k1.to(tl.float64) * _read(table, own + MEAN * channels, inside), inside)
        row += channels
    if PASS_ON:
        tl.store(row, tl.full([COLS], 1.0, rows.dtype.element_ty), mask=inside)
