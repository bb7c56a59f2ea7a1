"""What the fused operators take from a BatchNorm module in place of calling it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ernet_fast.er import operators
from ernet_fast.er.coefficients import BranchNorm, NormArguments
from ernet_fast.er.process_group import group_of
from ernet_fast.er.unfused_coefficients import combine_samples, momentum_of, update_running


def is_batch_norm(bn: nn.Module) -> bool:
    """True for the modules whose arithmetic the operators know; a subclass may do anything."""
    return type(bn) in (nn.BatchNorm2d, nn.SyncBatchNorm)


def spreads(bn: nn.Module) -> bool:
    """True if `bn` takes the statistics of the batch at hand over several processes."""
    return isinstance(bn, nn.SyncBatchNorm) and bn.training and group_of(bn) is not None


def uses_batch(bn: nn.Module) -> bool:
    """True if `bn` normalises with the statistics of the batch at hand."""
    assert isinstance(bn, nn.BatchNorm2d | nn.SyncBatchNorm)
    return bn.training or bn.running_mean is None


def norm_arguments(bn: nn.Module) -> NormArguments:
    """How `bn` makes x of its input, and which running statistics it moves.

    Raises:
        ValueError: a cumulative average without its count.
    """
    assert isinstance(bn, nn.BatchNorm2d | nn.SyncBatchNorm)
    mean, var, batches = bn.running_mean, bn.running_var, bn.num_batches_tracked
    if not uses_batch(bn):
        return NormArguments(BranchNorm.RUNNING, bn.weight, bn.bias, mean, var, None, None, bn.eps)
    if not (bn.training and bn.track_running_stats):
        mean = var = batches = None
    if mean is not None and bn.momentum is None and batches is None:
        raise ValueError("momentum=None (a cumulative average) needs num_batches_tracked.")
    return NormArguments(BranchNorm.BATCH, bn.weight, bn.bias, mean, var, batches, bn.momentum, bn.eps)


def affine(bn: nn.Module, moments: tuple[Tensor, Tensor] | None, z: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift [C] with which `bn(z) = scale * z + shift`; updates its running statistics as bn would."""
    assert isinstance(bn, nn.BatchNorm2d | nn.SyncBatchNorm)
    dtype = operators.acc_dtype(z)
    if uses_batch(bn):
        assert moments is not None
        mean, var = moments if moments[0].dim() == 1 else combine_samples(*moments)
        count = z.shape[0] * z.shape[2] * z.shape[3]
        if count == 1:
            raise one_value(z)
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


def one_value(z: Tensor) -> ValueError:
    """The error for a map z [1, C, 1, 1] that is to be normalised with its own statistics."""
    return ValueError(
        f"the map has shape {tuple(z.shape)}, one value a channel: BatchNorm cannot train on it. "
        "Use a larger batch or image, or eval()."
    )
