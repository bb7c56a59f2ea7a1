"""A stand-in for a block's convolutions that moves no bytes: it returns a map that is there already.

The epilogues of a stage alone would be given all their maps at once, and a compiler would then merge those of several
blocks into one pass over the maps. In a network it cannot: block l's map comes out of a convolution of y_{l-1}. The
operator `branch` has that dependence, forward and backward, and is opaque to torch.compile.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_given: dict[int, tuple[Tensor, Tensor]] = {}
_library = torch.library.Library("ernet_bench", "DEF")
_library.define("branch(Tensor y, int index) -> Tensor")
_library.define("branch_backward(Tensor dz, int index) -> Tensor")


def give(index: int, z: Tensor, dy: Tensor) -> None:
    """Have `branch(y, index)` return z, and the gradient of its y be dy."""
    _given[index] = (z.detach(), dy.detach())


def branch(y: Tensor, index: int) -> Tensor:
    """z of block `index`, as though it were computed from y."""
    return torch.ops.ernet_bench.branch(y, index)


class _Branch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, index: int) -> Tensor:
        ctx.index = index
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.ernet_bench.branch(y, index)

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor, None]:
        return torch.ops.ernet_bench.branch_backward(dz, ctx.index), None


for _device in ("CPU", "CUDA"):
    _library.impl("branch", lambda _, index: _given[index][0].detach(), _device)
    _library.impl("branch_backward", lambda _, index: _given[index][1].detach(), _device)
    _library.impl("branch", _Branch.apply, f"Autograd{_device}")
_library.impl("branch", lambda y, _: torch.empty_like(y), "Meta")
_library.impl("branch_backward", lambda dz, _: torch.empty_like(dz), "Meta")
