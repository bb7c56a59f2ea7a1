"""The times of contestants that were measured together."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

from this_tree import percentiles

SCALES = {"ms": 1e3, "us": 1e6}


class Measured(NamedTuple):
    """The times of one case in seconds, a value a round, and the calls."""

    times: dict[str, list[float]]
    calls: dict[str, Callable[[], Any]] = {}  # noqa: RUF012

    def medians(self, scale: float = 1e3) -> dict[str, float]:
        """Median of every contestant, in milliseconds."""
        return {name: scale * median(values) for name, values in self.times.items()}

    def percentiles(self, who: str, unit: str = "ms") -> dict[str, Any]:
        """p20, p50, p80, unit and repeats of one contestant."""
        return {**percentiles(self.times[who], SCALES[unit]), "unit": unit, "repeats": len(self.times[who])}

    def figures(self, own: str, unit: str = "ms") -> dict[str, Any]:
        """Those of `own`, medians of all, ratios to all others."""
        found = self.medians(SCALES[unit])
        return {
            **self.percentiles(own, unit),
            **{f"{key_of(name)}_{unit}": value for name, value in found.items()},
            **{f"ratio_{key_of(name)}": value / found[own] for name, value in found.items() if name != own},
        }


def key_of(name: str) -> str:
    """A contestant's name as part of a key."""
    return name.lower().replace(" ", "_").replace("-", "_")
