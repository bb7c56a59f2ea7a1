"""The times of contestants that were measured together."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

from this_tree import percentiles


class Measured(NamedTuple):
    """The times of one case in seconds, a value a round, and the calls."""

    times: dict[str, list[float]]
    calls: dict[str, Callable[[], Any]] = {}  # noqa: RUF012

    def medians(self, scale: float = 1e3) -> dict[str, float]:
        """Median of every contestant, in milliseconds."""
        return {name: scale * median(values) for name, values in self.times.items()}

    def figures(self, own: str, unit: str = "ms") -> dict[str, Any]:
        """What every row has: percentiles and repeats of `own`, medians of all, ratios to all others."""
        scale = {"ms": 1e3, "us": 1e6}[unit]
        found = self.medians(scale)
        return {
            **percentiles(self.times[own], scale),
            "unit": unit,
            "repeats": len(self.times[own]),
            **{f"{key_of(name)}_{unit}": value for name, value in found.items()},
            **{f"ratio_{key_of(name)}": value / found[own] for name, value in found.items() if name != own},
        }


def key_of(name: str) -> str:
    """A contestant's name as part of a key."""
    return name.lower().replace(" ", "_").replace("-", "_")
