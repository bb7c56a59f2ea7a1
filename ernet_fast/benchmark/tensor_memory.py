"""Memory that tensors take during a call, as PyTorch's allocator reports it to the profiler.

The CPU operators keep the memory of freed outputs beside that allocator; while something is measured here they do not,
so that their outputs are counted as all others are. A process takes more: what allocators keep, code, threads.

bench/ loads this file when it measures another revision, too; `output_cache` is all that it needs of the package.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ernet_fast.output_cache import kept_memory, set_kept_memory_limit


class MemoryUse(NamedTuple):
    """Bytes above what was in use when the call began: the most, and what is left with its result."""

    peak: int
    kept: int


@contextmanager
def no_kept_memory() -> Iterator[None]:
    """While active, the CPU operators take their outputs from PyTorch's allocator, where a profiler sees them."""
    limit = kept_memory().limit_bytes
    set_kept_memory_limit(0)
    try:
        yield
    finally:
        set_kept_memory_limit(limit)


def memory_use(call: Callable[[], Any]) -> MemoryUse:
    """What `call` allocates on the CPU. The profiler does not see the release of what was allocated before."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else every profile writes two lines to stderr
    activities = [torch.profiler.ProfilerActivity.CPU]
    with no_kept_memory(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    changes = [event.nbytes() for event in events]
    del result
    return MemoryUse(max(accumulate(changes), default=0), sum(changes))


def held_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of tensors, each counted once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def training_peak(model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: Callable[[], Any]) -> int:
    """Bytes in use at the peak of a training step that follows another one.

    Parameters, buffers and the state of the optimizer are counted, gradients as they come.
    """
    optimizer.zero_grad(set_to_none=True)
    state = [value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)]
    return held_bytes([*model.parameters(), *model.buffers(), *state]) + memory_use(step).peak


def activation_peak(model: torch.nn.Module, images: Tensor, labels: Tensor) -> int:
    """Bytes at the peak of forward, loss and backward, beside parameters, their gradients and the optimizer."""

    def forward_and_backward() -> None:
        torch.nn.functional.cross_entropy(model(images), labels).backward()

    forward_and_backward()  # after which every gradient has its memory
    return memory_use(forward_and_backward).peak
