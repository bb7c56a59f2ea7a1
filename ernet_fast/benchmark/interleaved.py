"""Interleaved timing: every round times every contestant once, so that a disturbance of the machine falls on all.

Standard library only, and no import from the package: bench/ loads this file when it times another revision.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

SLICE = 0.02
"""Seconds that the calls of one contestant take in a round, if one call is shorter."""
MOST_CALLS = 1000
LEAST_ROUNDS = 5
"""Fewer are no basis for a median, and none for 20th and 80th percentiles."""


def percentiles(values: Sequence[float], scale: float = 1.0) -> dict[str, float]:
    """20th, 50th and 80th percentile of `values` times `scale`, as p20, p50 and p80; interpolated."""
    if not values:
        raise ValueError("values is empty; expected at least one number.")
    tenths = statistics.quantiles([*values, *values[:1]] if len(values) == 1 else values, n=10, method="inclusive")
    return {f"p{10 * tenth}": scale * tenths[tenth - 1] for tenth in (2, 5, 8)}


def time_interleaved(
    contestants: Mapping[str, Callable[[], Any]],
    rounds: int,
    budget: float = math.inf,
    slice_seconds: float = SLICE,
    wait: Callable[[], Any] = lambda: None,
    least_rounds: int = LEAST_ROUNDS,
) -> dict[str, list[float]]:
    """Seconds of one call of each contestant, one value a round, after a warm-up round that does not count.

    Args:
        contestants: the calls by name.
        rounds: how many rounds at most.
        budget: once so many seconds are spent, no round follows the first `least_rounds`.
        slice_seconds: a call that takes less is repeated for about so long in each round, and its mean taken: timed
            alone it would find the caches as the contestant before left them.
        wait: called before the clock is read, such as `torch.cuda.synchronize`.
        least_rounds: how many rounds are made in any case, `rounds` permitting.

    Returns:
        Lists of equal length, in the order of the rounds.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    calls = dict.fromkeys(contestants, 1)
    begin = time.perf_counter()
    done = -1  # the first round warms up, and shows how many calls fill a slice
    while done < rounds and (done < least_rounds or time.perf_counter() - begin < budget):
        for name, call in contestants.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                call()
            wait()
            seconds = (time.perf_counter() - start) / calls[name]
            if done >= 0:
                times[name].append(seconds)
            else:
                calls[name] = max(1, min(MOST_CALLS, round(slice_seconds / max(seconds, 1e-9))))
        done += 1
    return times
