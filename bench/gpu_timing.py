"""Times of calls on a CUDA device, and the bandwidth of a copy that they are compared with."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

FLUSH_BYTES = 256 << 20  # more than the L2 cache of any GPU
AHEAD_CYCLES = 1_000_000  # half a millisecond for Python to launch everything before the device begins


def milliseconds(function: Callable[[], Any], repeats: int = 30) -> dict[str, float]:
    """p20, p50 and p80 of a call's time on the device, in milliseconds, with the cache flushed before each."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    function()
    times = []
    for _ in range(repeats):
        flush.zero_()
        torch.cuda._sleep(AHEAD_CYCLES)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    times.sort()
    return {f"p{q}": times[round(q / 100 * (repeats - 1))] for q in (20, 50, 80)}


@functools.lru_cache(maxsize=1)
def copy_bandwidth(size: int = 1 << 30) -> tuple[float, dict[str, float]]:
    """GB/s, read and written, of a copy of `size` bytes, and its times."""
    source = torch.empty(size, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    timing = milliseconds(lambda: target.copy_(source))
    return 2 * size / timing["p50"] / 1e6, timing
