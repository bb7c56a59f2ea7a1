"""Recomputation of a stage in backward, without counting its batch twice in the running statistics."""

from __future__ import annotations

import contextlib

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def checkpoint_stage(stage: nn.Module, x: Tensor) -> Tensor:
    """`stage(x)`, keeping only x for backward.

    The second pass leaves buffers (running statistics, counts) as the first left them.
    """
    return checkpoint(
        stage, x, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), _ScratchBuffers(stage))
    )


class _ScratchBuffers:
    """Let a module update copies of its buffers; may be entered again, once for each backward of a retained graph.

    The copies stand in for the buffers instead of being copied back, because backward may have saved the originals.
    """

    def __init__(self, module: nn.Module) -> None:
        self._owners = list(module.modules())
        self._originals: list[dict[str, Tensor | None]] = []

    def __enter__(self) -> None:
        self._originals = [dict(owner._buffers) for owner in self._owners]
        for owner, buffers in zip(self._owners, self._originals, strict=True):
            owner._buffers.update({name: None if b is None else b.clone() for name, b in buffers.items()})

    def __exit__(self, *_: object) -> None:
        for owner, buffers in zip(self._owners, self._originals, strict=True):
            owner._buffers.update(buffers)
        self._originals = []
