"""The ER shortcut sum: a stage whose last map alone is a block's, and one autograd node.

On the CPU, with norm="batch", it is one operator each way, `ernet::er_block` and `ernet::shortcut_sum_backward`, one
pass over the gradient of the sum for the gradients of all maps; else backward takes the maps one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ernet_fast.er import operators
from ernet_fast.er.epilogue import er_block, er_block_backward
from ernet_fast.er.epilogue_arguments import NO_NORM, BranchNorm, EpilogueState, LaterBlock, ShortcutArguments
from ernet_fast.er.operators import Node, check_first_order, relu_gradient
from ernet_fast.er.process_group import ProcessGroup
from ernet_fast.er.traceable_stage import TraceableStage


def shortcut_sum(
    xs: Sequence[Tensor],
    shortcut: ShortcutArguments,
    *,
    measure: bool,
    num_groups: int | None = None,
    eps: float,
    relu: bool,
    group: ProcessGroup | None = None,
) -> Tensor:
    """`xs[-1] + sum_i weight[i] * N(xs[i])`, then ReLU if asked, of arguments that have been checked.

    With `measure` N takes the moments of the maps, over the processes of `group`; `num_groups` is None for batch norm.
    """
    layout = operators.layout_of(xs)
    maps = [x.contiguous(memory_format=layout) for x in xs]
    if torch.compiler.is_compiling():
        stage = TraceableStage(num_groups=num_groups, eps=eps, measure=measure)
        for x in maps[:-1]:
            stage.start(x)
        return stage.block(maps[-1], NO_NORM, shortcut, relu=relu, measure=False)
    composed = group is not None or not _one_operator_supports(maps[0], shortcut)
    state = EpilogueState(
        maps[0], len(maps), eps, measure=measure, num_groups=num_groups or 0, composed=composed, group=group
    )
    weight = shortcut.weight
    assert weight is not None
    shortcut = shortcut._replace(weight=weight.detach().to(state.vector_dtype).contiguous())
    if torch.is_grad_enabled() and (weight.requires_grad or any(x.requires_grad for x in maps)):
        y: Tensor = _ShortcutSum.apply(weight, state, shortcut, relu, *maps)
        return y
    with torch._C._AutoDispatchBelowAutograd():
        return er_block(state, maps, NO_NORM, shortcut, measure=False, relu=relu)


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
        dy = dy.contiguous(memory_format=state.layout)
        if not maps or not (ctx.needs_input_grad[0] or any(needed) or state.group is not None):
            g = dy if y is None else relu_gradient(dy, y)
            return torch.zeros_like(weight), None, None, None, *([None] * len(maps)), g
        a, vectors = state.a[-1], weight.detach().to(state.vector_dtype).contiguous()
        gradients: list[Tensor | None] = []
        if not (state.composed or state.num_groups):
            found, dweight, g = torch.ops.ernet.shortcut_sum_backward.default(
                dy, maps, y, vectors, state.table, a, mean, var, state.eps, needed
            )
            dmaps = iter(found)
            gradients += [next(dmaps) if wanted else None for wanted in needed]
            g = dy if y is None else g
        else:  # by map: one pass over all of them, and one more for each
            state.needs_dots = True
            da, db, g = operators.weighted_dot(dy, maps, y, state.num_groups > 0)
            g, dweight = dy if y is None else g, torch.empty_like(vectors)
            no_mask = dy.new_empty((0,), dtype=torch.uint8)
            used = (state.none, state.none) if mean is None or var is None else (mean, var)
            block = LaterBlock(g, no_mask, a, db.double(), vectors, used[0], used[1], dweight)
            for index, (z, wanted) in enumerate(zip(maps, needed, strict=True)):
                known = da[index : index + 1].double()
                own = er_block_backward(state, index, z, BranchNorm.NONE, [block], known=known, needed=wanted)
                gradients.append(own.dz if wanted else None)
        return dweight.to(weight.dtype), None, None, None, *gradients, g if last else None


def _backward_fake(
    dy: Tensor, maps: list[Tensor], y: Tensor | None, weight: Tensor, *rest: object
) -> tuple[list[Tensor], Tensor, Tensor]:
    needed = rest[-1]
    assert isinstance(needed, list | tuple)
    g = dy.new_empty((0,)) if y is None else torch.empty_like(dy)
    return [torch.empty_like(dy) for wanted in needed if wanted], torch.empty_like(weight), g


if operators.COMPILED:
    torch.library.register_fake("ernet::shortcut_sum_backward", _backward_fake)
