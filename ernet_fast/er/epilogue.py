"""The tail of an ER block with batch norm as one operator each way, for maps on the CPU.

    er_block            moments of z, coefficients, weighted sum -> y, and a of the sum
    er_block_backward   dy and what later blocks have left -> dz, gradients of gamma and beta, a row of each dweight

Forward they do what `channel_moments`, `block_coefficients` and `weighted_sum` do one after the other, with the same
bits. Backward goes by map: it takes the dots of a map with its own and all later g at once, and then the same maps are
summed up to dz. Where that pays, all of it is done strip of channels by strip of channels, so that each map is read
from memory once. In place of g = dy where y > 0 there are dy and one bit an element, so no g is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ernet_fast.er import operators
from ernet_fast.er.coefficients import BranchNorm, NormArguments, ShortcutArguments
from ernet_fast.er.process_group import ProcessGroup


def one_operator_serves(z: Tensor, group: ProcessGroup | None) -> bool:
    """True if the operators of this module serve a stage whose maps are like z, with statistics over `group`."""
    return group is None and z.device.type == "cpu" and z.numel() > 0 and operators.serves(z)


def er_block(
    maps: Sequence[Tensor],
    table: Tensor,
    filed: int,
    measure_earlier: bool,
    measure: bool,
    norm: NormArguments,
    shortcut: ShortcutArguments,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    """File the last of `maps`, and return its block's y, and a [maps, C] of its weighted sum.

    Args:
        maps: of the stage up to this block's, [N, C, H, W], not empty.
        table: float64 [> maps, TABLE_ROWS, C]; rows from `filed` on are written, for those before the last with x = z.
        filed: rows that are there.
        measure_earlier: rows written for earlier maps hold their moments.
        measure: the last row holds the map's moments.
        norm: how the last map becomes x; running statistics are moved in place.
        shortcut: likewise, the block's shortcuts.
        eps: added to variances of maps.
        relu: apply the ReLU.
    """
    y, a = torch.ops.ernet.er_block.default(maps, table, filed, measure_earlier, measure, *norm, *shortcut, eps, relu)
    return y, a


class LaterBlock(NamedTuple):
    """What a block has left in a backward pass for the maps before its own."""

    dy: Tensor
    bits: Tensor
    """Where its y was positive, as `er_block_backward` returns them; empty: dy counts whole."""
    a: Tensor
    """Of its sum, [maps, C]."""
    db: Tensor
    """[C]"""
    weight: Tensor
    """[maps - 1, C]"""
    running_mean: Tensor
    """[maps - 1, C] that it was normalised with; empty: with the moments of the maps."""
    running_var: Tensor
    dweight: Tensor
    """[maps - 1, C], in the dtype of a: a row is written with the gradient of each map."""


def er_block_backward(
    index: int,
    z: Tensor,
    dy: Tensor | None,
    y: Tensor | None,
    a: Tensor | None,
    later: Sequence[LaterBlock],
    passed: Tensor | None,
    table: Tensor,
    norm: BranchNorm,
    eps: float,
    *,
    before: Tensor | None = None,
    known: Tensor | None = None,
    dots: bool,
    measured: bool,
    needed: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of map `index` and of what depends on it alone.

    Args:
        index: which map of the stage.
        z: the map [N, C, H, W], not empty.
        dy: gradient of its block's output; None where that has none, and for a map that no block made.
        y: that output, if it went through a ReLU.
        a: [index + 1, C] of that block's sum, with dy.
        later: the later blocks whose outputs have a gradient; row `index` of each one's dweight is written.
        passed: a gradient of the map from elsewhere, or None.
        table: of the stage, float64 [maps, TABLE_ROWS, C].
        norm: how the map became x.
        eps: added to variances of maps.
        before: the map before, if its gradient is due next: its dots may come at less cost now than then.
        known: what the call for the map after has returned as `before_dots`, [later, C], or None.
        dots: gradients depend on the dots; else dy is g itself, there is no y, and all vectors but dz are worthless.
        measured: the map's moments were taken.
        needed: whether dz is wanted.

    Returns:
        dz: empty if not needed, or if nothing reads the map.
        bits: of y, uint8; empty without.
        db: [C]; empty without dy.
        dgamma, dbeta: [C]; empty without a BatchNorm.
        before_dots: sums of `before` with g of this block, if it has a dy, and of each later one, [1 + later, C]; empty
            where they are not had at less cost.
    """
    columns = [list(column) for column in zip(*later, strict=True)] if later else [[]] * len(LaterBlock._fields)
    dz, bits, db, dgamma, dbeta, before_dots = torch.ops.ernet.er_block_backward.default(
        index, z, dy, y, a, *columns, passed, before, known, table, norm, eps, dots, measured, needed
    )
    return dz, bits, db, dgamma, dbeta, before_dots


def _forward_fake(maps: list[Tensor], table: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    z = maps[-1]
    return torch.empty_like(z), z.new_empty((len(maps), z.shape[1]), dtype=operators.acc_dtype(z))


def _backward_fake(
    index: int,
    z: Tensor,
    dy: Tensor | None,
    y: Tensor | None,
    a: Tensor | None,
    later_dy: list[Tensor],
    later_bits: list[Tensor],
    later_a: list[Tensor],
    later_db: list[Tensor],
    later_weight: list[Tensor],
    later_running_mean: list[Tensor],
    later_running_var: list[Tensor],
    later_dweight: list[Tensor],
    passed: Tensor | None,
    before: Tensor | None,
    known: Tensor | None,
    table: Tensor,
    norm: int,
    eps: float,
    dots: bool,
    measured: bool,
    needed: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    channels, dtype = z.shape[1], operators.acc_dtype(z)
    affine = channels if norm != BranchNorm.NONE else 0
    planar = z.is_contiguous()
    rows, length = (z.shape[0] * channels, z[0, 0].numel()) if planar else (z.numel() // channels, channels)
    anything = needed and (dy is not None or bool(later_dy) or measured or passed is not None)
    num_g = len(later_dy) + (dy is not None)
    with_before = before is not None and dots and num_g > 0 and not planar and needed and passed is None
    return (
        torch.empty_like(z) if anything else z.new_empty((0,)),
        z.new_empty(
            (0 if dy is None or y is None else index % 64 * 64 + rows * ((length + 63) // 64) * 8 + 8,),
            dtype=torch.uint8,
        ),
        z.new_empty((0 if dy is None else channels,), dtype=dtype),
        z.new_empty((affine,), dtype=dtype),
        z.new_empty((affine,), dtype=dtype),
        z.new_empty((num_g, channels) if with_before else (0,), dtype=dtype),
    )


if operators._COMPILED:
    torch.library.register_fake("ernet::er_block", _forward_fake)
    torch.library.register_fake("ernet::er_block_backward", _backward_fake)
