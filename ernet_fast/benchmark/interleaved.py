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
SHORT = 0.005
"""Calls that take less feel what the contestant before has left in the caches."""
ImageTimes = dict[str, dict[int, list[float]]]
"""Contestant -> image -> seconds, a value a round."""


def percentiles(values: Sequence[float], scale: float = 1.0) -> dict[str, float]:
    """20th, 50th and 80th percentile of `values` times `scale`, as p20, p50 and p80; interpolated."""
    if not values:
        raise ValueError("values is empty; expected at least one number.")
    tenths = statistics.quantiles([*values, *values[:1]] if len(values) == 1 else values, n=10, method="inclusive")
    return {f"p{10 * tenth}": scale * tenths[tenth - 1] for tenth in (2, 5, 8)}


def over_images(values: Sequence[float], scale: float = 1.0) -> dict[str, float]:
    """`percentiles` of one time an image, and their 90th, 99th and the largest as p90, p99 and max."""
    found = percentiles(values, scale)
    hundredths = statistics.quantiles([*values, *values[:1]] if len(values) == 1 else values, n=100, method="inclusive")
    return {**found, "p90": scale * hundredths[89], "p99": scale * hundredths[98], "max": scale * max(values)}


def ratios(own: Mapping[int, float], other: Mapping[int, float]) -> tuple[float, float]:
    """How many times longer the other takes than the own, image by image: the median, and the least.

    Images that one of them lacks do not count.
    """
    found = [other[image] / own[image] for image in own if image in other]
    if not found:
        raise ValueError("no image is timed by both.")
    return statistics.median(found), min(found)


def time_over_images(
    contestants: Mapping[str, Mapping[int, Callable[[], Any]]],
    rounds: int,
    budget: float = math.inf,
    wait: Callable[[], Any] = lambda: None,
    least_rounds: int = LEAST_ROUNDS,
) -> ImageTimes:
    """Seconds of single calls on many images: a round goes through all images, and calls every contestant on each.

    A contestant thus meets an image again only after all the others, as users' images come: no branch predictor knows
    it. A call shorter than `SHORT` follows an untimed one of the same contestant on the image before, so that it finds
    that contestant's code and tables in the caches, and not those of another.

    Args:
        contestants: the calls by name and number of the image; a slow contestant may have fewer images.
        rounds: how many rounds at most, after one that does not count.
        budget: once so many seconds are spent, no round follows the first `least_rounds`.
        wait: called before the clock is read, such as `torch.cuda.synchronize`.
        least_rounds: how many rounds are made in any case, `rounds` permitting.
    """
    images = sorted({image for calls in contestants.values() for image in calls})
    times: ImageTimes = {name: {image: [] for image in sorted(calls)} for name, calls in contestants.items()}
    quickest = dict.fromkeys(contestants, math.inf)
    before = {name: calls[max(calls)] for name, calls in contestants.items()}
    begin, done = time.perf_counter(), -1
    while done < rounds and (done < least_rounds or time.perf_counter() - begin < budget):
        for image in images:
            for name, calls in contestants.items():
                if image not in calls:
                    continue
                if quickest[name] < SHORT:
                    before[name]()
                    wait()
                call = before[name] = calls[image]
                start = time.perf_counter()
                call()
                wait()
                seconds = time.perf_counter() - start
                if done >= 0:
                    times[name][image].append(seconds)
                quickest[name] = min(quickest[name], seconds)
        done += 1
    return times


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
