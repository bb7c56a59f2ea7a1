"""The autograd nodes of a stage with batch norm: backward by map, each map's gradient written once.

`StageInput` stands where x_0 and all shortcut weights enter the stage, `BlockEpilogue` where a block turns its raw map
z_l into its output y_l. Earlier maps are read past autograd; what ties the nodes is a token that each returns and the
next one takes. So autograd runs them from the last to the first, a map's after those of all blocks that read the map.
Each of these has left the gradient of its weighted sum, and the node of map i takes the inner products of z_i with all
of them at once: what they say of weights, gamma, beta and moments is known when

    dz_i = sum_l a_{l,i} * g_l + k1_i * z_i + k0_i

is due, and the same maps are summed up. A row of each dweight is written with each map; `StageInput` runs last and
returns them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ernet_fast.er.epilogue import er_block, er_block_backward
from ernet_fast.er.epilogue_arguments import (
    BranchNorm,
    EpilogueState,
    LaterBlock,
    MapGradients,
    NormArguments,
    ShortcutArguments,
)
from ernet_fast.er.operators import Node, check_first_order, dense, relu_gradient
from ernet_fast.er.process_group import ProcessGroup


class BackwardPass:
    """State shared by a stage's autograd nodes during one backward pass."""

    __slots__ = ("blocks", "known")

    def __init__(self) -> None:
        self.blocks: dict[int, LaterBlock] = {}
        """By map, from the last to the first."""
        self.known: Tensor | None = None
        """Of the map whose gradient is due next, the inner products with every gradient that is known already."""


class StageState(EpilogueState):
    """State of a stage during one forward pass and its backward passes, which are independent of one another.

    What nodes share is kept by the id of the running backward pass, so passes over a retained graph, at once in several
    threads or over a part of the stage, never see what belongs to another.
    """

    __slots__ = ("_passes", "last_node")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._passes: dict[int, BackwardPass] = {}
        self.last_node = -1
        """The map whose node runs last in backward: the first one that has a node."""

    def reached(self) -> bool:
        """True if the running backward pass has come by the node of a block."""
        return torch._C._current_graph_task_id() in self._passes

    def _end(self, running: int) -> None:
        self._passes.pop(running, None)

    def backward(
        self,
        index: int,
        z: Tensor,
        norm: BranchNorm,
        *,
        dy: Tensor | None = None,
        y: Tensor | None = None,
        passed: Tensor | None = None,
        before: Tensor | None = None,
        needed: bool,
    ) -> tuple[MapGradients, BackwardPass]:
        """The gradients of map `index` in the running backward pass, which its node must end with `node_done`."""
        running = torch._C._current_graph_task_id()
        shared = self._passes.get(running)
        if shared is None:
            shared = self._passes[running] = BackwardPass()
            # a pass that an error ends, or that reaches a part of the stage, never comes to the last node
            torch.autograd.Variable._execution_engine.queue_callback(lambda: self._end(running))
        later = list(reversed(shared.blocks.values()))  # nodes run from the last to the first
        if dy is not None:
            dy = dy.contiguous(memory_format=self.layout)
            if y is not None and not self.needs_dots:
                dy, y = relu_gradient(dy, y), None
        known, shared.known = shared.known, None
        found = er_block_backward(
            self,
            index,
            z,
            norm,
            later,
            dy=dy,
            y=y if dy is not None else None,
            passed=None if passed is None else passed.contiguous(memory_format=self.layout),
            before=before if index > self.last_node and self.layout == torch.channels_last else None,
            known=known,
            needed=needed,
        )
        if found.earlier_dots.numel():
            shared.known = found.earlier_dots
        if index == self.last_node:
            self._passes.pop(running, None)
        return found, shared


class StageInput(Node):
    """(z, state, pass_on, *weights) -> (token, z): x_0 and the weights of all blocks enter the stage.

    With `pass_on` the second result is z itself, and the gradient that it gets elsewhere joins the same weighted sum;
    else it is empty.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, state: StageState, pass_on: bool, *weights: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        ctx.set_materialize_grads(False)
        ctx.state, ctx.dtypes = state, [weight.dtype for weight in weights]
        ctx.save_for_backward(z)
        return z.new_empty((0,)), z.view_as(z) if pass_on else z.new_empty((0,))

    @staticmethod
    def backward(ctx: Any, _token: Tensor | None, passed: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of x_0 and of every weight."""
        if torch.compiler.is_compiling():
            return StageInput.run_untraced(ctx, _token, passed)
        check_first_order(passed)
        state = ctx.state
        (z,) = ctx.saved_tensors
        if not state.reached():  # no output of a block has a gradient
            return passed, None, None, *([None] * len(ctx.dtypes))
        found, shared = state.backward(0, z, BranchNorm.NONE, passed=passed, needed=ctx.needs_input_grad[0])
        dweights: list[Tensor | None] = []
        for block, (dtype, wanted) in enumerate(zip(ctx.dtypes, ctx.needs_input_grad[3:], strict=True), start=1):
            left = shared.blocks.get(block) if wanted else None
            dweights.append(None if left is None else left.dweight.to(dtype))
        return found.dz if found.dz.dim() > 1 else None, None, None, *dweights


class BlockEpilogue(Node):
    """(z, gamma, beta, token, state, maps, norm, shortcut, measure, relu) -> (y, token): the epilogue of a block."""

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        _token: Tensor | None,
        state: StageState,
        maps: list[Tensor],
        norm: NormArguments,
        shortcut: ShortcutArguments,
        measure: bool,
        relu: bool,
    ) -> tuple[Tensor, Tensor]:
        """See the class; `maps` are those of the stage up to z, detached."""
        ctx.set_materialize_grads(False)
        ctx.state, ctx.index, ctx.norm = state, len(maps) - 1, norm.norm
        ctx.relu, ctx.use_running = relu, shortcut.use_running
        ctx.dtypes = None if gamma is None else gamma.dtype, None if beta is None else beta.dtype
        y = er_block(state, maps, norm, shortcut, measure=measure, relu=relu)
        running = (shortcut.running_mean, shortcut.running_var) if shortcut.use_running else ()
        ctx.save_for_backward(z, maps[-2], shortcut.weight, *running, *([y.detach()] if relu else []))
        return y, z.new_empty((0,))

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _token: Tensor | None) -> tuple[Any, ...]:
        """Gradients of z, gamma and beta; those of the shortcuts' weights leave through `StageInput`."""
        if torch.compiler.is_compiling():
            return BlockEpilogue.run_untraced(ctx, dy, _token)
        check_first_order(dy)
        state, index = ctx.state, ctx.index
        z, before, weight, *saved = ctx.saved_tensors
        y = saved.pop() if ctx.relu else None
        running_mean, running_var = saved if ctx.use_running else (state.none, state.none)
        found, shared = state.backward(index, z, ctx.norm, dy=dy, y=y, before=before, needed=ctx.needs_input_grad[0])
        if dy is not None:
            dweight = state.table.new_empty(weight.shape, dtype=state.vector_dtype)
            shared.blocks[index] = LaterBlock(
                found.dy, found.relu_mask, state.a[index], found.db, weight, running_mean, running_var, dweight
            )
        dgamma, dbeta = vector_gradients(found, ctx.dtypes)
        return found.dz if found.dz.dim() > 1 else None, dgamma, dbeta, *([None] * 7)


def vector_gradients(
    found: MapGradients, dtypes: tuple[torch.dtype | None, torch.dtype | None]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of gamma and beta in the dtypes of these; None where there is no such vector, or no gradient."""
    dgamma, dbeta = found.dgamma, found.dbeta
    of_gamma, of_beta = dtypes
    return (
        None if of_gamma is None or not dgamma.numel() else dgamma.to(of_gamma),
        None if of_beta is None or not dbeta.numel() else dbeta.to(of_beta),
    )


class FusedStage:
    """The maps of one forward pass: x_0, and one of each block, which reads all maps up to its own."""

    def __init__(
        self,
        weights: Sequence[Tensor],
        eps: float,
        *,
        measure: bool,
        composed: bool = False,
        group: ProcessGroup | None = None,
    ) -> None:
        """Prepare for a stage.

        Args:
            weights: of the shortcuts of the blocks to come, [maps before, C] each.
            eps: added to the variances of maps.
            measure: some shortcut normalises with the batch, so every map is measured.
            composed: see `EpilogueState`.
            group: likewise.
        """
        self.weights, self.eps, self.measure = weights, eps, measure
        self.composed, self.group = composed, group
        self.maps: list[Tensor] = []
        self._token: Tensor | None = None  # of the last map that has a node
        self._state: StageState

    def start(self, x0: Tensor) -> Tensor:
        """File x_0 [N, C, H, W]; returns it for use elsewhere, where its gradient joins those of the shortcuts."""
        x0 = dense(x0)
        state = self._state = StageState(
            x0, len(self.weights) + 1, self.eps, measure=self.measure, composed=self.composed, group=self.group
        )
        self.maps.append(x0.detach())
        if torch.is_grad_enabled():
            learning = False
            for weight in self.weights:
                learning |= weight.requires_grad
            if learning or x0.requires_grad:
                state.needs_dots |= learning
                state.last_node = 0
                pass_on = x0.requires_grad  # x_0 is frozen: route no other gradient to it
                self._token, passed = StageInput.apply(x0, state, pass_on, *self.weights)
                return passed if pass_on else x0
        return x0

    def block(
        self, z: Tensor, norm: NormArguments, shortcut: ShortcutArguments, *, relu: bool, measure: bool = True
    ) -> Tensor:
        """File z and return y = ReLU(x + sum_i weight_i * N(x_i)), or without the ReLU.

        The weight is the one that the stage was prepared with. A last map needs no `measure`.
        """
        maps, state = self.maps, self._state
        weight = self.weights[len(maps) - 1]
        shortcut = shortcut._replace(weight=weight if weight.is_contiguous() else weight.contiguous())
        z = z.contiguous(memory_format=state.layout)
        maps.append(z.detach())
        measure = measure and self.measure
        if torch.is_grad_enabled():
            gamma, beta = norm.gamma, norm.beta
            learning = (gamma is not None and gamma.requires_grad) or (beta is not None and beta.requires_grad)
            if learning or z.requires_grad or self._token is not None:
                state.needs_dots |= learning
                if self._token is None:
                    state.last_node = len(maps) - 1
                y, self._token = BlockEpilogue.apply(
                    z, gamma, beta, self._token, state, maps, norm, shortcut, measure, relu
                )
                return y
        return er_block(state, maps, norm, shortcut, measure=measure, relu=relu)
