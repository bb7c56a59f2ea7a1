"""A stage as operators that are traced or differentiated one by one, for compiled and exported programs.

Moments, coefficients (plain PyTorch on per-channel vectors) and weighted sums of the raw maps, with the operators' own
autograd: traceable, one gradient for each pair of maps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ernet_fast.er import operators
from ernet_fast.er.epilogue_arguments import BranchNorm, NormArguments, ShortcutArguments
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

    def __init__(self, *, num_groups: int | None, eps: float, measure: bool) -> None:
        """Prepare for a forward pass; with `measure` shortcuts normalise with moments, so every map is measured.

        `eps` is added to variances. With `num_groups`, of group norm, moments and coefficients are per sample too.
        """
        self.num_groups, self.eps, self.measure = num_groups, eps, measure
        self._statistics: list[MapStatistics] = []
        self._maps: list[Tensor] = []

    def start(self, x: Tensor) -> Tensor:
        """File a map x [N, C, H, W] that no block made, and return it."""
        self._statistics.append(map_statistics(self._file(x, self.measure), num_groups=self.num_groups))
        return x

    def block(
        self, z: Tensor, norm: NormArguments, shortcut: ShortcutArguments, *, relu: bool, measure: bool = True
    ) -> Tensor:
        """File z [N, C, H, W], the branch's raw map, and return the block's output. A last map needs no `measure`."""
        measure = self.measure and measure
        moments = self._file(z, measure or norm.norm == BranchNorm.BATCH)
        scale, shift = _affine(norm, moments, z)
        # moments that `norm` alone needed say nothing that a shortcut with running statistics would use
        last = map_statistics(moments if measure else None, scale, shift, num_groups=self.num_groups)
        weight, mean, var, batches, use_running, momentum = shortcut
        dtype, earlier = operators.acc_dtype(z), self._statistics
        assert weight is not None
        running = None
        if mean is not None and var is not None:
            if use_running:
                running = mean.to(dtype), var.to(dtype)
            else:
                with torch.no_grad():
                    means = torch.stack([m.mean for m in earlier if m.mean is not None])
                    variances = torch.stack([m.var for m in earlier if m.var is not None])
                count = z.shape[0] * z.shape[2] * z.shape[3]
                update_running(mean, var, means, variances, count, momentum_of(momentum, batches))
        a, b = shortcut_coefficients(weight.to(dtype), earlier, last, running, self.eps, z.shape[0])
        earlier.append(last)
        return operators.weighted_sum(self._maps, a.contiguous(), b, relu)

    def _file(self, z: Tensor, measure: bool) -> tuple[Tensor, Tensor] | None:
        """File a map; its mean and biased variance, [C] or per sample [N, C], if they are to be measured."""
        layout = operators.layout_of([z, *self._maps[:1]])  # where they differ, the last decides
        z = z.contiguous(memory_format=layout)
        self._maps.append(z)
        return operators.channel_moments(z, self.num_groups is not None) if measure else None


def _affine(
    norm: NormArguments, moments: tuple[Tensor, Tensor] | None, z: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Scale and shift [C] of `x = scale * z + shift`; updates the running statistics of `norm`."""
    if norm.norm == BranchNorm.NONE:
        return None, None
    dtype = operators.acc_dtype(z)
    if norm.norm == BranchNorm.BATCH:
        assert moments is not None
        mean, var = moments if moments[0].dim() == 1 else combine_samples(*moments)
        count = z.shape[0] * z.shape[2] * z.shape[3]
        if count == 1:
            raise operators.one_value(z)
        if norm.mean is not None and norm.var is not None:
            update_running(norm.mean, norm.var, mean, var, count, momentum_of(norm.momentum, norm.batches))
    else:
        assert norm.mean is not None and norm.var is not None
        mean, var = norm.mean.to(dtype), norm.var.to(dtype)
    scale = torch.rsqrt(var + norm.eps)
    if norm.gamma is not None:
        scale = norm.gamma.to(dtype) * scale
    shift = -mean * scale
    return scale, shift if norm.beta is None else shift + norm.beta.to(dtype)
