"""Two small autograd nodes that make the backward pass of a whole stage write each map's gradient once.

`FileMap` stands where a map z_i enters the stage, `Tail` where a block's output leaves it. A Tail depends on the maps
it reads only through C-vectors: their means and variances, and a token. So autograd runs a map's FileMap after every
Tail that reads the map, and by then each of those has filed its g = dy where y > 0, and FileMap can write

    dz_i = sum_l a_{l,i} * g_l + k1_i * z_i + k0_i

in one weighted sum. No gradient is accumulated map by map. What the nodes share is made by one forward pass and kept
alive by its graph alone; g is filed under the number of the running backward pass, so a second pass over a retained
graph, or one that reaches only a part of the stage, never sees a stale one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ernet_fast.er import operators


def _backward_number() -> int:
    return torch._C._current_graph_task_id()


class TailRecord:
    """What one Tail leaves for the maps it reads: coefficients from the forward pass, g from the backward pass."""

    def __init__(self, a: Tensor, num_readers: int) -> None:
        self.a = a
        self.num_readers = num_readers
        self._g: Tensor | None = None
        self._number = -1
        self._left = 0

    def file(self, g: Tensor) -> None:
        """Keep g for the maps of this backward pass."""
        self._g, self._number, self._left = g, _backward_number(), self.num_readers

    def take(self) -> Tensor | None:
        """The g of this backward pass, or None if the pass did not reach this Tail; freed after its last reader."""
        if self._number != _backward_number():
            return None
        g = self._g
        self._left -= 1
        if self._left <= 0:
            self._g = None
        return g


class MapRecord:
    """Which Tails read a map, and as which of their maps."""

    def __init__(self) -> None:
        self.readers: list[tuple[TailRecord, int]] = []


def forbid_double_backward() -> None:
    """Raise RuntimeError if a second derivative is asked for."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "ernet_fast: the fused ER stage has no second derivative. Build the model with fused=False (or call "
            "ernet_fast.reference.er_shortcut_sum) where create_graph=True is needed."
        )


def in_dtype(v: Tensor, dtype: torch.dtype) -> Tensor:
    """`v` in this dtype; where it has it already, without a call of an operator."""
    return v if v.dtype == dtype else v.to(dtype)


def relu_gradient(dy: Tensor, y: Tensor) -> Tensor:
    """The gradient through a ReLU: dy where y > 0 (or NaN), in the layout of both."""
    return torch.ops.aten.threshold_backward.default(dy, y, 0)


class FileMap(torch.autograd.Function):
    """(z, record, measure, per_sample, pass_on) -> (mean, var, token, z): a map enters the stage.

    `measure`: take its moments (else mean and var are empty). `pass_on`: also return z itself, so that the gradient it
    gets elsewhere joins the same weighted sum; else the fourth result is empty.
    """

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, record: MapRecord, measure: bool, per_sample: bool, pass_on: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.record, ctx.measure, ctx.pass_on = record, measure, pass_on
        empty = z.new_empty((0,), dtype=operators.acc_dtype(z))
        mean, var = operators.channel_moments(z, per_sample) if measure else (empty, empty.clone())
        ctx.save_for_backward(z, mean)
        token = z.new_zeros((), dtype=operators.acc_dtype(z))
        return mean, var, token, z.view_as(z) if pass_on else z.new_empty((0,))

    @staticmethod
    def backward(
        ctx: Any, dmean: Tensor | None, dvar: Tensor | None, _token: Tensor | None, dz: Tensor | None
    ) -> tuple[Tensor | None, None, None, None, None]:
        forbid_double_backward()
        z, mean = ctx.saved_tensors
        layout = operators.layout_of([z])
        maps: list[Tensor] = []
        rows: list[Tensor] = []
        for tail, index in ctx.record.readers:
            g = tail.take()
            if g is not None:
                maps.append(operators.in_layout(g, layout))
                rows.append(tail.a[index])
        k1, k0 = operators.moments_gradient(z, mean, dmean, dvar) if ctx.measure else (None, None)
        if k1 is not None:
            maps.append(z)
            rows.append(k1)
        if ctx.pass_on and dz is not None:
            maps.append(operators.in_layout(dz, layout))
            rows.append(
                (rows[0] if rows else z.new_empty(z.shape[1], dtype=operators.acc_dtype(z))).new_ones(z.shape[1])
            )
        if not maps:
            return None, None, None, None, None
        if any(row.dim() == 2 for row in rows):  # group norm: coefficients per sample
            rows = [row if row.dim() == 2 else row.expand(z.shape[0], -1) for row in rows]
            k0 = None if k0 is None else k0.expand(z.shape[0], -1).contiguous()
        return operators.weighted_sum(maps, torch.stack(rows), k0), None, None, None, None


class Tail(torch.autograd.Function):
    """(a, b, record, relu, maps, *tokens) -> y = sum_l a_l * maps_l + b, then ReLU if asked."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor | None, record: TailRecord, relu: bool, maps: list[Tensor], *tokens: Tensor
    ) -> Tensor:
        y = operators.weighted_sum(maps, a, b, relu)
        ctx.record, ctx.relu, ctx.num_tokens = record, relu, len(tokens)
        ctx.save_for_backward(*maps, *([y] if relu else []))
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        forbid_double_backward()
        maps = list(ctx.saved_tensors)
        y = maps.pop() if ctx.relu else None
        dy = operators.in_layout(dy, operators.layout_of(maps))
        da = db = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            da, db, g = operators.weighted_dot(dy, maps, y, ctx.record.a.dim() == 3)
            g = dy if y is None else g
            db = db if ctx.needs_input_grad[1] else None
        else:
            g = dy if y is None else relu_gradient(dy, y)
        if ctx.record.num_readers:
            ctx.record.file(g)
        return (da, db, None, None, None, *([None] * ctx.num_tokens))
