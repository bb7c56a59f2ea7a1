"""The ER shortcut sum with norm="batch": a stage whose last map alone is a block's, and one autograd node.

On the CPU it is one operator each way, `ernet::er_block` and `ernet::shortcut_sum_backward`, one pass over the gradient
of the sum for the gradients of all maps; elsewhere, and over process groups, it is composed of operators.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ernet_fast.er import operators
from ernet_fast.er.epilogue import er_block
from ernet_fast.er.epilogue_arguments import NO_NORM, BranchNorm, EpilogueState, LaterBlock, ShortcutArguments
from ernet_fast.er.epilogue_composed import map_gradient
from ernet_fast.er.operators import Node, check_first_order, relu_gradient
from ernet_fast.er.process_group import ProcessGroup


def shortcut_sum(
    xs: Sequence[Tensor],
    shortcut: ShortcutArguments,
    *,
    measure: bool,
    eps: float,
    relu: bool,
    group: ProcessGroup | None = None,
) -> Tensor:
    """`xs[-1] + sum_i weight[i] * N(xs[i])`, then ReLU if asked.

    Args:
        xs: maps in one layout on a device that operators support; all arguments have been checked.
        shortcut: weights, and running statistics to update or use.
        measure: normalise with the moments of the maps.
        eps: added to variances.
        relu: apply the ReLU.
        group: processes over which the statistics are taken.
    """
    composed = group is not None or not _one_operator_supports(xs[0], shortcut)
    state = EpilogueState(xs[0], len(xs), eps, measure=measure, composed=composed, group=group)
    weight = shortcut.weight
    assert weight is not None
    shortcut = shortcut._replace(weight=weight.detach().to(state.vector_dtype).contiguous())
    if torch.is_grad_enabled() and (weight.requires_grad or any(x.requires_grad for x in xs)):
        y: Tensor = _ShortcutSum.apply(weight, state, shortcut, relu, *xs)
        return y
    with torch._C._AutoDispatchBelowAutograd():
        return er_block(state, xs, NO_NORM, shortcut, measure=False, relu=relu)


def _one_operator_supports(x: Tensor, shortcut: ShortcutArguments) -> bool:
    """True if the CPU operators take maps like `x`, and these running statistics as they are."""
    if x.device.type != "cpu" or x.numel() == 0:
        return False
    running = [v for v in (shortcut.running_mean, shortcut.running_var) if v is not None]
    return all(v.dtype == operators.acc_dtype(x) and v.is_contiguous() for v in running)


class _ShortcutSum(Node):
    """(weight, state, shortcut, relu, *maps) -> y."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, state: EpilogueState, shortcut: ShortcutArguments, relu: bool, *xs: Tensor
    ) -> Tensor:
        y = er_block(state, xs, NO_NORM, shortcut, measure=False, relu=relu)
        ctx.state, ctx.relu, ctx.use_running = state, relu, shortcut.use_running
        used = (shortcut.running_mean, shortcut.running_var) if shortcut.use_running else ()
        # the weight as it was given: a change in place before backward is an error
        ctx.save_for_backward(weight, *used, *xs[:-1], *([y.detach()] if relu else []))
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        if torch.compiler.is_compiling():
            return _ShortcutSum.run_untraced(ctx, dy)
        check_first_order(dy)
        state: EpilogueState = ctx.state
        weight, *maps = ctx.saved_tensors
        y = maps.pop() if ctx.relu else None
        mean, var = (maps.pop(0), maps.pop(0)) if ctx.use_running else (None, None)
        needed: list[bool] = list(ctx.needs_input_grad[4:])
        last = needed.pop()
        dy = operators.in_layout(dy, state.layout)
        if not maps or not (ctx.needs_input_grad[0] or any(needed) or state.group is not None):
            g = dy if y is None else relu_gradient(dy, y)
            return torch.zeros_like(weight), None, None, None, *([None] * len(maps)), g
        a, vectors = state.a[-1], weight.detach().to(state.vector_dtype).contiguous()
        if state.composed:
            gradients, dweight, g = _composed_backward(state, dy, maps, y, vectors, mean, var, needed)
        else:
            found, dweight, g = torch.ops.ernet.shortcut_sum_backward.default(
                dy, maps, y, vectors, state.table, a, mean, var, state.eps, needed
            )
            dmaps = iter(found)
            gradients = [next(dmaps) if wanted else None for wanted in needed]
        return dweight.to(weight.dtype), None, None, None, *gradients, (dy if y is None else g) if last else None


def _composed_backward(
    state: EpilogueState,
    dy: Tensor,
    maps: Sequence[Tensor],
    y: Tensor | None,
    weight: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    needed: Sequence[bool],
) -> tuple[list[Tensor | None], Tensor, Tensor]:
    """Gradients of the earlier maps and of the weight, and g, by one pass over all maps and one more for each."""
    da, db, g = operators.weighted_dot(dy, maps, y)
    g = dy if y is None else g
    dweight = torch.empty_like(weight)
    none = state.none
    block = LaterBlock(
        g, none, state.a[-1], db, weight, none if mean is None else mean, none if var is None else var, dweight
    )
    gradients: list[Tensor | None] = []
    for index, (z, wanted) in enumerate(zip(maps, needed, strict=True)):
        dz, _, _ = map_gradient(state, index, z, BranchNorm.NONE, [block], da[index : index + 1], None, needed=wanted)
        gradients.append(dz if wanted else None)
    return gradients, dweight, g


def _backward_fake(
    dy: Tensor, maps: list[Tensor], y: Tensor | None, weight: Tensor, *rest: object
) -> tuple[list[Tensor], Tensor, Tensor]:
    needed = rest[-1]
    assert isinstance(needed, list | tuple)
    g = dy.new_empty((0,)) if y is None else torch.empty_like(dy)
    return [torch.empty_like(dy) for wanted in needed if wanted], torch.empty_like(weight), g


if operators.COMPILED:
    torch.library.register_fake("ernet::shortcut_sum_backward", _backward_fake)
