"""Times of several calls measured in turns, so that a disturbance of the machine falls on all of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

TURN = 0.02  # seconds that a turn takes at least, if it can
MOST_CALLS = 100  # in a turn


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the values lie, between neighbours where it falls between."""
    if not values:
        raise ValueError("values is empty; expected at least one number.")
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def in_turns(
    contestants: Mapping[str, Callable[[], Any]],
    rounds: int,
    budget: float = math.inf,
    turn: float = TURN,
    wait: Callable[[], Any] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of a call of each contestant, one value a round, after a first round that does not count.

    In every round each takes its turn, of one call or of as many as take about `turn` seconds: a short call timed alone
    would be timed with the caches as the one before left them. Once `budget` seconds are spent, no round follows (one
    is made in any case). `wait` is called before the clock is read.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    calls = dict.fromkeys(contestants, 1)
    begin = time.perf_counter()
    done = -1  # the first round warms up, and tells how many calls make a turn
    while done < rounds and (done < 1 or time.perf_counter() - begin < budget):
        for name, call in contestants.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                call()
            wait()
            seconds = (time.perf_counter() - start) / calls[name]
            if done >= 0:
                times[name].append(seconds)
            else:
                calls[name] = max(1, min(MOST_CALLS, round(turn / max(seconds, 1e-9))))
        done += 1
    return times
