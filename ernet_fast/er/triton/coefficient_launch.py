"""The algebra on per-channel vectors on CUDA devices: argument checks and the launches, one for each operator.

`measured_coefficients` and `map_backward` take a map, whose reduction is a launch before that of the algebra.

As in `map_launch`, nothing waits for the device, and calls can be captured in a CUDA graph.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ernet_fast.er.epilogue_arguments import TABLE_ROWS, BranchNorm, NormArguments, ShortcutArguments
from ernet_fast.er.triton import map_launch
from ernet_fast.er.triton.map_launch import check_vector, fail, on_device_of, padded
from ernet_fast.er.triton.tiling import Reduction, ceil_div, merge_tile

_BATCH = "norm 1 (batch)"
_COLS = 128  # channels of a program: with 256 channels two of them, with 2048 sixteen
_WARPS = 4
_MERGING_WARPS = 8  # of the few programs that merge slabs: registers for more loads in flight
_LATER_BLOCKS = 16  # of a launch, which goes through them unrolled: compiling it for 32 takes three times as long
_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@functools.lru_cache(maxsize=1)
def kernels() -> ModuleType:
    """The module of the kernels of the algebra."""
    from ernet_fast.er.triton import coefficient_kernels  # here, because it imports triton

    return coefficient_kernels


class MapArguments(NamedTuple):
    """The arguments of `ernet::map_coefficients_backward`: of a map, and of all later blocks that have a gradient."""

    table: Tensor
    """Float64 [maps, TABLE_ROWS, C]."""
    index: int  # type: ignore[assignment]  # a method of tuple has the name
    """Which map of the stage."""
    sums: Tensor | None
    """Float64 [later + 2, C] of `map_dots`, without `a` [later, C]; None where nothing depends on inner products."""
    a: Tensor | None
    """[index + 1, C] of the map's own block's weighted sum, or None where its output has no gradient."""
    later_a: Sequence[Tensor]
    """[> index, C] each."""
    later_db: Sequence[Tensor]
    """[C] each: the sum of that block's g."""
    later_weight: Sequence[Tensor]
    """[> index, C] each."""
    later_running_mean: Sequence[Tensor]
    """[> index, C] each: what the block normalised with; empty: with the moments of the maps."""
    later_running_var: Sequence[Tensor]
    later_dweight: Sequence[Tensor]
    """[> index, C] each, of which row `index` is written."""
    count: Tensor | None  # type: ignore[assignment]  # a method of tuple has the name
    """Float64 [1]: values a channel over all processes; None: `elements`."""
    elements: int
    norm: int
    eps: float
    measured: bool
    """The moments of the map were taken: dz has a term in z and a constant."""
    pass_on: bool
    """A gradient from elsewhere joins dz as it is."""


_LATER = ("later_a", "later_db", "later_weight", "later_running_mean", "later_running_var", "later_dweight")


def _check_vector(t: Tensor | None, name: str, sizes: list[int], table: Tensor) -> None:
    if t is not None:
        check_vector(t, name, sizes, "table", table.device, _FLOATING, "float32, float64, bfloat16 or float16")


def _check_number(t: Tensor | None, name: str, dtype: torch.dtype, table: Tensor) -> None:
    if t is not None and (t.numel() != 1 or t.dtype != dtype or t.device != table.device):
        fail(f"{name} must be one {str(dtype).removeprefix('torch.')} number on the device of the table")


def _check_map_of(table: Tensor, index: int, norm: int, count: Tensor | None) -> None:
    if table.dim() != 3 or table.shape[1] != TABLE_ROWS or table.dtype != torch.float64 or not table.is_contiguous():
        fail(f"table must be a contiguous float64 tensor [maps, {TABLE_ROWS}, C]")
    if not 0 <= index < table.shape[0]:
        fail(f"index {index} is outside the {table.shape[0]} maps of table")
    if norm not in list(BranchNorm):
        fail(f"norm must be 0 (none), 1 (batch) or 2 (running); got {norm}")
    _check_number(count, "count", torch.float64, table)


def _check_pair(
    table: Tensor, names: tuple[str, str], pair: Sequence[Tensor | None], sizes: list[int], needed_by: str | None
) -> None:
    for name, vector in zip(names, pair, strict=True):
        _check_vector(vector, name, sizes, table)
    if (pair[0] is None) != (pair[1] is None):
        fail(f"{' and '.join(names)} go together")
    if needed_by is not None and pair[0] is None:
        fail(f"{needed_by} needs {' and '.join(names)}")


def _check_updates(table: Tensor, name: str, batches: Tensor | None, momentum: float | None) -> None:
    _check_number(batches, name, torch.int64, table)
    if momentum is None and batches is None:
        fail(f"a momentum of None (a cumulative average) needs {name}")


def _bits(number: float | None) -> int | None:
    """A float64 as a kernel gets all of it: of a float Triton passes float32."""
    return None if number is None else int(struct.unpack("<q", struct.pack("<d", number))[0])


def _tile(slabs: int) -> dict[str, int]:
    """Slabs that a program merges together, 0 for none, its channels, and its warps."""
    if slabs == 0:
        return {"SLABS": 0, "COLS": _COLS, "num_warps": _WARPS}
    together, columns = merge_tile(slabs)
    return {"SLABS": together, "COLS": min(columns, _COLS), "num_warps": _WARPS if together == 1 else _MERGING_WARPS}


def block_coefficients(
    table: Tensor,
    index: int,
    doubles: bool,
    mean: Tensor | None,
    var: Tensor | None,
    count: Tensor | None,
    elements: int,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    """`ernet::block_coefficients` on a CUDA device; `rest`: `NormArguments`, `ShortcutArguments`, eps."""
    norm = rest[0]
    _check_pair(table, ("mean", "var"), (mean, var), [table.shape[-1]], _BATCH if norm == BranchNorm.BATCH else None)
    return _coefficients(table, index, doubles, mean, var, count, elements, None, *rest)


def measured_coefficients(z: Tensor, table: Tensor, index: int, *rest: Any) -> tuple[Tensor, Tensor]:
    """`ernet::measured_coefficients` on a CUDA device: `block_coefficients` with the moments of z [N, C, H, W].

    `rest`: `NormArguments`, `ShortcutArguments`, eps. Two launches, of which the second merges what the first leaves.
    """
    shape, slabs = map_launch.slab_moments(z, False)
    if shape.C != table.shape[-1]:
        fail(f"z must have the {table.shape[-1]} channels of the table; got {shape.C}")
    doubles, elements = z.dtype == torch.float64, shape.N * shape.P
    if slabs is None:
        return block_coefficients(table, index, doubles, *map_launch.channel_moments(z, False), None, elements, *rest)
    cut, partial = slabs
    return _coefficients(table, index, doubles, partial, None, None, elements, cut, *rest)


def _coefficients(
    table: Tensor,
    index: int,
    doubles: bool,
    mean: Tensor | None,
    var: Tensor | None,
    count: Tensor | None,
    elements: int,
    cut: Reduction | None,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    """See `block_coefficients`; with `cut`, `mean` are moments of slabs."""
    norm, shortcut, eps = NormArguments(*rest[:8]), ShortcutArguments(*rest[8:-1]), rest[-1]
    updates_norm = norm.norm == BranchNorm.BATCH and norm.mean is not None
    updates_shortcuts = not shortcut.use_running and shortcut.running_mean is not None
    _check_map_of(table, index, norm.norm, count)
    channels = table.shape[2]
    of_map, of_maps = [channels], [index, channels]
    running = "norm 2 (running)" if norm.norm == BranchNorm.RUNNING else None
    use_running = "use_running" if shortcut.use_running else None
    _check_pair(table, ("norm_mean", "norm_var"), (norm.mean, norm.var), of_map, running)
    _check_pair(table, ("running_mean", "running_var"), shortcut[1:3], of_maps, use_running)
    _check_vector(norm.gamma, "gamma", of_map, table)
    _check_vector(norm.beta, "beta", of_map, table)
    _check_vector(shortcut.weight, "weight", of_maps, table)
    if updates_norm:
        _check_updates(table, "norm_batches", norm.batches, norm.momentum)
    if updates_shortcuts:
        _check_updates(table, "batches", shortcut.batches, shortcut.momentum)
    dtype = torch.float64 if doubles else torch.float32
    block = shortcut.weight is not None
    a = table.new_empty((index + 1 if block else 0, channels), dtype=dtype)
    b = table.new_empty((channels if block else 0,), dtype=dtype)
    if channels == 0:
        return a, b
    tile = _tile(0 if cut is None else cut.slabs)
    work = (0, 0, 0, 0) if cut is None else (cut.slabs, cut.runs, cut.run_length, cut.units_per_slab)
    with on_device_of(table):
        # every program of the kernel reads a count that makes a momentum: it is raised before
        if updates_norm and norm.momentum is None and norm.batches is not None:
            norm.batches.add_(1)
        if updates_shortcuts and shortcut.momentum is None and shortcut.batches is not None:
            shortcut.batches.add_(1)
        kernels().block_coefficients_kernel[(ceil_div(channels, tile["COLS"]),)](
            table,
            mean,
            var,
            *work,
            count,
            *norm[1:6],
            *shortcut[:4],
            a,
            b,
            index,
            channels,
            elements,
            _bits(norm.momentum),
            _bits(shortcut.momentum),
            NORM_EPS=float(norm.eps),
            EPS=float(eps),
            BRANCH=int(norm.norm),
            UPDATE_NORM=updates_norm,
            USE_RUNNING=shortcut.use_running,
            UPDATE=updates_shortcuts,
            STEP=1 if cut is None else cut.step,
            **tile,
        )
    return a, b


def _check_later(k: MapArguments, dtype: torch.dtype) -> None:
    """Check what is there of each later block; without sums only a is used."""
    channels, num_later = k.table.shape[2], len(k.later_a)
    for name in _LATER:
        vectors = getattr(k, name)
        if len(vectors) != num_later:
            fail(f"{name} must have one tensor for each of the {num_later} of later_a; got {len(vectors)}")
        if k.sums is None and name != "later_a":
            continue
        for i, t in enumerate(vectors):
            sizes = [channels] if name == "later_db" else [max([k.index + 1, *t.shape[:1]]), channels]
            if not (t.numel() == 0 and "running" in name):
                _check_vector(t, f"{name}[{i}]", sizes, k.table)
            if t.dtype != dtype and name in ("later_a", "later_dweight"):
                fail(f"{name}[{i}] must be {dtype}, as all coefficients are; got {t.dtype}")
            if t.dtype != torch.float64 and name == "later_db":
                fail(f"{name}[{i}] must be float64, as all sums are; got {t.dtype}")
    for i, (mean, var) in enumerate(zip(k.later_running_mean, k.later_running_var, strict=True)):
        if (mean.numel() == 0) != (var.numel() == 0):
            fail(f"later_running_mean[{i}] and later_running_var[{i}] go together")


def _check_map(k: MapArguments) -> torch.dtype:
    """Check all arguments; returns the dtype of sums and coefficients."""
    _check_map_of(k.table, k.index, k.norm, k.count)
    channels = k.table.shape[2]
    found = [t.dtype for t in (k.a, *k.later_a) if t is not None]
    dtype = found[0] if found else torch.float32
    if dtype not in (torch.float32, torch.float64) or found.count(dtype) < len(found):
        fail(f"a and later_a must all be float32, or float64 for float64 maps; got {sorted(map(str, set(found)))}")
    _check_vector(k.a, "a", [k.index + 1, channels], k.table)
    _check_later(k, dtype)
    return dtype


def map_coefficients_backward(*arguments: Any, **named: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`ernet::map_coefficients_backward` on a CUDA device, of `MapArguments`.

    Returns:
        rows: coefficients of dz as a weighted sum of the map's own g (with `a`), later g, z (`measured`) and what is
            passed on (`pass_on`), [so many, C].
        k0: its constant [C]; empty unless measured.
        dgamma, dbeta: [C]; empty without a BatchNorm or without sums.
        dmoments: gradients of mean and variance, float64 [2, C].
    """
    k = MapArguments(*arguments, **named)
    dtype = _check_map(k)
    if k.sums is not None:
        check_vector(
            k.sums, "sums", [len(k.later_a) + (0 if k.a is None else 2), k.table.shape[2]], "table", k.table.device,
            (torch.float64,), "float64",
        )  # fmt: skip
    rows, k0, dgamma, dbeta, dmoments, _ = _map_coefficients(k, dtype)
    return rows, k0, dgamma, dbeta, dmoments


def map_backward(
    z: Tensor, dy: Tensor | None, y: Tensor | None, later_g: Sequence[Tensor], table: Tensor, index: int, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`ernet::map_backward` on a CUDA device: `map_coefficients_backward` with the sums of `map_dots`.

    Two launches, of which the second merges what the first leaves; more with many later blocks, as in these operators.
    `rest`: `MapArguments` from `a` on, without `count` and `elements`.

    Returns:
        rows, k0, dgamma, dbeta: of `map_coefficients_backward`.
        db: the sum of g, float64 [C]; empty without dy.
        g: of `map_dots`.
    """
    shape, partial, g = map_launch.slab_dots(z, dy, y, later_g, "later_g", False)
    a, *later, norm, eps, measured, pass_on = rest
    if shape.C != table.shape[-1]:
        fail(f"z must have the {table.shape[-1]} channels of the table; got {shape.C}")
    if len(later_g) != len(later[0]) or (a is None) != (dy is None):
        fail("later_g must have one map for each of later_a, and a goes with dy")
    sums = partial
    if partial is None:
        sums = table.new_zeros((len(later_g) + (0 if dy is None else 2), shape.C))
    k = MapArguments(*(table, index, sums, a, *later, None, shape.N * shape.P, norm, eps, measured, pass_on))
    _check_map(k)
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    rows, k0, dgamma, dbeta, _, db = _map_coefficients(k, dtype, merge=partial is not None)
    if partial is None and dy is not None:
        db.zero_()
    return rows, k0, dgamma, dbeta, db, g


def _map_coefficients(k: MapArguments, dtype: torch.dtype, merge: bool = False) -> tuple[Tensor, ...]:
    """Results of `map_coefficients_backward`, and the sum of g; with `merge` k.sums are those of slabs."""
    channels, num_later = k.table.shape[2], len(k.later_a)
    num_rows = num_later + (k.a is not None) + k.measured + k.pass_on
    affine = 0 if k.norm == BranchNorm.NONE or k.sums is None else channels
    k0, dgamma, dbeta = (
        k.table.new_empty((size,), dtype=dtype) for size in (channels if k.measured else 0, affine, affine)
    )
    rows, dmoments = k.table.new_empty((num_rows, channels), dtype=dtype), k.table.new_empty((2, channels))
    db = k.table.new_empty((0 if k.a is None else channels,))
    if k.sums is None:
        kept = [t[k.index] for t in (k.a, *k.later_a) if t is not None]
        kept += [k0.zero_()] * k.measured + [k0.new_ones(channels)] * k.pass_on
        if kept:
            torch.stack(kept, out=rows)
        return rows, k0, dgamma, dbeta, dmoments.zero_(), db
    if channels > 0:
        with on_device_of(k.table):
            _launch_map(k, k.sums, rows, (k0, dgamma, dbeta, dmoments, db), k.sums.shape[0] if merge else 0)
    return rows, k0, dgamma, dbeta, dmoments, db


def _launch_map(k: MapArguments, sums: Tensor, rows: Tensor, vectors: tuple[Tensor, ...], slabs: int) -> None:
    """One launch; with more than _LATER_BLOCKS later blocks one for each so many, which add up in `totals`.

    `slabs`: of `sums`, which are merged; 0: they are the sums.
    """
    channels, num_later = k.table.shape[2], len(k.later_a)
    tile = _tile(slabs)
    totals = k.table.new_empty((4, channels)) if num_later > _LATER_BLOCKS else k.table
    for first in range(0, max(1, num_later), _LATER_BLOCKS):
        lists = [getattr(k, name)[first : first + _LATER_BLOCKS] for name in _LATER]
        running = [mean.numel() > 0 for mean in k.later_running_mean[first : first + _LATER_BLOCKS]]
        # where nothing is loaded, pointers of a likely type: a type of its own would be compiled for
        weights = lists[2]
        lists[3:5] = [
            [t if used else w for t, w, used in zip(some, weights, running, strict=True)] for some in lists[3:5]
        ]
        kernels().map_coefficients_backward_kernel[(ceil_div(channels, tile["COLS"]),)](
            k.table,
            sums,
            slabs,
            k.a,
            *(
                padded(some, some[0] if some else k.table if name == "later_db" else rows)
                for name, some in zip(_LATER, lists, strict=True)
            ),
            k.count,
            totals,
            rows,
            *vectors,
            len(running),
            first,
            num_later,
            sum(1 << i for i, used in enumerate(running) if used),
            k.index,
            channels,
            k.elements,
            EPS=float(k.eps),
            BRANCH=int(k.norm),
            MEASURED=k.measured,
            PASS_ON=k.pass_on,
            LAST=first + _LATER_BLOCKS >= num_later,
            **tile,
        )
