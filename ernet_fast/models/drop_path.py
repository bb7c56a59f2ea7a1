"""Stochastic depth."""

from __future__ import annotations

from torch import Tensor, nn


class DropPath(nn.Module):
    """In training sets each sample's map to 0 with probability `rate`, and scales the others by 1 / (1 - rate).

    Source: Huang et al., Deep networks with stochastic depth, ECCV 2016.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"rate must be in [0, 1), got {rate}")
        self.rate = rate

    def extra_repr(self) -> str:
        """The argument, for print."""
        return f"{self.rate:.3g}"

    def forward(self, x: Tensor) -> Tensor:
        """Of x [N, C, H, W], or x itself in evaluation."""
        if not self.training or self.rate == 0.0:
            return x
        return x * x.new_empty((x.shape[0], 1, 1, 1)).bernoulli_(1.0 - self.rate).div_(1.0 - self.rate)
