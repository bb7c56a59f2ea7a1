"""The algebra on per-channel vectors on CUDA devices: argument checks and the launches, one for each operator.

As in `map_launch`, nothing waits for the device, and calls can be captured in a CUDA graph.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ernet_fast.er.epilogue_arguments import TABLE_ROWS, BranchNorm
from ernet_fast.er.triton.map_launch import check_vector, fail, on_device_of, padded
from ernet_fast.er.triton.tiling import ceil_div

_COLS = 128  # channels of a program: with 256 channels two of them, with 2048 sixteen
_WARPS = 4
_LATER_BLOCKS = 16  # of a launch, which goes through them unrolled: compiling it for 32 takes three times as long
_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@functools.lru_cache(maxsize=1)
def kernels() -> ModuleType:
    """The module of the kernels of the algebra."""
    from ernet_fast.er.triton import coefficient_kernels  # here, because it imports triton

    return coefficient_kernels


class BlockArguments(NamedTuple):
    """The arguments of `ernet::block_coefficients`, which `epilogue_arguments` describes in part."""

    table: Tensor
    index: int  # type: ignore[assignment]  # a method of tuple has the name
    doubles: bool
    mean: Tensor | None
    var: Tensor | None
    count: Tensor | None  # type: ignore[assignment]  # a method of tuple has the name
    elements: int
    norm: int
    gamma: Tensor | None
    beta: Tensor | None
    norm_mean: Tensor | None
    norm_var: Tensor | None
    norm_batches: Tensor | None
    norm_momentum: float | None
    norm_eps: float
    weight: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    batches: Tensor | None
    use_running: bool
    momentum: float | None
    eps: float

    @property
    def updates_norm(self) -> bool:
        """True if running statistics of the branch's BatchNorm are updated."""
        return self.norm == BranchNorm.BATCH and self.norm_mean is not None

    @property
    def updates_shortcuts(self) -> bool:
        """True if running statistics of the shortcuts are updated."""
        return not self.use_running and self.running_mean is not None


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


def _check_map_of(k: BlockArguments | MapArguments) -> None:
    table = k.table
    if table.dim() != 3 or table.shape[1] != TABLE_ROWS or table.dtype != torch.float64 or not table.is_contiguous():
        fail(f"table must be a contiguous float64 tensor [maps, {TABLE_ROWS}, C]")
    if not 0 <= k.index < table.shape[0]:
        fail(f"index {k.index} is outside the {table.shape[0]} maps of table")
    if k.norm not in list(BranchNorm):
        fail(f"norm must be 0 (none), 1 (batch) or 2 (running); got {k.norm}")
    _check_number(k.count, "count", torch.float64, table)


def _check_block(k: BlockArguments) -> None:
    _check_map_of(k)
    channels = k.table.shape[2]
    for names, sizes, needed_by in (
        (("mean", "var"), [channels], "norm 1 (batch)" if k.norm == BranchNorm.BATCH else ""),
        (("norm_mean", "norm_var"), [channels], "norm 2 (running)" if k.norm == BranchNorm.RUNNING else ""),
        (("running_mean", "running_var"), [k.index, channels], "use_running" if k.use_running else ""),
    ):
        pair = [getattr(k, name) for name in names]
        for name, vector in zip(names, pair, strict=True):
            _check_vector(vector, name, sizes, k.table)
        if (pair[0] is None) != (pair[1] is None):
            fail(f"{' and '.join(names)} go together")
        if needed_by and pair[0] is None:
            fail(f"{needed_by} needs {' and '.join(names)}")
    _check_vector(k.gamma, "gamma", [channels], k.table)
    _check_vector(k.beta, "beta", [channels], k.table)
    _check_vector(k.weight, "weight", [k.index, channels], k.table)
    for updates, name, batches, momentum in (
        (k.updates_norm, "norm_batches", k.norm_batches, k.norm_momentum),
        (k.updates_shortcuts, "batches", k.batches, k.momentum),
    ):
        if updates:
            _check_number(batches, name, torch.int64, k.table)
            if momentum is None and batches is None:
                fail(f"a momentum of None (a cumulative average) needs {name}")


def block_coefficients(k: BlockArguments) -> tuple[Tensor, Tensor]:
    """`ernet::block_coefficients` on a CUDA device."""
    _check_block(k)
    channels, dtype = k.table.shape[2], torch.float64 if k.doubles else torch.float32
    block = k.weight is not None
    a = k.table.new_empty((k.index + 1 if block else 0, channels), dtype=dtype)
    b = k.table.new_empty((channels if block else 0,), dtype=dtype)
    if channels == 0:
        return a, b
    with on_device_of(k.table):
        # every program of the kernel reads a count that makes a momentum: it is raised before
        if k.updates_norm and k.norm_momentum is None and k.norm_batches is not None:
            k.norm_batches.add_(1)
        if k.updates_shortcuts and k.momentum is None and k.batches is not None:
            k.batches.add_(1)
        vectors = (k.mean, k.var, k.count, k.gamma, k.beta, k.norm_mean, k.norm_var, k.norm_batches)
        shortcuts = (k.weight, k.running_mean, k.running_var, k.batches)
        kernels().block_coefficients_kernel[(ceil_div(channels, _COLS),)](
            k.table,
            *vectors,
            *shortcuts,
            a,
            b,
            k.index,
            channels,
            k.elements,
            k.norm_momentum,
            k.momentum,
            NORM_EPS=float(k.norm_eps),
            EPS=float(k.eps),
            BRANCH=int(k.norm),
            UPDATE_NORM=k.updates_norm,
            USE_RUNNING=k.use_running,
            UPDATE=k.updates_shortcuts,
            COLS=_COLS,
            num_warps=_WARPS,
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
    _check_map_of(k)
    channels = k.table.shape[2]
    found = [t.dtype for t in (k.a, *k.later_a) if t is not None]
    dtype = found[0] if found else torch.float32
    if dtype not in (torch.float32, torch.float64) or found.count(dtype) < len(found):
        fail(f"a and later_a must all be float32, or float64 for float64 maps; got {sorted(map(str, set(found)))}")
    if k.sums is not None and k.sums.dtype != torch.float64:
        fail(f"sums must be float64; got {k.sums.dtype}")
    _check_vector(k.sums, "sums", [len(k.later_a) + (0 if k.a is None else 2), channels], k.table)
    _check_vector(k.a, "a", [k.index + 1, channels], k.table)
    _check_later(k, dtype)
    return dtype


def map_coefficients_backward(k: MapArguments) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`ernet::map_coefficients_backward` on a CUDA device.

    Returns:
        rows: coefficients of dz as a weighted sum of the map's own g (with `a`), later g, z (`measured`) and what is
            passed on (`pass_on`), [so many, C].
        k0: its constant [C]; empty unless measured.
        dgamma, dbeta: [C]; empty without a BatchNorm or without sums.
        dmoments: gradients of mean and variance, float64 [2, C].
    """
    dtype, channels, num_later = _check_map(k), k.table.shape[2], len(k.later_a)
    num_rows = num_later + (k.a is not None) + k.measured + k.pass_on
    affine = 0 if k.norm == BranchNorm.NONE or k.sums is None else channels
    k0, dgamma, dbeta = (
        k.table.new_empty((size,), dtype=dtype) for size in (channels if k.measured else 0, affine, affine)
    )
    rows, dmoments = k.table.new_empty((num_rows, channels), dtype=dtype), k.table.new_empty((2, channels))
    if k.sums is None:
        kept = [t[k.index] for t in (k.a, *k.later_a) if t is not None]
        kept += [k0.zero_()] * k.measured + [k0.new_ones(channels)] * k.pass_on
        if kept:
            torch.stack(kept, out=rows)
        return rows, k0, dgamma, dbeta, dmoments.zero_()
    if channels > 0:
        with on_device_of(k.table):
            _launch_map(k, k.sums, rows, (k0, dgamma, dbeta, dmoments))
    return rows, k0, dgamma, dbeta, dmoments


def _launch_map(k: MapArguments, sums: Tensor, rows: Tensor, vectors: tuple[Tensor, ...]) -> None:
    """One launch; with more than _LATER_BLOCKS later blocks one for each so many, which add up in `totals`."""
    channels, num_later = k.table.shape[2], len(k.later_a)
    totals = k.table.new_empty((4, channels)) if num_later > _LATER_BLOCKS else k.table
    for first in range(0, max(1, num_later), _LATER_BLOCKS):
        lists = [getattr(k, name)[first : first + _LATER_BLOCKS] for name in _LATER]
        running = [mean.numel() > 0 for mean in k.later_running_mean[first : first + _LATER_BLOCKS]]
        # where nothing is loaded, pointers of a likely type: a type of its own would be compiled for
        weights = lists[2]
        lists[3:5] = [
            [t if used else w for t, w, used in zip(some, weights, running, strict=True)] for some in lists[3:5]
        ]
        kernels().map_coefficients_backward_kernel[(ceil_div(channels, _COLS),)](
            k.table,
            sums,
            k.a,
            *(
                padded(some, some[0] if some else sums if name == "later_db" else rows)
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
            COLS=_COLS,
            num_warps=_WARPS,
        )
