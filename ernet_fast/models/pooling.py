"""Global pooling: what reduces a feature map to one vector a sample, under timm's names."""

from __future__ import annotations

import torch
from torch import Tensor, nn

POOL_TYPES = ("avg", "max", "avgmax", "catavgmax", "")


class AverageMaxPool(nn.Module):
    """Average and maximum of each channel: [N, C, H, W] -> [N, C, 1, 1] their mean, or [N, 2 C, 1, 1] concatenated."""

    def __init__(self, *, concatenate: bool) -> None:
        super().__init__()
        self.concatenate = concatenate

    def extra_repr(self) -> str:
        """The argument, for print."""
        return f"concatenate={self.concatenate}"

    def forward(self, x: Tensor) -> Tensor:
        """Pooled x."""
        average, maximum = nn.functional.adaptive_avg_pool2d(x, 1), nn.functional.adaptive_max_pool2d(x, 1)
        return torch.cat((average, maximum), 1) if self.concatenate else 0.5 * (average + maximum)


def global_pooling(pool_type: str) -> nn.Module:
    """The module of a pooling, one of `POOL_TYPES` (or ValueError); "" is none."""
    if pool_type not in POOL_TYPES:
        raise ValueError(f"global_pool must be one of {POOL_TYPES}, got {pool_type!r}")
    if pool_type in ("avgmax", "catavgmax"):
        return AverageMaxPool(concatenate=pool_type == "catavgmax")
    plain = {"avg": nn.AdaptiveAvgPool2d((1, 1)), "max": nn.AdaptiveMaxPool2d((1, 1)), "": nn.Identity()}
    return plain[pool_type]
