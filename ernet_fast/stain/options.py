"""Checks of the numbers and names that every Macenko function takes."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

PERCENTILES = ("linear", "nearest")
POLICIES = ("reference", "identity", "raise")


def is_number(value: Any) -> bool:
    """True for real numbers, NumPy's included; a truth value is none."""
    return isinstance(value, (float, Real)) and not isinstance(value, bool)


def check_parameters(Io: float, alpha: float, beta: float, percentile: str) -> None:
    """Raise ValueError or TypeError for a parameter of the fit that makes no sense."""
    for name, value in (("Io", Io), ("alpha", alpha), ("beta", beta)):
        if not is_number(value):
            raise TypeError(f"{name} is {value!r}; expected a number.")
        if not math.isfinite(value):
            raise ValueError(f"{name} is {value!r}; expected a finite number.")
    if not 1 < Io <= 1024:
        raise ValueError(
            f"Io={Io!r}: the transmitted light is a grey level in (1, 1024]; 240 is usual for 8-bit images."
        )
    if not 0 <= alpha < 50:
        raise ValueError(f"alpha={alpha!r}: the angular percentile is in [0, 50) percent; 1 is usual.")
    if not 0 <= beta < math.log(Io):
        raise ValueError(
            f"beta={beta!r}: the tissue threshold is an optical density in [0, ln(Io)) = [0, {math.log(Io):.3f}); "
            "0.15 is usual."
        )
    if percentile not in PERCENTILES:
        raise ValueError(f"percentile={percentile!r}; expected one of {', '.join(map(repr, PERCENTILES))}.")


def check_policy(on_degenerate: str) -> None:
    """Raise ValueError for an unknown policy."""
    if on_degenerate not in POLICIES:
        raise ValueError(f"on_degenerate={on_degenerate!r}; expected one of {', '.join(map(repr, POLICIES))}.")
