"""A smaller set of images that still looks like the whole."""

from __future__ import annotations

from collections.abc import Sequence

from ernet_fast.data import Sample


def evenly_chosen(samples: Sequence[Sample], count: int | None) -> list[Sample]:
    """At most `count` samples, evenly spaced in the order of class, patient, magnification and name.

    Each class, patient and magnification keeps its share (give or take one image); nothing is random, and the order of
    `samples` does not matter. The result is in that order; None keeps all.
    """
    ordered = sorted(samples, key=lambda s: (s.label, s.patient, s.magnification, s.path.name))
    if count is None or count >= len(ordered):
        return ordered
    return [ordered[(2 * k + 1) * len(ordered) // (2 * count)] for k in range(count)]
