"""The copy bandwidth that copy times are computed with, measured where and when they are needed."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch


def copy_seconds_per_byte(working_set: int, *, rounds: int = 15) -> float:
    """Seconds a byte, read or written, takes in a copy whose source and target together are `working_set` bytes.

    Both are in memory that is in use already. The copy runs with the calling thread's number of threads.
    """
    source = torch.ones(max(1, working_set // 8), dtype=torch.float32)
    target = torch.ones_like(source)
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return statistics.median(times) / (2 * source.numel() * source.element_size())


def copy_time(must_move: int, working_set: int, what: str) -> dict[str, Any]:
    """Keys of a row: what the bytes that must move take, in milliseconds, at the copy bandwidth of the working set."""
    return {
        "must_move": must_move,
        "copy_time": 1e3 * must_move * copy_seconds_per_byte(working_set),
        "copy_why": f"bytes that {what} must move / copy bandwidth at its working set",
    }
