"""The maps of one stage with batch norm in one forward pass, for blocks that are one operator each way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ernet_fast.er import operators
from ernet_fast.er.coefficients import (
    BranchNorm,
    NormArguments,
    ShortcutArguments,
    count_changes,
    with_contiguous_vectors,
)
from ernet_fast.er.epilogue import er_block
from ernet_fast.er.nodes import Block, Opening, StageRecord


class WholeStage:
    """The maps of one forward pass: x_0, and one of each block, which reads all maps up to its own."""

    group = None
    """Statistics are those of this process alone."""

    def __init__(self, weights: Sequence[Tensor], eps: float, *, measure: bool) -> None:
        """Prepare for a stage.

        Args:
            weights: of the shortcuts of the blocks to come, [maps before, C] each.
            eps: added to the variances of maps.
            measure: some shortcut normalises with the batch, so every map is measured.
        """
        self.weights, self.eps, self.measure = list(weights), eps, measure
        self.maps: list[Tensor] = []
        self.token: Tensor | None = None  # of the last map that has a node
        self.record: StageRecord

    def open(self, z: Tensor, *, pass_on: bool = False) -> Tensor:
        """File x_0; with `pass_on`, returns it for use elsewhere, else the map itself."""
        z = self._prepare(z)
        learning = any(weight.requires_grad for weight in self.weights)
        if not (torch.is_grad_enabled() and (learning or z.requires_grad)):
            self.enter(z)
            return z
        self.record.vectors |= learning
        pass_on = pass_on and z.requires_grad  # elsewhere nobody is to take a gradient towards a frozen x_0
        token, passed = Opening.apply(z, self, pass_on, *self.weights)
        self._add_token(token)
        return passed if pass_on else z

    def block(
        self, z: Tensor, norm: NormArguments, shortcut: ShortcutArguments, relu: bool, *, measure: bool = True
    ) -> Tensor:
        """File z and return y = ReLU(x + sum_i weight_i * N(x_i)), or without the ReLU.

        The weight is the one that the stage was prepared with. A last map needs no `measure`.
        """
        z = self._prepare(z)
        norm, shortcut = with_contiguous_vectors(
            norm, ShortcutArguments(self.weights[len(self.maps) - 1], *shortcut[1:])
        )
        if torch.is_grad_enabled():
            gamma, beta = norm.gamma, norm.beta
            learning = (gamma is not None and gamma.requires_grad) or (beta is not None and beta.requires_grad)
            if learning or z.requires_grad or self.token is not None:
                self.record.vectors |= learning
                y, token = Block.apply(z, gamma, beta, self, norm, shortcut, relu, measure, self.token)
                self._add_token(token)
                return y
        return self.tail(z, norm, shortcut, relu, measure=measure)

    def enter(self, z: Tensor) -> None:
        """File x_0; the first block writes its row of the table."""
        self._append(z.detach(), self.record.none, self.measure)

    def tail(
        self, z: Tensor, norm: NormArguments, shortcut: ShortcutArguments, relu: bool, *, measure: bool = True
    ) -> Tensor:
        """File z and return its block's output, without autograd; moves running statistics."""
        record = self.record
        measure = (self.measure and measure) or norm.norm == BranchNorm.BATCH
        z = z.detach()
        maps = [*self.maps, z]
        y, a = er_block(maps, record.table, record.filed, self.measure, measure, norm, shortcut, self.eps, relu)
        count_changes(norm, shortcut)
        self._append(z, a, measure)
        record.filed = len(maps)
        return y

    def _append(self, z: Tensor, a: Tensor, measured: bool) -> None:
        self.maps.append(z)
        self.record.a.append(a)
        self.record.measured.append(measured)
        self.record.vectors |= measured

    def _prepare(self, z: Tensor) -> Tensor:
        num_maps = len(self.weights) + 1
        if not self.maps:
            self.record = StageRecord(z, num_maps, self.eps)
        elif len(self.maps) == num_maps:
            raise ValueError(f"the stage was started with shortcuts for {num_maps} maps; this is one more.")
        return operators.in_layout(z, self.record.layout)

    def _add_token(self, token: Tensor) -> None:
        if self.token is None:
            self.record.passes.last_node = len(self.maps) - 1
        self.token = token
