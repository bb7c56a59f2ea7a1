"""The autograd nodes of a stage whose blocks are one operator each way: backward by map, each map's gradient once.

`Opening` stands where x_0 and all shortcut weights enter the stage, `Block` where a block turns its raw map z_l into
its output y_l. Earlier maps are read past autograd; what ties the nodes is a token that each returns and the next Block
takes. So autograd runs them from the last to the first, a map's after those of all Blocks that read the map. Each of
these has left its dy and the bits of its ReLU, and the node of map i takes the dots of z_i with all of them at once:
what they say of weight, gamma, beta and moments is known when

    dz_i = sum_l a_{l,i} * g_l + k1_i * z_i + k0_i

is due, and the same maps are summed up. A row of each dweight is written with each map; `Opening` runs last and returns
them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ernet_fast.er import operators
from ernet_fast.er._autograd import forbid_double_backward, in_dtype, relu_gradient
from ernet_fast.er._backward_passes import BackwardPasses
from ernet_fast.er.coefficients import BranchNorm, NormArguments, ShortcutArguments, new_table
from ernet_fast.er.epilogue import LaterBlock, er_block_backward

if TYPE_CHECKING:
    from ernet_fast.er.whole_stage import WholeStage


class BackwardPass:
    """What the nodes of a stage leave for one another in one backward pass."""

    def __init__(self) -> None:
        self.blocks: dict[int, LaterBlock] = {}
        self.known: dict[int, Tensor] = {}
        """Of the map whose gradient is due next, the dots with every g that is known already."""

    def later(self, index: int) -> list[LaterBlock]:
        """What blocks have left whose maps come after map `index`, in order."""
        return [self.blocks[reader] for reader in sorted(self.blocks) if reader > index]


class StageRecord:
    """What the nodes of one forward pass share: C-vectors, never a map, so that saved tensors alone keep maps alive."""

    def __init__(self, z: Tensor, num_maps: int, eps: float) -> None:
        self.eps = eps
        self.layout = operators.layout_of([z])
        self.table = new_table(z, num_maps)
        self.none = z.new_empty((0,), dtype=operators.acc_dtype(z))
        self.filed = 0  # maps that have a row of the table
        self.a: list[Tensor] = []  # of the blocks' sums; `none` for x_0
        self.measured: list[bool] = []
        self.vectors = False  # gradients depend on the dots
        self.passes: BackwardPasses[BackwardPass] = BackwardPasses(BackwardPass)

    def gradients(
        self,
        index: int,
        z: Tensor,
        norm: BranchNorm,
        left: BackwardPass,
        *,
        dy: Tensor | None = None,
        y: Tensor | None = None,
        passed: Tensor | None = None,
        before: Tensor | None = None,
        needed: bool,
    ) -> tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor]:
        """The gradient dz (None: there is none), bits, db, dgamma and dbeta of map `index`."""
        dz, bits, db, dgamma, dbeta, before_dots = er_block_backward(
            index,
            z,
            dy,
            y,
            None if dy is None else self.a[index],
            left.later(index),
            passed,
            self.table,
            norm,
            self.eps,
            before=before if index > self.passes.last_node and self.layout == torch.channels_last else None,
            known=left.known.pop(index, None),
            dots=self.vectors,
            measured=self.measured[index],
            needed=needed,
        )
        if before_dots.numel():
            left.known[index - 1] = before_dots
        return dz if dz.numel() else None, bits, db, dgamma, dbeta


class Opening(torch.autograd.Function):
    """(z, stage, pass_on, *weights) -> (token, z): x_0 and the weights of all blocks enter the stage.

    With `pass_on` the second result is z itself, and the gradient that it gets elsewhere joins the same weighted sum;
    else it is empty.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, stage: WholeStage, pass_on: bool, *weights: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.record, ctx.dtypes = stage.record, [weight.dtype for weight in weights]
        stage.enter(z)
        ctx.save_for_backward(z)
        return z.new_empty((0,)), z.view_as(z) if pass_on else z.new_empty((0,))

    @staticmethod
    def backward(ctx: Any, _token: Tensor | None, passed: Tensor | None) -> tuple[Tensor | None, ...]:
        forbid_double_backward()
        record = ctx.record
        (z,) = ctx.saved_tensors
        if record.filed == 0:  # no block has come
            return passed, None, None, *([None] * len(ctx.dtypes))
        left = record.passes.current()
        if passed is not None:
            passed = operators.in_layout(passed, record.layout)
        dz, *_ = record.gradients(0, z, BranchNorm.NONE, left, passed=passed, needed=ctx.needs_input_grad[0])
        record.passes.node_done(0)
        dweights = [
            in_dtype(left.blocks[block].dweight, dtype) if block in left.blocks else None
            for block, dtype in enumerate(ctx.dtypes, start=1)
        ]
        return dz, None, None, *dweights


class Block(torch.autograd.Function):
    """(z, gamma, beta, stage, norm, shortcut, relu, measure, token) -> (y, token): a block's tail."""

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        stage: WholeStage,
        norm: NormArguments,
        shortcut: ShortcutArguments,
        relu: bool,
        measure: bool,
        token: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.record, ctx.index, ctx.norm = stage.record, len(stage.maps), norm.norm
        ctx.relu, ctx.use_running = relu, shortcut.use_running
        ctx.dtypes = [None if v is None else v.dtype for v in (gamma, beta)]
        y = stage.tail(z, norm, shortcut, relu, measure=measure)
        running = (shortcut.running_mean, shortcut.running_var) if shortcut.use_running else ()
        ctx.save_for_backward(z, stage.maps[-2], shortcut.weight, *running, *([y] if relu else []))
        return y, z.new_empty((0,))

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _token: Tensor | None) -> tuple[Any, ...]:
        forbid_double_backward()
        record, index = ctx.record, ctx.index
        z, before, weight, *saved = ctx.saved_tensors
        y = saved.pop() if ctx.relu else None
        running_mean, running_var = saved if ctx.use_running else (record.none, record.none)
        left = record.passes.current()
        if dy is not None:
            dy = operators.in_layout(dy, record.layout)
            if y is not None and not record.vectors:
                dy, y = relu_gradient(dy, y), None
        dz, bits, db, *vectors = record.gradients(
            index,
            z,
            ctx.norm,
            left,
            dy=dy,
            y=y if dy is not None else None,
            before=before,
            needed=ctx.needs_input_grad[0],
        )
        if dy is not None:
            dweight = record.none.new_empty(weight.shape)
            left.blocks[index] = LaterBlock(dy, bits, record.a[index], db, weight, running_mean, running_var, dweight)
        record.passes.node_done(index)
        dvectors = [
            in_dtype(v, dtype) if dtype is not None and v.numel() else None
            for v, dtype in zip(vectors, ctx.dtypes, strict=True)
        ]
        return dz, *dvectors, *([None] * 6)
