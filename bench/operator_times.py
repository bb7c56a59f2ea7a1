"""Where a call's time goes: milliseconds within each operator of ours, by the profiler."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

PREFIX = "ernet::"
WHOLE = "call"


def operator_milliseconds(call: Callable[[], Any], repeats: int = 5) -> dict[str, float]:
    """Of every operator `ernet::NAME` the milliseconds in a call, all its uses together: medians over `repeats` calls.

    Under the name "call" those of the whole call. Threads that an operator starts are not seen, its own waiting for
    them is: this is time on the clock.
    """
    scope = f"{__name__}.{WHOLE}"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        for _ in range(repeats + 1):
            with torch.profiler.record_function(scope):
                call()
    events = list(profile.events())
    calls = [event.time_range for event in events if event.name == scope][1:]  # the first starts the profiler
    uses = [event for event in events if event.name.startswith(PREFIX)]
    found = {WHOLE: [span.elapsed_us() / 1e3 for span in calls]}
    for name in sorted({use.name for use in uses}):
        ranges = [use.time_range for use in uses if use.name == name]
        inside = [[r.elapsed_us() / 1e3 for r in ranges if span.start <= r.start < span.end] for span in calls]
        found[name.removeprefix(PREFIX)] = [sum(times) for times in inside]
    return {name: statistics.median(times) for name, times in found.items()}
