"""The options that every Macenko function takes, checked once."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch

from ernet_fast.stain.layout import LAYOUTS

PERCENTILES = ("linear", "nearest")
POLICIES = ("reference", "identity", "raise")


def is_number(value: Any) -> bool:
    """True for real numbers, NumPy's included; a truth value is none."""
    return isinstance(value, (float, Real)) and not isinstance(value, bool)


@dataclass(frozen=True)
class Options:
    """How to fit and reconstruct, see `macenko_fit` and `macenko_normalize`; TypeError or ValueError for nonsense."""

    Io: float = 240.0
    alpha: float = 1.0
    beta: float = 0.15
    percentile: str = "linear"
    on_degenerate: str = "reference"
    range: float = 255.0
    layout: str | None = None

    def __post_init__(self) -> None:
        for name in ("Io", "alpha", "beta", "range"):
            value = getattr(self, name)
            if not is_number(value):
                raise TypeError(f"{name} is {value!r}; expected a number.")
            if not math.isfinite(value) and name != "range":
                raise ValueError(f"{name} is {value!r}; expected a finite number.")
            object.__setattr__(self, name, float(value))
        if not 1 < self.Io <= 1024:
            raise ValueError(
                f"Io={self.Io:g}: the transmitted intensity is a grey level in (1, 1024]; "
                "240 is usual for 8-bit images."
            )
        if not 0 <= self.alpha < 50:
            raise ValueError(f"alpha={self.alpha:g}: the angular percentile is in [0, 50) percent; 1 is usual.")
        if not 0 <= self.beta < math.log(self.Io):
            raise ValueError(
                f"beta={self.beta:g}: the tissue threshold is an optical density in [0, ln(Io)) = "
                f"[0, {math.log(self.Io):.3f}); 0.15 is usual."
            )
        if self.percentile not in PERCENTILES:
            raise ValueError(f"percentile={self.percentile!r}; expected one of {', '.join(map(repr, PERCENTILES))}.")
        check_policy(self.on_degenerate)
        if not (math.isfinite(self.range) and self.range > 0):
            raise ValueError(f"range={self.range!r}; expected the positive value that stands for 255.")
        if self.layout is not None and self.layout not in LAYOUTS:
            raise ValueError(f"layout={self.layout!r}; expected 'CHW', 'HWC' or None.")

    @classmethod
    def of(cls, *values: Any) -> Options:
        """`Options(*values)`, checked once for the same values: that takes longer than a call on a small image."""
        if torch.compiler.is_compiling():
            return cls(*values)
        try:
            return _checked(*values)
        except TypeError:  # or what cannot be looked up, of which the check says more
            return cls(*values)

    @property
    def nearest(self) -> bool:
        """True if percentiles are the nearest order statistic."""
        return self.percentile == "nearest"

    @property
    def identity(self) -> bool:
        """True if images without a fit stay as they are."""
        return self.on_degenerate == "identity"


@functools.lru_cache(maxsize=64, typed=True)
def _checked(*values: Any) -> Options:
    return Options(*values)


def check_policy(on_degenerate: str) -> None:
    """Raise ValueError for an unknown policy."""
    if on_degenerate not in POLICIES:
        raise ValueError(f"on_degenerate={on_degenerate!r}; expected one of {', '.join(map(repr, POLICIES))}.")
