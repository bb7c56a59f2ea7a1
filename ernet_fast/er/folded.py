"""A block's shortcuts in evaluation with their constants worked out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ernet_fast.er import operators
from ernet_fast.er.shortcut import ERShortcut


class FoldedShortcut(nn.Module):
    """`y = ReLU(x_l + sum_i a_i * x_i + b)`: an `ERShortcut` in evaluation, where N(x_i) is a scale and a shift.

    Buffers:
        a: [num_maps + 1, channels], the last row 1; float64 if the shortcut's were, else float32.
        b: [channels].
    """

    def __init__(self, shortcut: ERShortcut) -> None:
        """Fold `shortcut`, which has norm="batch"; it is not modified."""
        super().__init__()
        if shortcut.running_mean is None or shortcut.running_var is None:
            raise ValueError("an ERShortcut with norm='group' has no constants: it normalises with the batch at hand.")
        weight = shortcut.weight.detach()
        factor = weight.double() * torch.rsqrt(shortcut.running_var.double() + shortcut.eps)
        dtype = operators.acc_dtype(weight)
        rounded = torch.cat([factor, torch.ones_like(factor[:1])]).to(dtype)
        self.a: Tensor
        self.b: Tensor
        self.register_buffer("a", rounded)
        # the constant goes with the coefficients as they are stored
        self.register_buffer("b", -(rounded[:-1].double() * shortcut.running_mean.double()).sum(0).to(dtype))
        self.relu = shortcut.relu

    def forward(self, xs: Sequence[Tensor], *, fused: bool = True) -> Tensor:
        """Y [N, C, H, W] of the maps x_0 ... x_l; `fused` in one pass, where operators serve the device."""
        dtype = operators.acc_dtype(xs[-1])
        a, b = self.a.to(dtype), self.b.to(dtype)
        if fused and operators.serves(xs[-1]):
            layout = operators.layout_of(xs)
            return operators.weighted_sum([operators.in_layout(x, layout) for x in xs], a, b, self.relu)
        y = xs[-1] + b.view(1, -1, 1, 1)
        for x, row in zip(xs[:-1], a, strict=False):
            y = y + row.view(1, -1, 1, 1) * x
        return (y.relu() if self.relu else y).to(xs[-1].dtype)
