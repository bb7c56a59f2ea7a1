"""Times of several things measured in turns, A B A B, so that a disturbance of the machine falls on all of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p20, p50 and p80, between neighbours where they fall between."""
    if not values:
        raise ValueError("no values.")
    ordered = sorted(values)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        below = math.floor(place)
        above = min(below + 1, len(ordered) - 1)
        return ordered[below] + (place - below) * (ordered[above] - ordered[below])

    return {"p20": at(0.2), "p50": at(0.5), "p80": at(0.8)}


def in_turns(
    contestants: Mapping[str, Callable[[], Any]],
    rounds: int = 15,
    budget: float = math.inf,
    turn: float = 0.02,
    wait: Callable[[], Any] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of a call of each contestant, a value a round; the first round does not count.

    A turn is as many calls as take about `turn` seconds, at least one. No round begins once `budget` seconds are spent,
    except the first. `wait` is called before the clock is read, e.g. torch.cuda.synchronize.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    calls = dict.fromkeys(contestants, 1)
    begin = time.perf_counter()
    done = -1
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
                calls[name] = max(1, min(1000, round(turn / max(seconds, 1e-9))))
        done += 1
    return times
