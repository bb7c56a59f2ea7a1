"""A stage as operators that are traced or differentiated one by one: group norm, compiled and exported programs.

Moments, coefficients (plain PyTorch on per-channel vectors) and weighted sums of the raw maps. In eager mode two small
autograd nodes make backward write each map's gradient once: `MapInput` stands where a map z_i enters the stage,
`WeightedSum` where a block's output leaves it. A WeightedSum depends on the maps it reads only through vectors, their
means and variances, and a token. So autograd runs a map's node after every WeightedSum that reads the map, and by then
each of those has left its gradient g = dy where y > 0, and MapInput can write

    dz_i = sum_l a_{l,i} * g_l + k1_i * z_i + k0_i

in one weighted sum. What nodes share is kept by the id of the running backward pass, so passes over a retained graph,
at once in several threads or over a part of the stage, are independent. Compiled and exported programs use the
operators' own autograd instead, which can be traced and writes one gradient for each pair of maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ernet_fast.er import operators
from ernet_fast.er.epilogue_arguments import ShortcutArguments, uses_batch
from ernet_fast.er.operators import Node, check_first_order, relu_gradient
from ernet_fast.er.unfused_coefficients import (
    MapStatistics,
    combine_samples,
    map_statistics,
    momentum_of,
    shortcut_coefficients,
    update_running,
)


class TraceableStage:
    """The maps of one forward pass, and the weighted sums over them."""

    def __init__(self, *, num_groups: int | None, eps: float, measure: bool, nodes: bool) -> None:
        """Prepare for a forward pass.

        Args:
            num_groups: of group norm, with moments and coefficients per sample and channel; None for batch norm.
            eps: added to the variances of maps.
            measure: shortcuts normalise with moments, so every map is measured.
            nodes: use the nodes of this module; False for programs that are traced.
        """
        self.num_groups, self.eps, self.measure, self.nodes = num_groups, eps, measure, nodes
        self.per_sample = num_groups is not None
        self._statistics: list[MapStatistics] = []
        self._maps: list[Tensor] = []
        self._tokens: list[Tensor | None] = []
        self._records: list[_MapRecord] = []

    def start(self, x: Tensor, *, pass_on: bool = True) -> Tensor:
        """File a map x [N, C, H, W] that no block made.

        With `pass_on`, returns it for use elsewhere, where its gradient joins those of the shortcuts.
        """
        moments, x = self.file(x, measure=self.measure, pass_on=pass_on)
        self._statistics.append(map_statistics(moments, num_groups=self.num_groups))
        return x

    def block(
        self, z: Tensor, bn: nn.Module | None, shortcut: ShortcutArguments, *, relu: bool, measure: bool = True
    ) -> Tensor:
        """File z [N, C, H, W], the branch's raw map, or with bn=None the map x itself; returns the block's output.

        A last map needs no `measure`.
        """
        measure = self.measure and measure
        moments, _ = self.file(z, measure=measure or (bn is not None and uses_batch(bn)))
        scale, shift = _affine(bn, moments, z) if bn is not None else (None, None)
        # moments that bn alone needed say nothing that a shortcut with running statistics would use
        last = map_statistics(moments if measure else None, scale, shift, num_groups=self.num_groups)
        a, b = self._coefficients(shortcut, last, z)
        self._statistics.append(last)
        return self.weighted_sum(a, b, relu)

    def _coefficients(
        self, shortcut: ShortcutArguments, last: MapStatistics, z: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Coefficients of a block's weighted sum; updates the running statistics in training."""
        weight, mean, var, batches, use_running, momentum = shortcut
        dtype = operators.acc_dtype(z)
        assert weight is not None
        running = None
        if mean is not None and var is not None:
            if use_running:
                running = mean.to(dtype), var.to(dtype)
            else:
                earlier = self._statistics
                with torch.no_grad():
                    means = torch.stack([m.mean for m in earlier if m.mean is not None])
                    variances = torch.stack([m.var for m in earlier if m.var is not None])
                count = z.shape[0] * z.shape[2] * z.shape[3]
                update_running(mean, var, means, variances, count, momentum_of(momentum, batches))
        return shortcut_coefficients(weight.to(dtype), self._statistics, last, running, self.eps, z.shape[0])

    def file(self, z: Tensor, *, measure: bool, pass_on: bool = False) -> tuple[tuple[Tensor, Tensor] | None, Tensor]:
        """File a map [N, C, H, W].

        Args:
            z: the map; a copy is filed where it is not dense in the layout of the maps filed before.
            measure: take its moments.
            pass_on: z is used elsewhere too, and the gradient it gets there is to join that of the shortcuts: use the
                returned tensor there instead of z.

        Returns:
            Mean and biased variance ([C], or [N, C] with per_sample), or None; and z.
        """
        z = operators.in_layout(z, operators.layout_of([z, *self._maps[:1]]))  # where they differ, the last decides
        record = _MapRecord()
        token: Tensor | None = None
        if self.nodes and z.requires_grad and torch.is_grad_enabled():
            mean, var, token, passed = MapInput.apply(z, record, measure, self.per_sample, pass_on)
            moments = (mean, var) if measure else None
            self._maps.append(z.detach())
        else:
            moments, passed = operators.channel_moments(z, self.per_sample) if measure else None, z
            self._maps.append(z)
        self._records.append(record)
        self._tokens.append(token)
        return moments, passed if pass_on else z

    def weighted_sum(self, a: Tensor, b: Tensor | None, relu: bool) -> Tensor:
        """`sum_l a[l] * z_l + b`, then ReLU if asked, over all filed maps; a [L, C] or [L, N, C], b [C] or [N, C]."""
        a = a.contiguous()
        tokens = [token for token in self._tokens if token is not None]
        differentiable = bool(tokens) or a.requires_grad or (b is not None and b.requires_grad)
        if not (self.nodes and differentiable and torch.is_grad_enabled()):
            return operators.weighted_sum(self._maps, a, b, relu)
        block = _SumRecord(a.detach(), len(tokens))
        for index, (record, token) in enumerate(zip(self._records, self._tokens, strict=True)):
            if token is not None:
                record.readers.append((block, index))
        return WeightedSum.apply(a, b, block, relu, list(self._maps), *tokens)


def _affine(bn: nn.Module, moments: tuple[Tensor, Tensor] | None, z: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift [C] with which `bn(z) = scale * z + shift`; updates its running statistics as bn would."""
    assert isinstance(bn, nn.BatchNorm2d | nn.SyncBatchNorm)
    dtype = operators.acc_dtype(z)
    if uses_batch(bn):
        assert moments is not None
        mean, var = moments if moments[0].dim() == 1 else combine_samples(*moments)
        count = z.shape[0] * z.shape[2] * z.shape[3]
        if count == 1:
            raise operators.one_value(z)
        if bn.training and bn.track_running_stats and bn.running_mean is not None and bn.running_var is not None:
            momentum = momentum_of(bn.momentum, bn.num_batches_tracked)
            update_running(bn.running_mean, bn.running_var, mean, var, count, momentum)
    else:
        assert bn.running_mean is not None and bn.running_var is not None
        mean, var = bn.running_mean.to(dtype), bn.running_var.to(dtype)
    scale = torch.rsqrt(var + bn.eps)
    if bn.weight is not None:
        scale = bn.weight.to(dtype) * scale
    shift = -mean * scale
    if bn.bias is not None:
        shift = shift + bn.bias.to(dtype)
    return scale, shift


class _SumRecord:
    """What one WeightedSum leaves for the maps it reads: coefficients, and in each backward pass its gradient."""

    def __init__(self, a: Tensor, num_readers: int) -> None:
        self.a = a
        self.num_readers = num_readers
        self._left: dict[int, list[Any]] = {}
        """By backward pass: the gradient of the sum, and how many maps have yet to read it."""

    def leave(self, g: Tensor) -> None:
        """Keep g for the maps of this backward pass."""
        running = torch._C._current_graph_task_id()
        self._left[running] = [g, self.num_readers]
        # a pass that reaches a part of the stage leaves readers that never come
        torch.autograd.Variable._execution_engine.queue_callback(lambda: self._end(running))

    def _end(self, running: int) -> None:
        self._left.pop(running, None)

    def take(self) -> Tensor | None:
        """The g of this backward pass, or None if the pass did not reach this sum; freed after its last reader."""
        running = torch._C._current_graph_task_id()
        left = self._left.get(running)
        if left is None:
            return None
        left[1] -= 1
        if left[1] <= 0:
            del self._left[running]
        g: Tensor = left[0]
        return g


class _MapRecord:
    """Which weighted sums read a map, and as which of their maps."""

    def __init__(self) -> None:
        self.readers: list[tuple[_SumRecord, int]] = []


class MapInput(Node):
    """(z, record, measure, per_sample, pass_on) -> (mean, var, token, z): a map enters the stage.

    `measure`: take its moments (else mean and var are empty). `pass_on`: also return z itself, so that the gradient it
    gets elsewhere joins the same weighted sum; else the fourth result is empty.
    """

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, record: _MapRecord, measure: bool, per_sample: bool, pass_on: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See the class."""
        ctx.set_materialize_grads(False)
        ctx.record, ctx.measure, ctx.pass_on = record, measure, pass_on
        empty = z.new_empty((0,), dtype=operators.acc_dtype(z))
        mean, var = operators.channel_moments(z, per_sample) if measure else (empty, empty.clone())
        ctx.save_for_backward(z, mean.detach())
        token = z.new_zeros((), dtype=operators.acc_dtype(z))
        return mean, var, token, z.view_as(z) if pass_on else z.new_empty((0,))

    @staticmethod
    def backward(
        ctx: Any, dmean: Tensor | None, dvar: Tensor | None, _token: Tensor | None, dz: Tensor | None
    ) -> tuple[Tensor | None, None, None, None, None]:
        """dz, one weighted sum."""
        if torch.compiler.is_compiling():
            return MapInput.run_untraced(ctx, dmean, dvar, _token, dz)
        check_first_order(dmean, dz)
        z, mean = ctx.saved_tensors
        layout = operators.layout_of([z])
        maps: list[Tensor] = []
        rows: list[Tensor] = []
        for block, index in ctx.record.readers:
            g = block.take()
            if g is not None:
                maps.append(operators.in_layout(g, layout))
                rows.append(block.a[index])
        k1, k0 = operators.moments_gradient(z, mean, dmean, dvar) if ctx.measure else (None, None)
        if k1 is not None:
            maps.append(z)
            rows.append(k1)
        if ctx.pass_on and dz is not None:
            maps.append(operators.in_layout(dz, layout))
            rows.append(torch.ones(z.shape[1], dtype=operators.acc_dtype(z), device=z.device))
        if not maps:
            return None, None, None, None, None
        if any(row.dim() == 2 for row in rows):  # group norm: coefficients per sample
            rows = [row if row.dim() == 2 else row.expand(z.shape[0], -1) for row in rows]
            k0 = None if k0 is None else k0.expand(z.shape[0], -1).contiguous()
        return operators.weighted_sum(maps, torch.stack(rows), k0), None, None, None, None


class WeightedSum(Node):
    """(a, b, record, relu, maps, *tokens) -> y = sum_l a_l * maps_l + b, then ReLU if asked."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor | None, record: _SumRecord, relu: bool, maps: Sequence[Tensor], *tokens: Tensor
    ) -> Tensor:
        """See the class."""
        y = operators.weighted_sum(maps, a, b, relu)
        ctx.record, ctx.relu, ctx.num_tokens = record, relu, len(tokens)
        ctx.save_for_backward(*maps, *([y.detach()] if relu else []))
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        """Gradients of a and b; that of the sum is left for the nodes of the maps."""
        if torch.compiler.is_compiling():
            da, db, *_ = WeightedSum.run_untraced(ctx, dy)
            # a token has several readers, and compiled autograd adds up what all of them return
            nothing = dy.new_zeros((), dtype=operators.acc_dtype(dy))
            return (da, db, None, None, None, *([nothing] * ctx.num_tokens))
        check_first_order(dy)
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
            ctx.record.leave(g)
        return (da, db, None, None, None, *([None] * ctx.num_tokens))
