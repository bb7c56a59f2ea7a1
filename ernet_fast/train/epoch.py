"""How far an epoch has come, and how long its steps waited for data."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from ernet_fast.train.loss_watch import Totals


@dataclass(frozen=True)
class Progress:
    """The part of an epoch that is done.

    Attributes:
        batches: of each process.
        totals: losses and images of all processes.
        seconds: time that it took.
        waited: seconds of these that the training waited for a batch.
        rate: learning rate that the epoch began with; None before it began.
    """

    batches: int = 0
    totals: Totals = field(default_factory=Totals)
    seconds: float = 0.0
    waited: float = 0.0
    rate: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return asdict(self) | {"totals": list(self.totals)}

    @classmethod
    def from_dict(cls, values: dict[str, Any] | None) -> Progress:
        """The inverse of `to_dict`; of None, nothing done."""
        return cls() if values is None else cls(**(values | {"totals": Totals(*values["totals"])}))


class Clock:
    """Measures an epoch, of which `begun` was done before."""

    def __init__(self, begun: Progress) -> None:
        self._begun, self._start, self._waited, self._batches = begun, time.perf_counter(), 0.0, 0
        self._mark = (self._start, 0.0, 0)

    def timed(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches; how long each lets the caller wait is counted."""
        source = iter(batches)
        while True:
            asked = time.perf_counter()
            try:
                batch = next(source)
            except StopIteration:
                return
            self._waited += time.perf_counter() - asked
            self._batches += 1
            yield batch

    def since_last(self) -> tuple[float, float, int]:
        """Seconds, seconds waited and batches since the last call, or the beginning."""
        now = (time.perf_counter(), self._waited, self._batches)
        passed = (now[0] - self._mark[0], now[1] - self._mark[1], now[2] - self._mark[2])
        self._mark = now
        return passed

    def progress(self, batches: int, totals: Totals, rate: float) -> Progress:
        """The part of the epoch that is done by now."""
        seconds = self._begun.seconds + time.perf_counter() - self._start
        return Progress(batches, totals, seconds, self._begun.waited + self._waited, rate)
