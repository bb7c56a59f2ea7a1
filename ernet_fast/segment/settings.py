"""What counts as a nucleus."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields


@dataclass(frozen=True, kw_only=True)
class NucleiSettings:
    """What counts as a nucleus. Lengths are micrometres in the tissue, so that one setting fits every magnification.

    The defaults were chosen on synthetic patches at 100X, 200X and 400X; docs/segment.md has what they reach.

    Attributes:
        finest: standard deviation of the Gaussian that removes noise.
        coarsest: standard deviation of the Gaussian whose mean is the background; about a nucleus's radius.
        contrast: least haematoxylin above the background, units of optical density. Otsu's threshold of each image
            is used where it is higher.
        share: least haematoxylin, as a share of the image's 99th percentile: pale fibres have less.
        thinnest: what is thinner is removed: fibres, bridges between nuclei, specks.
        separation: least distance between the centres of two nuclei that touch.
        smooth: standard deviation of the Gaussian that smooths the distance transform.
        min_area: of a nucleus, um^2.
        max_area: of a nucleus, um^2; what is larger is a clump or no nucleus, and is left out.

    Raises:
        ValueError: a value is no positive number, or an upper limit is not above its lower one.
    """

    finest: float = 0.5
    coarsest: float = 3.5
    contrast: float = 0.1
    share: float = 0.3
    thinnest: float = 1.4
    separation: float = 1.8
    smooth: float = 0.5
    min_area: float = 8.0
    max_area: float = 400.0

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ValueError(f"{item.name}={value!r}; expected a positive number.")
        for low, high in (("finest", "coarsest"), ("min_area", "max_area")):
            if getattr(self, low) >= getattr(self, high):
                raise ValueError(f"{low}={getattr(self, low)}, {high}={getattr(self, high)}; expected {low} < {high}.")
