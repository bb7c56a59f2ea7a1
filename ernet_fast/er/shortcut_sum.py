"""The ER shortcut sum with norm="batch" as one operator each way, for maps on the CPU.

    er_block                of `whole_block`: maps, weight -> y, a of the sum, and the table of the maps
    shortcut_sum_backward   dy -> gradients of the earlier maps and of weight, and g, the gradient of the last map

The maps are a stage whose last map alone is a block's. Backward is one pass over g for the gradients of all maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ernet_fast.er import operators
from ernet_fast.er._autograd import forbid_double_backward
from ernet_fast.er.coefficients import NO_NORM, ShortcutArguments, new_table
from ernet_fast.er.epilogue import er_block
from ernet_fast.er.unfused_coefficients import momentum_of


def one_operator_serves(x: Tensor, shortcut: ShortcutArguments) -> bool:
    """True if the operators of this module serve maps like `x`, not empty, and these running statistics."""
    if x.device.type != "cpu" or x.numel() == 0 or not operators.serves(x):
        return False
    if shortcut.momentum is None and shortcut.batches is not None:
        return False  # a cumulative average, whose count is not to be read here
    running = [v for v in (shortcut.running_mean, shortcut.running_var) if v is not None]
    return all(v.dtype == operators.acc_dtype(x) and v.is_contiguous() for v in running)


def whole_shortcut_sum(xs: Sequence[Tensor], shortcut: ShortcutArguments, eps: float, relu: bool) -> Tensor:
    """`xs[-1] + sum_i weight[i] * N(xs[i])`, then ReLU if asked.

    Args:
        xs: maps in one layout that `one_operator_serves`; all arguments have been checked.
        shortcut: weights, and running statistics to be moved or used.
        eps: added to variances.
        relu: apply the ReLU.
    """
    weight, mean, var, batches, use_running, momentum = shortcut
    assert weight is not None
    running = None if mean is None or var is None else (mean.detach(), var.detach())
    moved = running is not None and not use_running
    options = Options(use_running, momentum_of(momentum, batches) if moved else 0.0, eps, relu)
    if torch.is_grad_enabled() and (weight.requires_grad or any(x.requires_grad for x in xs)):
        y: Tensor = _WholeSum.apply(weight, running, options, *xs)
    else:
        with torch._C._AutoDispatchBelowAutograd():
            y = _forward(weight, running, options, xs)[0]
    changed = [v for v in (mean, var) if v is not None and not v.is_inference()] if moved else []
    if changed:  # as in-place operators of PyTorch let autograd know
        torch.autograd.graph.increment_version(changed)
    return y


class Options(NamedTuple):
    """What the sum is beside tensors."""

    use_running: bool
    momentum: float
    eps: float
    relu: bool


def _forward(
    weight: Tensor, running: tuple[Tensor, Tensor] | None, options: Options, xs: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    mean, var = running or (None, None)
    use_running, momentum, eps, relu = options
    table = new_table(xs[0], len(xs))
    shortcut = ShortcutArguments(_vectors(weight, xs[0]), mean, var, None, use_running, momentum)
    y, a = er_block(xs, table, 0, not use_running, False, NO_NORM, shortcut, eps, relu)
    return y, table, a


def _vectors(weight: Tensor, x: Tensor) -> Tensor:
    """`weight` as the operators take it."""
    return weight.detach().to(operators.acc_dtype(x)).contiguous()


class _WholeSum(torch.autograd.Function):
    """(weight, running, options, *maps) -> y."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, running: tuple[Tensor, Tensor] | None, options: Options, *xs: Tensor
    ) -> Tensor:
        y, table, a = _forward(weight, running, options, xs)
        ctx.options, ctx.layout = options, operators.layout_of(xs)
        used = running if options.use_running and running is not None else ()
        ctx.save_for_backward(weight, table, a, *used, *xs[:-1], *([y] if options.relu else []))
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        forbid_double_backward()
        weight, table, a, *maps = ctx.saved_tensors
        y = maps.pop() if ctx.options.relu else None
        mean, var = (maps.pop(0), maps.pop(0)) if ctx.options.use_running else (None, None)
        learning: bool = ctx.needs_input_grad[0]
        needed: list[bool] = list(ctx.needs_input_grad[3:])
        last = needed.pop()
        dy = operators.in_layout(dy, ctx.layout)
        if not maps or not (learning or any(needed)):
            g = dy if y is None else dy.masked_fill(y <= 0, 0)
            return weight.new_zeros(weight.shape), None, None, *([None] * len(maps)), g
        found, dweight, g = torch.ops.ernet.shortcut_sum_backward.default(
            dy, maps, y, _vectors(weight, dy), table, a, mean, var, ctx.options.eps, needed
        )
        dmaps = iter(found)
        gradients = [next(dmaps) if wanted else None for wanted in needed]
        return dweight.to(weight.dtype), None, None, *gradients, (dy if y is None else g) if last else None


def _backward_fake(
    dy: Tensor,
    maps: list[Tensor],
    y: Tensor | None,
    weight: Tensor,
    table: Tensor,
    a: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
    needed: list[bool],
) -> tuple[list[Tensor], Tensor, Tensor]:
    g = dy.new_empty((0,)) if y is None else torch.empty_like(dy)
    return [torch.empty_like(dy) for wanted in needed if wanted], torch.empty_like(weight), g


if operators._COMPILED:
    torch.library.register_fake("ernet::shortcut_sum_backward", _backward_fake)
