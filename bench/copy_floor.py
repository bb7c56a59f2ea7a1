"""The copy bandwidth that floors are computed with, measured where and when they are needed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _median_seconds(function: Callable[[], Any], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        result = function()
        times.append(time.perf_counter() - start)
        del result
    return statistics.median(times)


def _filled(size: int) -> Tensor:
    return torch.ones(max(1, size // 4), dtype=torch.float32)


def copy_seconds_per_byte(working_set: int, *, rounds: int = 15) -> float:
    """Seconds a byte, read or written, takes in a copy whose source and target together are `working_set` bytes.

    Both are in memory that is in use already. The copy runs with the calling thread's number of threads.
    """
    source, target = _filled(working_set // 2), _filled(working_set // 2)
    return _median_seconds(lambda: target.copy_(source), rounds) / (2 * source.numel() * 4)


def new_memory_seconds_per_byte(block: int, *, rounds: int = 15) -> float:
    """Seconds that a byte written costs more in a newly allocated block of `block` bytes than in one in use.

    Every operator that returns a tensor writes to newly allocated memory. C libraries give large blocks (glibc: of 32
    MiB or more) back to the system at once, which then maps and clears their pages anew at every call.
    """
    source, target = _filled(block), _filled(block)
    new, used = _median_seconds(source.clone, rounds), _median_seconds(lambda: target.copy_(source), rounds)
    return max(0.0, new - used) / (source.numel() * 4)
