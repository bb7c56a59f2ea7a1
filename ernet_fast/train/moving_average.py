"""An exponential moving average of a network's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class MovingAverage:
    """w <- d w + (1 - d) w_network after every step, of parameters and buffers, in float32 or better.

    d is `decay`, but (1 + t) / (10 + t) in step t where that is less, so that the random start is soon forgotten.
    Integers (numbers of batches) are copied.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay, self._network = decay, network
        self.state = {name: _wide(tensor).clone() for name, tensor in network.state_dict().items()}
        self._floats = [name for name, mean in self.state.items() if mean.is_floating_point()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the network's weights after its step number `step`, counted from 1."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        own = self._network.state_dict()
        means = [self.state[name] for name in self._floats]
        if means:
            torch._foreach_lerp_(means, [_wide(own[name]) for name in self._floats], share)
        for name in self.state.keys() - set(self._floats):
            self.state[name].copy_(own[name])

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on with the average of a checkpoint."""
        for name, mean in self.state.items():
            mean.copy_(state[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The network has the average as its weights within the block, and its own again behind it."""
        own = {name: tensor.clone() for name, tensor in self._network.state_dict().items()}
        self._network.load_state_dict(self.state)
        try:
            yield
        finally:
            self._network.load_state_dict(own)


def _wide(tensor: Tensor) -> Tensor:
    narrow = tensor.is_floating_point() and tensor.dtype.itemsize < 4
    return tensor.detach().float() if narrow else tensor.detach()
