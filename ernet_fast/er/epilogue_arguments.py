"""Arguments and results of a block epilogue: what `er_block` and `er_block_backward` take and give back."""

from __future__ import annotations

import enum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ernet_fast.er.process_group import ProcessGroup

TABLE_ROWS = 7
"""Of each feature map, [C] each: scale, 1 / deviation, centre, shift, mean, variance, 1 / deviation of x."""
AFFINE_ROWS = 4
"""The first of them, which group norm has too; `group_coefficients` says what follows."""
MEAN_ROW = 4


class BranchNorm(enum.IntEnum):
    """What makes `x = scale * z + shift` of the raw map z."""

    NONE = 0
    """x = z."""
    BATCH = 1
    """BatchNorm with the statistics of the batch."""
    RUNNING = 2
    """BatchNorm with running statistics."""


class NormArguments(NamedTuple):
    """How x comes from z, in the order in which the operators take it."""

    norm: BranchNorm
    gamma: Tensor | None
    beta: Tensor | None
    mean: Tensor | None
    """BATCH: running mean [C] to update, or None. RUNNING: the one to use."""
    var: Tensor | None
    batches: Tensor | None
    momentum: float | None
    eps: float


class ShortcutArguments(NamedTuple):
    """A block's shortcuts, in the order in which the operators take them."""

    weight: Tensor | None = None
    """[maps before, C]; None for a map that no block made."""
    running_mean: Tensor | None = None
    """[maps before, C] to update; with `use_running` to normalise with."""
    running_var: Tensor | None = None
    batches: Tensor | None = None
    use_running: bool = False
    momentum: float | None = 0.0


NO_NORM = NormArguments(BranchNorm.NONE, None, None, None, None, None, 0.0, 0.0)


class LaterBlock(NamedTuple):
    """What the node of a block leaves, in one backward pass, for the nodes of the maps before its own."""

    dy: Tensor
    """Gradient of its output; of its weighted sum where `relu_mask` is empty."""
    relu_mask: Tensor
    """One bit an element, set where its output was positive, as `ernet::er_block_backward` returns it, or empty."""
    a: Tensor
    """Coefficients of its weighted sum, [maps, C]; with group norm [maps, N, C]."""
    db: Tensor
    """Float64 [C] or [N, C]."""
    weight: Tensor
    """[maps - 1, C]"""
    running_mean: Tensor
    """[maps - 1, C] that its shortcuts normalised with; empty: with the moments of the maps."""
    running_var: Tensor
    dweight: Tensor
    """[maps - 1, C] in the dtype of coefficients: row i is written with the gradient of map i."""


class MapGradients(NamedTuple):
    """Gradients of one map and of what depends on it alone; empty tensors for those that are not there."""

    dz: Tensor
    dy: Tensor
    """What later calls take as `LaterBlock.dy`, with this mask."""
    relu_mask: Tensor
    db: Tensor
    dgamma: Tensor
    dbeta: Tensor
    earlier_dots: Tensor
    """Inner products of the map before with every gradient of a weighted sum, where they came at less cost."""


class EpilogueState:
    """What the blocks of a stage share during one forward pass and its backward passes.

    Per-channel vectors and never a feature map, so that saved tensors alone keep maps alive.
    """

    def __init__(
        self,
        like: Tensor,
        num_maps: int,
        eps: float,
        *,
        measure: bool,
        num_groups: int = 0,
        composed: bool,
        group: ProcessGroup | None = None,
    ) -> None:
        """Prepare for a stage.

        Args:
            like: a map of the stage, [N, C, H, W].
            num_maps: how many maps there will be.
            eps: added to the variances of maps.
            measure: some shortcut normalises with moments, so those of every map are taken.
            num_groups: of channels, with group norm; 0 for batch norm.
            composed: one operator a step (Triton, process groups) instead of one a block each way.
            group: the processes over whose batches statistics are taken; None for this process alone.
        """
        self.eps, self.measure, self.num_groups = eps, measure, num_groups
        self.composed, self.group = composed, group
        self.layout = torch.contiguous_format if like.is_contiguous() else torch.channels_last
        channels = like.shape[1]
        self.elements = like.numel() // channels if channels else 0
        rows = AFFINE_ROWS * (1 + like.shape[0]) if num_groups else TABLE_ROWS
        self.table = like.new_empty((num_maps, rows, channels), dtype=torch.float64)
        self.vector_dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        self._none: Tensor | None = None
        self.count: Tensor | None = None
        """Values a channel over all processes, where statistics are taken over a group."""
        self.filed = 0
        """Maps that have a row of the table."""
        self.a: list[Any] = []
        """Of the blocks' weighted sums; None for a map that no block made."""
        self.measured: list[bool] = []
        self.needs_dots = False
        """Gradients depend on inner products of maps with gradients: those of vectors, or through moments."""

    @property
    def none(self) -> Tensor:
        """An empty tensor in the dtype of vectors, made when it is first asked for: most passes do without."""
        if self._none is None:
            self._none = self.table.new_empty((0,), dtype=self.vector_dtype)
        return self._none


def norm_arguments(bn: nn.Module) -> NormArguments:
    """How the BatchNorm `bn` makes x of its input, and which running statistics it updates.

    Raises:
        ValueError: a cumulative average without its count, or an eps with which PyTorch does not train either.
    """
    assert isinstance(bn, nn.BatchNorm2d | nn.SyncBatchNorm)
    gamma: Tensor | None = None if bn.weight is None else bn.weight.contiguous()  # parameters need not be
    beta: Tensor | None = None if bn.bias is None else bn.bias.contiguous()
    mean, var, batches = bn.running_mean, bn.running_var, bn.num_batches_tracked
    training, eps = bn.training, bn.eps
    if not training and mean is not None:
        if not eps >= 0:
            raise ValueError(f"batch_norm eps must be non-negative, but got {eps}")
        return NormArguments(BranchNorm.RUNNING, gamma, beta, mean, var, None, None, eps)
    if not eps > 0:
        raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
    if not (training and bn.track_running_stats):
        mean = var = batches = None
    momentum = bn.momentum
    if mean is not None and momentum is None and batches is None:
        raise ValueError("momentum=None (a cumulative average) needs num_batches_tracked.")
    return NormArguments(BranchNorm.BATCH, gamma, beta, mean, var, batches, momentum, eps)
