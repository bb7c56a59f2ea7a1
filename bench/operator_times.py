"""Where a call's time goes: milliseconds within each operator of ours, by the profiler."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

PREFIX = "ernet::"
WHOLE = "call"


def operator_milliseconds(call: Callable[[], Any], repeats: int = 5) -> dict[str, float]:
    """Of every operator `ernet::NAME` the milliseconds in a call, all its uses together: medians over `repeats` calls.

    Under the name "call" those of the whole call, in the same repeats. Threads that an operator starts are not seen,
    its own waiting for them is: this is time on the clock.
    """
    found: dict[str, list[float]] = defaultdict(list)
    call()
    for _ in range(repeats):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            start = time.perf_counter()
            call()
            found[WHOLE].append(1e3 * (time.perf_counter() - start))
        for event in profile.key_averages():
            if event.key.startswith(PREFIX):
                found[event.key.removeprefix(PREFIX)].append(event.cpu_time_total / 1e3)
    return {name: statistics.median(times) for name, times in sorted(found.items())}
