"""Interleaved timings as pytest-benchmark benches: one bench a contestant, all contestants of a case timed together.

A bench is parametrised by `contestants(OWN, *PEERS)` and asks the fixture `interleave` for its times. The first
bench of a case that runs times all contestants, interleaved; each bench then replays its own times to
`benchmark.pedantic` through a clock (pytest-benchmark's `timer`), so that its tables, JSON, comparisons and saved runs
show every contestant, and a ratio is always of one interleaved measurement.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import pytest
from measured import Measured, OverImages
from this_tree import time_interleaved

Calls = Mapping[str, Callable[[], Any]]
Found = TypeVar("Found", Measured, OverImages)
INTERLEAVED = {"interleave", "interleave_images"}
"""The fixtures that time contestants."""


class ReplayClock:
    """A clock that advances by seconds that were measured before."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def replay(self, seconds: Sequence[float], benchmark: Any) -> None:
        """Give pytest-benchmark one round for each value."""
        self.now = 0.0
        values = iter(seconds)

        def advance() -> None:
            self.now += next(values)

        benchmark.pedantic(advance, rounds=len(seconds))


CLOCK = ReplayClock()


def contestants(*names: str) -> pytest.MarkDecorator:
    """Parametrise a bench by contestant; the outermost mark, so that the benches of a case follow each other."""
    return pytest.mark.parametrize("who", names)


def name_of(item: Any) -> str:
    """The name of a row: that of the bench, without `test_` and the contestant."""
    name = item.name.removeprefix("test_")
    who = item.callspec.params.get("who") if hasattr(item, "callspec") else None
    if who is None:
        return name
    name = name.removesuffix("]").removesuffix(who).rstrip("-")
    return name.removesuffix("[") if name.endswith("[") else f"{name}]"


def mark(items: Sequence[pytest.Item]) -> None:
    """Give each interleaved bench the replay clock, and a group of the contestants of its case."""
    for item in items:
        if INTERLEAVED & {*getattr(item, "fixturenames", ())}:
            item.add_marker(pytest.mark.benchmark(timer=CLOCK, group=f"{item.path.stem}: {name_of(item)}"))


class Interleaver:
    """Times a case when its first contestant asks, and keeps the times, of the last case alone, for the others."""

    def __init__(self) -> None:
        self.case, self.kept = "", None

    def measure(self, request: pytest.FixtureRequest, make: Callable[[], Calls], **options: Any) -> Measured:
        """The times of the bench's case; `make` gives its calls, `options` are those of `time_interleaved`."""

        def timed() -> Measured:
            calls = make()
            for call in calls.values():  # compiles, chooses algorithms, fills caches
                call()
            return Measured(time_interleaved(calls, **options), dict(calls))

        found = self.of_case(request, timed)
        self.kept = found._replace(calls={})  # only the first has them: they hold memory
        return found

    def of_case(self, request: pytest.FixtureRequest, timed: Callable[[], Found]) -> Found:
        """What `timed` finds, or has found for another contestant of the case."""
        who, benchmark = request.node.callspec.params["who"], request.getfixturevalue("benchmark")
        case = f"{request.path}::{name_of(request.node)}"
        if self.case != case:
            self.kept = timed()
            self.case = case
        found: Any = self.kept
        if who not in found.times:
            pytest.skip(f"{who} is not measured here")
        CLOCK.replay(found.values(who), benchmark)
        first, *_ = found.times
        benchmark.extra_info |= {"contestant": who, "times_slower": found.medians()[who] / found.medians()[first]}
        return found
