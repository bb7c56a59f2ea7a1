"""The algebra on C-vectors on CUDA devices: argument checks and the launches, one for each operator.

As in `triton_launch`, nothing waits for the device, and calls can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ernet_fast.er import epilogue_arguments as coefficients
from ernet_fast.er.epilogue_arguments import BranchNorm
from ernet_fast.er.triton import map_launch
from ernet_fast.er.triton.tiling import ceil_div, padded_count

_COLS = 128  # channels of a program: with 256 channels two of them, with 2048 sixteen
_WARPS = 4
_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _fail(message: str) -> None:
    raise RuntimeError(f"ernet: {message}")


def _check_vector(t: Tensor | None, name: str, sizes: list[int], table: Tensor) -> None:
    if t is None:
        return
    if list(t.shape) != sizes:
        _fail(f"{name} must have shape {sizes}; got {list(t.shape)}")
    if t.device != table.device:
        _fail(f"{name} must be on the device of the table, {table.device}; it is on {t.device}")
    if t.dtype not in _FLOATING:
        _fail(f"{name} must be float32, float64, bfloat16 or float16; got {t.dtype}")
    if not (t.is_contiguous() or t.numel() == 0):
        _fail(f"{name} must be contiguous")


def _check_rows(t: Tensor, name: str, rows: int, index: int) -> None:
    if t.dim() != 3 or t.shape[1] != rows or t.dtype != torch.float64 or not t.is_contiguous():
        _fail(f"{name} must be a contiguous float64 tensor [maps, {rows}, C]")
    if not 0 <= index < t.shape[0]:
        _fail(f"index {index} is outside the {t.shape[0]} maps of {name}")


def _check_pair(first: Tensor | None, second: Tensor | None, names: str) -> None:
    if (first is None) != (second is None):
        _fail(f"{names} go together")


def _check_number(t: Tensor | None, name: str, dtype: torch.dtype, table: Tensor) -> None:
    if t is not None and (t.numel() != 1 or t.dtype != dtype or t.device != table.device):
        _fail(f"{name} must be one {str(dtype).removeprefix('torch.')} number on the device of the table")


def _check_moving(batches: Tensor | None, momentum: float | None, name: str, table: Tensor) -> None:
    _check_number(batches, name, torch.int64, table)
    if momentum is None and batches is None:
        _fail(f"a momentum of None (a cumulative average) needs {name}")


def block_coefficients(
    table: Tensor,
    index: int,
    doubles: bool,
    mean: Tensor | None,
    var: Tensor | None,
    count: Tensor | None,
    elements: int,
    norm: int,
    gamma: Tensor | None,
    beta: Tensor | None,
    norm_mean: Tensor | None,
    norm_var: Tensor | None,
    norm_batches: Tensor | None,
    norm_momentum: float | None,
    norm_eps: float,
    weight: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    batches: Tensor | None,
    use_running: bool,
    momentum: float | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """`ernet::block_coefficients` on a CUDA device."""
    _check_rows(table, "table", coefficients.TABLE_ROWS, index)
    channels = table.shape[2]
    one = {"mean": mean, "var": var, "gamma": gamma, "beta": beta, "norm_mean": norm_mean, "norm_var": norm_var}
    for name, vector in one.items():
        _check_vector(vector, name, [channels], table)
    for name, vector in {"weight": weight, "running_mean": running_mean, "running_var": running_var}.items():
        _check_vector(vector, name, [index, channels], table)
    _check_pair(mean, var, "mean and var")
    _check_pair(norm_mean, norm_var, "norm_mean and norm_var")
    _check_pair(running_mean, running_var, "running_mean and running_var")
    _check_number(count, "count", torch.float64, table)
    branch = BranchNorm(norm)
    if branch == BranchNorm.BATCH and mean is None:
        _fail("norm 1 (batch) needs mean and var")
    if branch == BranchNorm.RUNNING and norm_mean is None:
        _fail("norm 2 (running) needs norm_mean and norm_var")
    if use_running and running_mean is None:
        _fail("use_running needs running_mean and running_var")
    move_norm = branch == BranchNorm.BATCH and norm_mean is not None
    move = not use_running and running_mean is not None
    if move_norm:
        _check_moving(norm_batches, norm_momentum, "norm_batches", table)
    if move:
        _check_moving(batches, momentum, "batches", table)
    dtype = torch.float64 if doubles else torch.float32
    block = weight is not None
    a = table.new_empty((index + 1 if block else 0, channels), dtype=dtype)
    b = table.new_empty((channels if block else 0,), dtype=dtype)
    if channels == 0:
        return a, b
    with map_launch.on_device_of(table):
        # every program of the kernel reads a count that makes a momentum: it is raised before
        if move_norm and norm_momentum is None and norm_batches is not None:
            norm_batches.add_(1)
        if move and momentum is None and batches is not None:
            batches.add_(1)
        map_launch.kernels().block_coefficients_kernel[(ceil_div(channels, _COLS),)](
            table,
            *(table if t is None else t for t in (mean, var, count, gamma, beta, norm_mean, norm_var, norm_batches)),
            *(table if t is None else t for t in (weight, running_mean, running_var, batches)),
            a,
            b,
            index,
            channels,
            elements,
            0.0 if norm_momentum is None else float(norm_momentum),
            0.0 if momentum is None else float(momentum),
            NORM_EPS=float(norm_eps),
            EPS=float(eps),
            MEASURED=mean is not None,
            HAS_COUNT=count is not None,
            BRANCH=int(branch),
            HAS_GAMMA=gamma is not None,
            HAS_BETA=beta is not None,
            MOVE_NORM=move_norm,
            NORM_BATCHES=norm_batches is not None,
            NORM_CUMULATIVE=move_norm and norm_momentum is None,
            BLOCK=block,
            USE_RUNNING=use_running,
            MOVE=move,
            BATCHES=batches is not None,
            CUMULATIVE=move and momentum is None,
            COLS=_COLS,
            num_warps=_WARPS,
        )
    return a, b


def block_coefficients_backward(
    table: Tensor,
    index: int,
    doubles: bool,
    totals: Tensor,
    da: Tensor | None,
    db: Tensor | None,
    count: Tensor | None,
    elements: int,
    norm: int,
    weight: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_running: bool,
    eps: float,
    readers: Sequence[Tensor],
    measured: bool,
    pass_on: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`ernet::block_coefficients_backward` on a CUDA device."""
    _check_rows(table, "table", coefficients.TABLE_ROWS, index)
    _check_rows(totals, "totals", coefficients.TOTAL_ROWS, index)
    channels, dtype = table.shape[2], torch.float64 if doubles else torch.float32
    _check_vector(da, "da", [index + 1, channels], table)
    _check_vector(db, "db", [channels], table)
    for name, vector in {"weight": weight, "running_mean": running_mean, "running_var": running_var}.items():
        _check_vector(vector, name, [index, channels], table)
    _check_pair(da, db, "da and db")
    _check_number(count, "count", torch.float64, table)
    if da is not None and weight is None:
        _fail("da needs weight")
    if use_running and (running_mean is None or running_var is None):
        _fail("use_running needs running_mean and running_var")
    for reader in readers:
        fits = reader.dim() == 2 and reader.shape[0] > index and reader.shape[1] == channels
        if not (fits and reader.dtype == dtype and reader.device == table.device and reader.is_contiguous()):
            _fail("readers must be coefficients [> index, C] of later blocks")
    branch, reached = BranchNorm(norm), da is not None
    affine = channels if branch != BranchNorm.NONE else 0
    rows = table.new_empty((len(readers) + measured + pass_on, channels), dtype=dtype)
    k0 = table.new_empty((channels if measured else 0,), dtype=dtype)
    dweight = table.new_empty((index if reached else 0, channels), dtype=dtype)
    dgamma, dbeta = (table.new_empty((affine,), dtype=dtype) for _ in range(2))
    dmoments = table.new_empty((2, channels))
    if channels == 0:
        return rows, k0, dweight, dgamma, dbeta, dmoments
    # where there is no reader, the kernel gets pointers of the right type that it does not follow
    padded = (*readers, *([readers[0] if readers else rows] * (padded_count(len(readers)) - len(readers))))
    with map_launch.on_device_of(table):
        map_launch.kernels().block_coefficients_backward_kernel[(ceil_div(channels, _COLS),)](
            table,
            totals,
            *(table if t is None else t for t in (da, db, count, weight, running_mean, running_var)),
            padded,
            rows,
            k0,
            dweight,
            dgamma,
            dbeta,
            dmoments,
            len(readers),
            index,
            channels,
            elements,
            EPS=float(eps),
            REACHED=reached,
            HAS_COUNT=count is not None,
            BRANCH=int(branch),
            USE_RUNNING=use_running,
            MEASURED=measured,
            PASS_ON=pass_on,
            COLS=_COLS,
            num_warps=_WARPS,
        )
    return rows, k0, dweight, dgamma, dbeta, dmoments
