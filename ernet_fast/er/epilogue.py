"""The epilogue of an ER block: the contract that a stage's autograd nodes call.

    er_block            moments of z, coefficients, weighted sum -> y, and a of the sum
    er_block_backward   dy and what later blocks have left -> dz, gradients of gamma and beta, a row of each dweight

Forward goes by block. Backward goes by map: the inner products of a map with its own and all later gradients of
weighted sums at once, gradients of per-channel vectors, then dz, a weighted sum of just those gradients and the map.

Two implementations: for maps on the CPU one operator each way (csrc/er/epilogue_ops.cpp), which works channel tile by
channel tile where that pays, so that each map is read from memory once; `epilogue_composed` everywhere else, one
operator a step, on CUDA devices Triton's, and collectives between where statistics are those of several processes. Both
have the same bits on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ernet_fast.er import epilogue_composed, lean, operators
from ernet_fast.er.epilogue_arguments import (
    BranchNorm,
    EpilogueState,
    LaterBlock,
    MapGradients,
    NormArguments,
    ShortcutArguments,
)
from ernet_fast.er.process_group import ProcessGroup

_NO_COLUMNS: tuple[list[Tensor], ...] = ([],) * len(LaterBlock._fields)


def block_operator_supports(x: Tensor, group: ProcessGroup | None) -> bool:
    """True if one operator a block each way serves maps like `x`, with statistics over `group`."""
    return group is None and x.device.type == "cpu"


def er_block(
    state: EpilogueState,
    maps: Sequence[Tensor],
    norm: NormArguments,
    shortcut: ShortcutArguments,
    *,
    measure: bool,
    relu: bool,
) -> Tensor:
    """File the last of `maps` and those that have not been, and return the output y of its block.

    Args:
        state: of the stage; rows of its table are written, a map is appended.
        maps: of the stage up to this block's, detached, [N, C, H, W], in the stage's layout.
        norm: how the last map becomes x; running statistics are updated in place.
        shortcut: likewise, the block's shortcuts.
        measure: take the last map's moments, even if `norm` does not need them.
        relu: apply the ReLU.
    """
    measure = measure or norm.norm == BranchNorm.BATCH
    if state.composed:
        y, a, b = epilogue_composed.er_block(state, maps, norm, shortcut, measure=measure, relu=relu)
    else:
        y, a, b = torch.ops.ernet.er_block.default(
            maps, state.table, state.filed, state.measure, measure, *norm, *shortcut, state.eps, state.num_groups, relu
        )
    # let autograd know which running statistics were updated, as in-place operators of PyTorch do
    changed: tuple[Tensor | None, ...] = norm[3:6] if norm.norm == BranchNorm.BATCH else ()
    if not shortcut.use_running:
        changed += shortcut[1:4]
    tracked = []
    for t in changed:
        if t is not None and not t.is_inference():
            tracked.append(t)
    if tracked:
        torch.autograd.graph.increment_version(tracked)
    for _ in range(len(state.a), len(maps) - 1):  # maps that no block made
        state.a.append(None)
        state.measured.append(state.measure)
    state.a.append(a)
    state.measured.append(measure)
    state.filed = len(maps)
    state.needs_dots |= measure or (state.measure and len(maps) > 1)
    lean.remember(y, maps, a, b, relu)
    return y


def er_block_backward(
    state: EpilogueState,
    index: int,
    z: Tensor,
    norm: BranchNorm,
    later: Sequence[LaterBlock],
    *,
    dy: Tensor | None = None,
    y: Tensor | None = None,
    passed: Tensor | None = None,
    before: Tensor | None = None,
    known: Tensor | None = None,
    needed: bool,
) -> MapGradients:
    """Gradients of map `index` and of what depends on it alone.

    Args:
        state: of the stage.
        index: which map of the stage.
        z: the map [N, C, H, W].
        norm: how the map became x.
        later: the later blocks whose outputs have a gradient, in order; row `index` of each one's dweight is written.
        dy: gradient of its block's output; None where that has none, and for a map that no block made.
        y: that output, if it went through a ReLU; without `state.needs_dots`, dy is that of the weighted sum instead.
        passed: a gradient of the map from elsewhere.
        before: the map before, if its gradient is due next: its inner products may come at less cost now than then.
        known: what the call for the map after has returned as `earlier_dots`, float64 [later, C] or [later, N, C].
        needed: whether dz is wanted.
    """
    if state.composed:
        return epilogue_composed.er_block_backward(
            state, index, z, norm, later, dy=dy, y=y, passed=passed, known=known, needed=needed
        )
    columns = [list(column) for column in zip(*later, strict=True)] if later else _NO_COLUMNS
    dz, relu_mask, db, dgamma, dbeta, earlier_dots = torch.ops.ernet.er_block_backward.default(
        index,
        z,
        dy,
        y,
        None if dy is None else state.a[index],
        *columns,
        passed,
        before,
        known,
        state.table,
        norm,
        state.eps,
        state.num_groups,
        state.needs_dots,
        state.measured[index],
        needed,
    )
    return MapGradients(dz, state.none if dy is None else dy, relu_mask, db, dgamma, dbeta, earlier_dots)


def _forward_fake(maps: list[Tensor], table: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
    z, (*_, num_groups, _relu) = maps[-1], rest
    sizes = z.shape[:2] if num_groups else z.shape[1:2]
    a, b = (z.new_empty(shape, dtype=operators.acc_dtype(z)) for shape in ((len(maps), *sizes), sizes))
    return torch.empty_like(z), a, b


def _backward_fake(
    index: int, z: Tensor, dy: Tensor | None, y: Tensor | None, a: Tensor | None, later_dy: list[Tensor], *rest: object
) -> tuple[Tensor, ...]:
    *_, passed, before, _known, _table, norm, _eps, num_groups, dots, measured, needed = rest
    channels, dtype = z.shape[1], operators.acc_dtype(z)
    sizes = z.shape[:2] if num_groups else z.shape[1:2]
    planar = z.is_contiguous()
    rows, length = (z.shape[0] * channels, z[0, 0].numel()) if planar else (z.numel() // channels, channels)
    num_g = len(later_dy) + (dy is not None)
    anything = needed and (num_g > 0 or measured or passed is not None)
    with_before = before is not None and dots and num_g > 0 and not planar and needed and passed is None
    mask_bytes = 0 if dy is None or y is None else index % 64 * 64 + rows * ((length + 63) // 64) * 8 + 8
    affine = channels if norm != BranchNorm.NONE else 0
    return (
        torch.empty_like(z) if anything else z.new_empty((0,)),
        z.new_empty((mask_bytes,), dtype=torch.uint8),
        z.new_empty((0,) if dy is None else sizes, dtype=torch.float64),
        z.new_empty((affine,), dtype=dtype),
        z.new_empty((affine,), dtype=dtype),
        z.new_empty((num_g, *sizes) if with_before else (0,), dtype=torch.float64),
    )


if operators.COMPILED:
    torch.library.register_fake("ernet::er_block", _forward_fake)
    torch.library.register_fake("ernet::er_block_backward", _backward_fake)
