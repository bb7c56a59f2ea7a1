"""The times of contestants that were measured together."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

from this_tree import interleaved, percentiles

SCALES = {"ms": 1e3, "us": 1e6}


class Measured(NamedTuple):
    """The times of one case in seconds, a value a round, and the calls."""

    times: dict[str, list[float]]
    calls: dict[str, Callable[[], Any]] = {}  # noqa: RUF012

    def values(self, who: str) -> list[float]:
        """Its seconds, a value a round."""
        return self.times[who]

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


class OverImages(NamedTuple):
    """The times of one case on many images: contestant -> image -> seconds, a value a round."""

    times: dict[str, dict[int, list[float]]]

    def of_images(self, who: str) -> dict[int, float]:
        """The median of each image."""
        return {image: median(seconds) for image, seconds in self.times[who].items()}

    def values(self, who: str) -> list[float]:
        """The medians of its images."""
        return list(self.of_images(who).values())

    def medians(self, scale: float = 1e3) -> dict[str, float]:
        """The median over the images of every contestant, in milliseconds."""
        return {who: scale * median(self.values(who)) for who in self.times}

    def figures(self, who: str, unit: str = "ms") -> dict[str, Any]:
        """p20, p50, p80, p90, p99 and max over the images; how many images, and repeats of each."""
        found = interleaved.over_images(self.values(who), SCALES[unit])
        return {
            **found,
            "unit": unit,
            "repeats": min(map(len, self.times[who].values())),
            "images": len(self.times[who]),
            "p99_of_median": found["p99"] / found["p50"],
            "max_of_median": found["max"] / found["p50"],
        }

    def ratios(self, own: str) -> dict[str, float]:
        """Of every other contestant: how many times longer it takes image by image, the median and the least."""
        found: dict[str, float] = {}
        for name in self.times:
            if name != own:
                middle, worst = interleaved.ratios(self.of_images(own), self.of_images(name))
                found |= {f"ratio_{key_of(name)}": middle, f"worst_ratio_{key_of(name)}": worst}
        return found


def key_of(name: str) -> str:
    """A contestant's name as part of a key."""
    return name.lower().replace(" ", "_").replace("-", "_")
