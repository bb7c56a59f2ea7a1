"""Algebra on channel vectors: from the moments of raw maps to the coefficients of one weighted sum.

A map x_i enters a stage as `x_i = scale_i * z_i + shift_i`, where z_i is the raw output of a convolution and scale and
shift are those of its BatchNorm (1 and 0 for a map that is given as it is). Its normalisation is analytic,

    N(x_i) = (x_i - mean_i) / sqrt(var_i + eps),     var_i = scale_i^2 var(z_i)

so y = ReLU(x_l + sum_i w_i * N(x_i)) is a weighted sum of the z_i with the coefficients that `shortcut_coefficients`
gives. Everything here is plain differentiable PyTorch on [C] or [N, C] tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class MapStatistics:
    """What later blocks need to know of one map: [C] tensors, or [N, C] where marked."""

    scale: Tensor | None
    """[C]; None stands for 1."""
    shift: Tensor | None
    """[C]; None stands for 0."""
    mean: Tensor | None
    """Mean of x over what it is normalised over, [C] or (group norm) [N, C]; None if it was not measured."""
    var: Tensor | None
    """Biased variance of x, likewise."""
    offset: Tensor | None
    """`shift - mean`, without the cancellation."""


def combine_samples(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Per-sample moments [N, C] of equally large samples to those of the batch, [C]."""
    total = mean.mean(0)
    return total, var.mean(0) + (mean - total).square().mean(0)


def combine_groups(mean: Tensor, var: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Per-sample moments [N, C] to those of each group of channels, spread over its channels again, [N, C]."""
    samples, channels = mean.shape
    grouped_mean, grouped_var = (t.reshape(samples, num_groups, -1) for t in (mean, var))
    total = grouped_mean.mean(2, keepdim=True)
    total_var = grouped_var.mean(2, keepdim=True) + (grouped_mean - total).square().mean(2, keepdim=True)
    return tuple(t.expand_as(grouped_mean).reshape(samples, channels) for t in (total, total_var))  # type: ignore[return-value]


def map_statistics(
    moments: tuple[Tensor, Tensor] | None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    num_groups: int | None = None,
) -> MapStatistics:
    """Statistics of `x = scale * z + shift` from the moments of z: [C] for batch norm, [N, C] with `num_groups`."""
    if moments is None:
        return MapStatistics(scale, shift, None, None, None)
    mean, var = moments
    if scale is not None:
        mean, var = scale * mean, scale.square() * var
    offset = -mean
    if shift is not None:
        mean = mean + shift
    if num_groups is not None:
        mean, var = combine_groups(mean, var, num_groups)
        offset = -mean if shift is None else shift - mean
    return MapStatistics(scale, shift, mean, var, offset)


def shortcut_coefficients(
    weight: Tensor,
    earlier: Sequence[MapStatistics],
    last: MapStatistics,
    running: tuple[Tensor, Tensor] | None,
    eps: float,
    num_samples: int,
) -> tuple[Tensor, Tensor | None]:
    """Coefficients a [L, C] or [L, N, C] and b [C] or [N, C] of `x_l + sum_i weight_i * N(x_i)` as a sum over the z_i.

    Args:
        weight: [L - 1, C], in the accumulation dtype.
        earlier: statistics of the L - 1 earlier maps.
        last: those of the block's own map.
        running: running mean and variance, [L - 1, C] each, to normalise with; None for the measured ones.
        eps: added to the variances.
        num_samples: N.
    """
    own = last.scale if last.scale is not None else weight.new_ones(weight.shape[1])
    if not earlier:
        return own.unsqueeze(0), last.shift
    per_sample = running is None and _known(earlier[0].var).dim() == 2
    if running is not None:
        offset = torch.stack([-r if m.shift is None else m.shift - r for m, r in zip(earlier, running[0], strict=True)])
        var = running[1]
    else:
        offset = torch.stack([_known(m.offset) for m in earlier])
        var = torch.stack([_known(m.var) for m in earlier])
    s = (weight.unsqueeze(1) if per_sample else weight) * torch.rsqrt(var + eps)
    b = (s * offset).sum(0)
    if last.shift is not None:
        b = b + last.shift
    if any(m.scale is not None for m in earlier):
        scales = torch.stack([torch.ones_like(weight[0]) if m.scale is None else m.scale for m in earlier])
        s = s * (scales.unsqueeze(1) if per_sample else scales)
    tail = own.view(1, 1, -1).expand(1, num_samples, -1) if per_sample else own.unsqueeze(0)
    return torch.cat([s, tail]), b


def _known(t: Tensor | None) -> Tensor:
    if t is None:
        raise RuntimeError("a map was filed without its moments, but the shortcut normalises with them")
    return t


@torch.no_grad()
def update_running(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, count: int, momentum: float
) -> None:
    """Move running statistics, in place, towards a batch's mean and (from the biased one) unbiased variance."""
    unbiased = var * (count / (count - 1))
    running_mean.lerp_(mean.to(running_mean.dtype), momentum)
    running_var.lerp_(unbiased.to(running_var.dtype), momentum)


def momentum_of(momentum: float | None, num_batches_tracked: Tensor | None) -> float:
    """Count a batch and return the momentum for it: `momentum`, or with None that of a cumulative average."""
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    if momentum is not None:
        return momentum
    if num_batches_tracked is None:
        raise ValueError("momentum=None (a cumulative average) needs num_batches_tracked.")
    return 1.0 / float(num_batches_tracked)
