"""The algebra on C-vectors of a block with batch norm as two operators, each one call (on a GPU one launch).

    block_coefficients            moments, BatchNorm, weights -> a, b of the block's weighted sum; running statistics
    block_coefficients_backward   da, db -> gradients of weights, gamma and beta; rows of the weighted sum that is dz

Their formulas are in docs/er-shortcuts.md; `statistics` holds the same algebra as plain differentiable PyTorch, which
programs that are compiled or exported use, and group norm. A stage's `table` holds what later blocks need to know of
each map, and `totals` gathers in one backward pass what later blocks owe to it.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

TABLE_ROWS = 7
"""Of each map, [C] each: scale, 1 / deviation, centre, shift, mean, variance, 1 / deviation of x."""
MEAN_ROW = 4
TOTAL_ROWS = 4
"""Of each map, [C] each: gradients of scale, shift, mean and variance."""


class BranchNorm(enum.IntEnum):
    """What makes `x = scale * z + shift` of the raw map z."""

    NONE = 0
    """x = z."""
    BATCH = 1
    """BatchNorm with the statistics of the batch."""
    RUNNING = 2
    """BatchNorm with running statistics."""


class NormArguments(NamedTuple):
    """How x comes from z, as `block_coefficients` takes it."""

    norm: BranchNorm
    gamma: Tensor | None
    beta: Tensor | None
    mean: Tensor | None
    """BATCH: running statistics to be moved, or None. RUNNING: those to be used."""
    var: Tensor | None
    batches: Tensor | None
    momentum: float | None
    eps: float


class ShortcutArguments(NamedTuple):
    """A block's shortcuts, as `block_coefficients` takes them."""

    weight: Tensor | None
    """None for a map that no block made."""
    running_mean: Tensor | None
    """To be moved; with `use_running` to be used instead."""
    running_var: Tensor | None
    batches: Tensor | None
    use_running: bool
    momentum: float | None


NO_SHORTCUT = ShortcutArguments(None, None, None, None, False, 0.0)
NO_NORM = NormArguments(BranchNorm.NONE, None, None, None, None, None, 0.0, 0.0)


def count_changes(norm: NormArguments, shortcut: ShortcutArguments) -> None:
    """Let autograd know which running statistics were moved, as in-place operators of PyTorch do."""
    changed: list[Tensor | None] = []
    if norm.norm == BranchNorm.BATCH:
        changed += [norm.mean, norm.var, norm.batches]
    if not shortcut.use_running:
        changed += [shortcut.running_mean, shortcut.running_var, shortcut.batches]
    tracked = [t for t in changed if t is not None and not t.is_inference()]
    if tracked:
        torch.autograd.graph.increment_version(tracked)


def with_contiguous_vectors(
    norm: NormArguments, shortcut: ShortcutArguments
) -> tuple[NormArguments, ShortcutArguments]:
    """The same with weights that the operators take; parameters need not be contiguous."""
    if not (shortcut.weight is None or shortcut.weight.is_contiguous()):
        shortcut = shortcut._replace(weight=shortcut.weight.contiguous())
    if not (norm.gamma is None or norm.gamma.is_contiguous()):
        norm = norm._replace(gamma=norm.gamma.contiguous())
    if not (norm.beta is None or norm.beta.is_contiguous()):
        norm = norm._replace(beta=norm.beta.contiguous())
    return norm, shortcut


def new_table(like: Tensor, num_maps: int) -> Tensor:
    """The table of a stage of `num_maps` maps like `like` [N, C, H, W]."""
    return like.new_empty((num_maps, TABLE_ROWS, like.shape[1]), dtype=torch.float64)


def new_totals(table: Tensor) -> Tensor:
    """The totals of one backward pass of a stage with this table, at zero."""
    return table.new_zeros((table.shape[0], TOTAL_ROWS, table.shape[2]))


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
    """Write map `index` into the table, and return a [index + 1, C] and b [C] of its block's weighted sum.

    Args:
        table: float64 [maps, TABLE_ROWS, C]; rows before `index` are read.
        index: which map of the stage.
        doubles: a and b are float64, as for float64 maps; else float32.
        mean: measured mean of the raw map [C], or None where nothing depends on it.
        var: likewise, the biased variance.
        count: how many values a channel they come from, a float64 number; None for `elements`.
        elements: likewise, as a number.
        norm: a `BranchNorm`.
        gamma: of that BatchNorm, [C] or None.
        beta: likewise.
        norm_mean: its running mean [C]; BATCH moves it in place, if it is given, RUNNING uses it.
        norm_var: likewise, the variance.
        norm_batches: int64 number of batches that BATCH has seen, counted up in place, or None.
        norm_momentum: of its running statistics; None is that of a cumulative average.
        norm_eps: added to its variances.
        weight: the block's shortcut weights [index, C]; None for a map that no block has made: a and b are empty.
        running_mean: of the shortcuts [index, C]; moved in place, if it is given; with `use_running` used.
        running_var: likewise, the variances.
        batches: int64 number of batches that the shortcuts have seen, counted up in place, or None.
        use_running: normalise the earlier maps with running statistics.
        momentum: of the shortcuts' running statistics; None is that of a cumulative average.
        eps: added to variances of maps.
    """
    return torch.ops.ernet.block_coefficients.default(
        table,
        index,
        doubles,
        mean,
        var,
        count,
        elements,
        norm,
        gamma,
        beta,
        norm_mean,
        norm_var,
        norm_batches,
        norm_momentum,
        norm_eps,
        weight,
        running_mean,
        running_var,
        batches,
        use_running,
        momentum,
        eps,
    )


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
) -> tuple[Tensor, ...]:
    """What da and db of a block, and what later blocks have left in `totals`, mean for its vectors and its map.

    Args:
        table: this and other arguments of that name are those of `block_coefficients`.
        index: which map of the stage.
        doubles: vectors are float64.
        totals: float64 [maps, TOTAL_ROWS, C]; this block's share for earlier maps is added to their rows.
        da: gradient of a, or None where the block's output has none.
        db: gradient of b, likewise.
        count: values a channel, or None for `elements`.
        elements: likewise.
        norm: a `BranchNorm`.
        weight: [index, C], or None.
        running_mean: [index, C], read with `use_running`.
        running_var: likewise.
        use_running: earlier maps were normalised with running statistics.
        eps: added to variances of maps.
        readers: the a of all blocks that read this map and have a gradient.
        measured: the map's moments were taken.
        pass_on: the map's gradient from elsewhere joins its weighted sum.

    Returns:
        rows: coefficients of dz: of g of each of the readers, of z if measured, 1 if pass_on, [sum of these, C].
        k0: its constant [C], empty unless measured.
        dweight [index, C] (empty without da), dgamma, dbeta [C] (empty for NONE).
        dmoments: gradients of mean and variance, float64 [2, C].
    """
    return torch.ops.ernet.block_coefficients_backward.default(
        table,
        index,
        doubles,
        totals,
        da,
        db,
        count,
        elements,
        norm,
        weight,
        running_mean,
        running_var,
        use_running,
        eps,
        readers,
        measured,
        pass_on,
    )


def _vector_dtype(doubles: bool) -> torch.dtype:
    return torch.float64 if doubles else torch.float32


def _forward_fake(
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
    channels = table.shape[2]
    maps, width = (0, 0) if weight is None else (index + 1, channels)
    dtype = _vector_dtype(doubles)
    return table.new_empty((maps, channels), dtype=dtype), table.new_empty((width,), dtype=dtype)


def _backward_fake(
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
    readers: list[Tensor],
    measured: bool,
    pass_on: bool,
) -> tuple[Tensor, ...]:
    channels, dtype = table.shape[2], _vector_dtype(doubles)
    affine = channels if norm != BranchNorm.NONE else 0
    sizes = [
        (len(readers) + measured + pass_on, channels),
        (channels if measured else 0,),
        (0 if da is None else index, channels),
        (affine,),
        (affine,),
    ]
    return *(table.new_empty(size, dtype=dtype) for size in sizes), table.new_empty((2, channels))


def register() -> None:
    """Give the operators fake kernels; they have no autograd, `_autograd.Block` is their derivative."""
    torch.library.register_fake("ernet::block_coefficients", _forward_fake)
