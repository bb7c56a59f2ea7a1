"""The epilogue of an ER block step by step: on CUDA devices, and where statistics are those of several processes.

    forward     channel_moments [gather], block_coefficients, weighted_sum
    backward    map_dots, map_coefficients_backward [all-reduce], weighted_sum

The operators are Triton's on CUDA devices and C++ on the CPU; with group norm the algebra is that of
`group_coefficients`. On CUDA devices, where nothing comes between them, the first two of a pass are one operator,
`measured_coefficients` and `map_backward`, which takes a launch less. Signatures and results are those of `epilogue`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from ernet_fast.er import group_coefficients, operators
from ernet_fast.er.epilogue_arguments import (
    MEAN_ROW,
    NO_NORM,
    BranchNorm,
    EpilogueState,
    LaterBlock,
    MapGradients,
    NormArguments,
    ShortcutArguments,
)
from ernet_fast.er.process_group import gather_moments


def together(state: EpilogueState, z: Tensor) -> bool:
    """True if a reduction of map z and the algebra after it are one operator."""
    return z.device.type != "cpu" and state.group is None and not state.num_groups


def er_block(
    state: EpilogueState,
    maps: Sequence[Tensor],
    norm: NormArguments,
    shortcut: ShortcutArguments,
    *,
    measure: bool,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Y of the block of the last map, and a [maps, C] and b [C] of its weighted sum."""
    last = len(maps) - 1
    for index in range(state.filed, last):
        _file(state, index, maps[index], NO_NORM, ShortcutArguments(), state.measure)
    a, b = _file(state, last, maps[last], norm, shortcut, measure)
    return operators.weighted_sum(maps, a, b, relu), a, b


def _file(
    state: EpilogueState, index: int, z: Tensor, norm: NormArguments, shortcut: ShortcutArguments, measure: bool
) -> tuple[Tensor, Tensor]:
    """Write map `index` into the table; the coefficients of its block, empty without a shortcut."""
    mean = var = None
    if state.num_groups:
        moments = operators.channel_moments(z, True) if measure else None
        group_coefficients.file_map(state, index, moments, norm)
        if shortcut.weight is None:
            return state.none, state.none
        return group_coefficients.block_coefficients(state, index, shortcut.weight)
    if measure and together(state, z):
        return torch.ops.ernet.measured_coefficients.default(z, state.table, index, *norm, *shortcut, state.eps)
    if measure:
        mean, var = operators.channel_moments(z)
        if state.group is not None:
            mean, var, state.count = gather_moments(mean, var, state.elements, state.group)
    doubles = z.dtype == torch.float64
    return torch.ops.ernet.block_coefficients.default(
        state.table, index, doubles, mean, var, state.count, state.elements, *norm, *shortcut, state.eps
    )


def er_block_backward(
    state: EpilogueState,
    index: int,
    z: Tensor,
    norm: BranchNorm,
    later: Sequence[LaterBlock],
    *,
    dy: Tensor | None,
    y: Tensor | None,
    passed: Tensor | None,
    known: Tensor | None,
    needed: bool,
) -> MapGradients:
    """Gradients of map `index`; `relu_mask` is empty, `dy` is that of the weighted sum. With `known` there is no dy."""
    sums, g, later_g = known, dy, [block.dy for block in later]
    measured = state.measured[index]
    with_dots = state.needs_dots and known is None
    if with_dots and together(state, z):
        rows, k0, dgamma, dbeta, db, written = torch.ops.ernet.map_backward.default(
            z, dy, y, later_g, state.table, index, None if dy is None else state.a[index], *_columns(later), norm,
            state.eps, measured, passed is not None,
        )  # fmt: skip
        g = dy if y is None else written
    else:
        if with_dots:
            sums, written = operators.map_dots(z, dy, y, later_g, state.num_groups > 0)
            g = dy if y is None else written
        rows, k0, dgamma, dbeta = _map_coefficients(state, index, norm, later, sums, g is not None, passed is not None)
        db = state.none if dy is None or sums is None else sums[-1]
    terms = [t for t in (g, *later_g, z if measured else None, passed) if t is not None]
    dz = operators.weighted_sum(terms, rows, k0 if measured else None) if needed and terms else z.new_empty((0,))
    return MapGradients(dz, state.none if g is None else g, state.none, db, dgamma, dbeta, state.none)


def _columns(later: Sequence[LaterBlock]) -> list[list[Tensor]]:
    """Of the later blocks: a, db, weight, running mean and variance, dweight."""
    return [[block[i] for block in later] for i in range(2, len(LaterBlock._fields))]


def _map_coefficients(
    state: EpilogueState,
    index: int,
    norm: BranchNorm,
    later: Sequence[LaterBlock],
    sums: Tensor | None,
    reached: bool,
    passed: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """See `group_coefficients.map_rows`; `rows` and the constant are those of `dz`."""
    if state.num_groups:
        return group_coefficients.map_rows(state, index, norm, later, sums, reached=reached, passed=passed)
    measured = state.measured[index]
    # gradients of moments over several processes are summed up before they become rows
    count = state.count if measured else None
    rows, k0, dgamma, dbeta, dmoments = torch.ops.ernet.map_coefficients_backward.default(
        state.table,
        index,
        sums,
        state.a[index] if reached else None,
        *_columns(later),
        count,
        state.elements,
        norm,
        state.eps,
        measured and count is None,
        passed and count is None,
    )
    if not (reached or later):  # no coefficients that have a dtype
        rows, k0 = rows.to(state.vector_dtype), k0.to(state.vector_dtype)
    if count is not None:
        rows, k0 = _rows_of_moments(state, index, rows, dmoments, count, passed)
    return rows, k0, dgamma, dbeta


def _rows_of_moments(
    state: EpilogueState, index: int, rows: Tensor, dmoments: Tensor, count: Tensor, passed: bool
) -> tuple[Tensor, Tensor]:
    """Rows and constant of dz with the gradients of moments of all processes."""
    distributed.all_reduce(dmoments, group=state.group)
    dmean, dvar = dmoments
    k1 = (dvar * 2 / count).to(rows.dtype)
    k0 = dmean / count - k1 * state.table[index, MEAN_ROW]
    more = [k1, torch.ones_like(k1)] if passed else [k1]
    return torch.cat([rows, torch.stack(more)]), k0.to(rows.dtype)


def _coefficients_fake(table: Tensor, index: int, doubles: bool, *rest: Tensor | float | None) -> tuple[Tensor, Tensor]:
    # of the 19 that follow, in the order of the schema, the 13th is the weight
    weight, channels = rest[12], table.shape[2]
    maps, width = (0, 0) if weight is None else (index + 1, channels)
    dtype = torch.float64 if doubles else torch.float32
    return table.new_empty((maps, channels), dtype=dtype), table.new_empty((width,), dtype=dtype)


def _map_coefficients_fake(
    table: Tensor, index: int, sums: Tensor | None, a: Tensor | None, later_a: list[Tensor], *rest: object
) -> tuple[Tensor, ...]:
    *_, norm, _eps, measured, pass_on = rest
    channels = table.shape[2]
    like = next((t for t in (a, *later_a) if t is not None), None)
    dtype = torch.float32 if like is None else like.dtype
    affine = channels if norm != BranchNorm.NONE and sums is not None else 0
    num_rows = (a is not None) + len(later_a) + bool(measured) + bool(pass_on)
    sizes = [(num_rows, channels), (channels if measured else 0,), (affine,), (affine,)]
    return *(table.new_empty(size, dtype=dtype) for size in sizes), table.new_empty((2, channels))


def _measured_fake(z: Tensor, table: Tensor, index: int, *rest: Any) -> tuple[Tensor, Tensor]:
    return _coefficients_fake(table, index, z.dtype == torch.float64, None, None, None, 0, *rest)


def _map_backward_fake(
    z: Tensor, dy: Tensor | None, y: Tensor | None, later_g: list[Tensor], table: Tensor, index: int, *rest: Any
) -> tuple[Tensor, ...]:
    a, later_a, *_ = rest
    rows, k0, dgamma, dbeta, _ = _map_coefficients_fake(table, index, table, a, later_a, *rest)
    vectors = (t.to(operators.acc_dtype(z)) for t in (rows, k0, dgamma, dbeta))
    g = z.new_empty((0,)) if y is None else torch.empty_like(z)
    return *vectors, table.new_empty((0 if a is None else table.shape[2],)), g


if operators.COMPILED or operators.TRITON:
    torch.library.register_fake("ernet::block_coefficients", _coefficients_fake)
    torch.library.register_fake("ernet::map_coefficients_backward", _map_coefficients_fake)
if operators.TRITON:
    torch.library.register_fake("ernet::measured_coefficients", _measured_fake)
    torch.library.register_fake("ernet::map_backward", _map_backward_fake)
