"""The autograd nodes of a stage with batch norm: backward writes each map's gradient once.

`Opening` stands where a map that no block made enters the stage, `Block` where a block turns its raw map z_l into its
output y_l. A Block reads earlier maps past autograd; what ties them is a token that each node returns and the next
Block takes. So autograd runs a map's node after those of all Blocks that read the map, and by then each of these has
left its g = dy where y > 0 and what it owes to the map's C-vectors, and the node can write

    dz_i = sum_l a_{l,i} * g_l + k1_i * z_i + k0_i

in one weighted sum. No gradient is accumulated map by map.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ernet_fast.er import operators
from ernet_fast.er._autograd import forbid_double_backward, in_dtype, relu_gradient
from ernet_fast.er._backward_passes import BackwardPasses
from ernet_fast.er.coefficients import (
    MEAN_ROW,
    NO_SHORTCUT,
    BranchNorm,
    NormArguments,
    ShortcutArguments,
    block_coefficients_backward,
    new_table,
    new_totals,
)
from ernet_fast.er.process_group import ProcessGroup, add_up

if TYPE_CHECKING:
    from ernet_fast.er.epilogue_composed import BatchStage


class BackwardPass:
    """What the nodes of a stage leave for one another in one backward pass."""

    def __init__(self, totals: Tensor) -> None:
        self.totals = totals
        self.g: dict[int, Tensor] = {}


class StageRecord:
    """What the nodes of one forward pass share: C-vectors, never a map, so that saved tensors alone keep maps alive."""

    def __init__(self, z: Tensor, num_maps: int, eps: float, group: ProcessGroup | None) -> None:
        self.eps, self.group = eps, group
        self.layout = operators.layout_of([z])
        self.doubles = z.dtype == torch.float64
        self.elements = z.numel() // z.shape[1] if z.shape[1] else 0
        self.table = new_table(z, num_maps)
        self.a: list[Tensor] = []  # of the blocks' sums; empty for maps that no block made
        self.measured: list[bool] = []
        self.count: Tensor | None = None  # values a channel, where they are spread over processes
        self.vectors = False  # gradients depend on da and db
        self.passes = BackwardPasses(lambda: BackwardPass(new_totals(self.table)))

    def gradients(
        self,
        current: BackwardPass,
        index: int,
        norm: BranchNorm,
        shortcut: ShortcutArguments,
        dots: tuple[Tensor, Tensor] | None,
        pass_on: bool,
    ) -> tuple[Tensor, ...]:
        """Rows and k0 of the weighted sum that is dz, and gradients of weight, gamma and beta (empty: none).

        `dots`: da and db of the block's sum, None where its output has no gradient. `pass_on`: a last row of ones.
        """
        weight, running_mean, running_var, _, use_running, _ = shortcut
        da, db = (None, None) if dots is None else dots
        measured = self.measured[index]
        count = self.count if measured else None
        rows, k0, dweight, dgamma, dbeta, dmoments = block_coefficients_backward(
            self.table,
            index,
            self.doubles,
            current.totals,
            da,
            db,
            count,
            self.elements,
            norm,
            weight,
            running_mean,
            running_var,
            use_running,
            self.eps,
            [self.a[reader] for reader in self._readers(current, index)],
            measured and count is None,
            pass_on and count is None,
        )
        if count is not None:
            rows, k0 = self._common_rows(index, rows, dmoments, count, pass_on)
        return rows, k0, dweight, dgamma, dbeta

    def _common_rows(
        self, index: int, rows: Tensor, dmoments: Tensor, count: Tensor, pass_on: bool
    ) -> tuple[Tensor, Tensor]:
        """What `block_coefficients_backward` returns as rows and k0, with gradients of moments of all processes."""
        dmean, dvar = add_up(dmoments, self.group)
        k1 = (dvar * 2 / count).to(rows.dtype)
        k0 = dmean / count - k1 * self.table[index, MEAN_ROW]
        more = [k1, torch.ones_like(k1)] if pass_on else [k1]
        return torch.cat([rows, torch.stack(more)]), k0.to(rows.dtype)

    def map_gradient(
        self, current: BackwardPass, index: int, rows: Tensor, k0: Tensor, z: Tensor, passed: Tensor | None = None
    ) -> Tensor | None:
        """dz: the g of all blocks that read the map, z itself and a gradient from elsewhere, weighted by `rows`."""
        maps = [current.g[reader] for reader in self._readers(current, index)]
        if self.measured[index]:
            maps.append(z)
        if passed is not None:
            maps.append(operators.in_layout(passed, self.layout))
        return operators.weighted_sum(maps, rows, k0 if self.measured[index] else None) if maps else None

    def _readers(self, current: BackwardPass, index: int) -> list[int]:
        """Blocks that read the map and that this backward pass has reached."""
        return [reader for reader in range(index, len(self.a)) if reader in current.g]


class Opening(torch.autograd.Function):
    """(z, stage, pass_on) -> (token, z): a map that no block made enters the stage.

    With `pass_on` the second result is z itself, and the gradient that it gets elsewhere joins the same weighted sum;
    else it is empty.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, stage: BatchStage, pass_on: bool) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.record, ctx.index = stage.record, len(stage.maps)
        stage.file(z)
        ctx.save_for_backward(z)
        return z.new_empty((0,)), z.view_as(z) if pass_on else z.new_empty((0,))

    @staticmethod
    def backward(ctx: Any, _token: Tensor | None, dz: Tensor | None) -> tuple[Tensor | None, None, None]:
        forbid_double_backward()
        record, index = ctx.record, ctx.index
        current = record.passes.current()
        (z,) = ctx.saved_tensors
        rows, k0, *_ = record.gradients(current, index, BranchNorm.NONE, NO_SHORTCUT, None, dz is not None)
        result = record.map_gradient(current, index, rows, k0, z, dz)
        record.passes.node_done(index)
        return result, None, None


class Block(torch.autograd.Function):
    """(z, weight, gamma, beta, stage, norm, shortcut, relu, measure, *tokens) -> (y, token): a block's tail."""

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        weight: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        stage: BatchStage,
        norm: NormArguments,
        shortcut: ShortcutArguments,
        relu: bool,
        measure: bool,
        *tokens: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.record, ctx.index, ctx.norm, ctx.num_tokens = stage.record, len(stage.maps), norm.norm, len(tokens)
        ctx.relu, ctx.use_running = relu, shortcut.use_running
        ctx.dtypes = [None if v is None else v.dtype for v in (weight, gamma, beta)]
        y = stage.weighted_sum(stage.file(z, norm, shortcut, measure=measure), relu)
        running = (shortcut.running_mean, shortcut.running_var) if shortcut.use_running else ()
        ctx.save_for_backward(weight, *running, *stage.maps, *([y] if relu else []))
        return y, z.new_empty((0,))

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _token: Tensor | None) -> tuple[Any, ...]:
        forbid_double_backward()
        record, index = ctx.record, ctx.index
        weight, *maps = ctx.saved_tensors
        running = (maps.pop(0), maps.pop(0)) if ctx.use_running else (None, None)
        y = maps.pop() if ctx.relu else None
        current = record.passes.current()
        dots = None
        if dy is not None:
            dy = operators.in_layout(dy, record.layout)
            if record.vectors:
                da, db, g = operators.weighted_dot(dy, maps, y)
                dots, g = (da, db), dy if y is None else g
            else:
                g = dy if y is None else relu_gradient(dy, y)
            current.g[index] = g
        shortcut = ShortcutArguments(weight, running[0], running[1], None, ctx.use_running, None)
        rows, k0, *vectors = record.gradients(current, index, ctx.norm, shortcut, dots, False)
        dz = record.map_gradient(current, index, rows, k0, maps[-1]) if ctx.needs_input_grad[0] else None
        record.passes.node_done(index)
        dvectors = [
            in_dtype(v, dtype) if dtype is not None and v.numel() else None
            for v, dtype in zip(vectors[:3], ctx.dtypes, strict=True)
        ]
        return dz, *dvectors, *([None] * (5 + ctx.num_tokens))
