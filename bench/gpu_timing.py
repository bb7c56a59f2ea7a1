"""Times of calls on the device: a CUDA device, or the CPU where there is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from this_tree import percentiles, time_interleaved

FLUSH_BYTES = 256 << 20  # more than the L2 cache of any GPU
AHEAD_CYCLES = 1_000_000  # half a millisecond for Python to launch everything before the device begins


def milliseconds(function: Callable[[], Any], repeats: int = 30) -> dict[str, float]:
    """p20, p50 and p80 of a call's time on the device, in milliseconds, with a GPU's cache flushed before each."""
    if not torch.cuda.is_available():
        return percentiles(time_interleaved({"call": function}, repeats)["call"], 1e3)
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
    return percentiles(times)


def wait() -> None:
    """Until the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
