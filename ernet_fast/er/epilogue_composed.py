"""The maps of one stage with batch norm in one forward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from ernet_fast.er import operators
from ernet_fast.er._batch_nodes import Block, Opening, StageRecord
from ernet_fast.er.coefficients import (
    NO_NORM,
    NO_SHORTCUT,
    BranchNorm,
    NormArguments,
    ShortcutArguments,
    block_coefficients,
    count_changes,
    with_contiguous_vectors,
)
from ernet_fast.er.process_group import ProcessGroup, gather_moments


def one_call_serves(x: Tensor) -> bool:
    """True if the operators of `coefficients` serve x; compiled and exported programs trace plain PyTorch instead."""
    return operators.serves(x) and not torch.compiler.is_compiling()


class BatchStage:
    """The maps of one forward pass. Maps are filed in order; each block's weighted sum reads all maps up to its own."""

    def __init__(self, num_maps: int, eps: float, *, measure: bool, group: ProcessGroup | None = None) -> None:
        """Prepare for a stage.

        Args:
            num_maps: how many maps will be filed.
            eps: added to the variances of maps.
            measure: some shortcut normalises with the batch, so every map is measured.
            group: the processes over which the statistics of a batch are taken; None for this process alone.
        """
        self.num_maps, self.eps, self.measure, self.group = num_maps, eps, measure, group
        self.maps: list[Tensor] = []
        self.tokens: list[Tensor] = []  # of the last block, and of maps that have come since as they are
        self.record: StageRecord

    def open(self, z: Tensor, *, pass_on: bool = False) -> Tensor:
        """File a map as it is; with `pass_on`, returns z for use elsewhere, else the map itself."""
        z = self._prepare(z)
        if not (z.requires_grad and torch.is_grad_enabled()):
            self.file(z)
            return z
        token, passed = Opening.apply(z, self, pass_on)
        self._add_token(token)
        return passed if pass_on else z

    def block(
        self, z: Tensor, norm: NormArguments, shortcut: ShortcutArguments, relu: bool, *, measure: bool = True
    ) -> Tensor:
        """File z and return y = ReLU(x + sum_i weight_i * N(x_i)), or without the ReLU.

        A last map needs no `measure`.
        """
        z = self._prepare(z)
        norm, shortcut = with_contiguous_vectors(norm, shortcut)
        if torch.is_grad_enabled():
            vectors = (shortcut.weight, norm.gamma, norm.beta)
            learning = any(v is not None and v.requires_grad for v in vectors)
            if learning or z.requires_grad or self.tokens:
                self.record.vectors |= learning
                y, token = Block.apply(z, *vectors, self, norm, shortcut, relu, measure, *self.tokens)
                self.tokens.clear()
                self._add_token(token)
                return y
        return self.weighted_sum(self.file(z, norm, shortcut, measure=measure), relu)

    def file(
        self,
        z: Tensor,
        norm: NormArguments = NO_NORM,
        shortcut: ShortcutArguments = NO_SHORTCUT,
        *,
        measure: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """File z, a row of the table, and the coefficients of its block; moves running statistics."""
        record = self.record
        mean = var = None
        if (self.measure and measure) or norm.norm == BranchNorm.BATCH:
            mean, var = operators.channel_moments(z)
            record.vectors = True
            if self.group is not None:
                mean, var, record.count = gather_moments(mean, var, record.elements, self.group)
        a, b = block_coefficients(
            record.table,
            len(record.a),
            record.doubles,
            mean,
            var,
            record.count,
            record.elements,
            *norm,
            *shortcut,
            self.eps,
        )
        count_changes(norm, shortcut)
        self.maps.append(z.detach())
        record.a.append(a)
        record.measured.append(mean is not None)
        return a, b

    def weighted_sum(self, coefficients: tuple[Tensor, Tensor], relu: bool) -> Tensor:
        """The weighted sum of all maps filed."""
        return operators.weighted_sum(self.maps, *coefficients, relu)

    def _prepare(self, z: Tensor) -> Tensor:
        if not self.maps:
            self.record = StageRecord(z, self.num_maps, self.eps, self.group)
        elif len(self.maps) == self.num_maps:
            raise ValueError(f"the stage was started with shortcuts for {self.num_maps} maps; this is one more.")
        return operators.in_layout(z, self.record.layout)

    def _add_token(self, token: Tensor) -> None:
        if self.record.passes.last_node < 0:
            self.record.passes.last_node = len(self.maps) - 1
        self.tokens.append(token)
