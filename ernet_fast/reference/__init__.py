"""Naive compositions in plain PyTorch and NumPy: oracle of the tests, fallback, baseline of every speed figure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ernet_fast.reference.er import er_shortcut_sum

if TYPE_CHECKING:
    from ernet_fast.reference.macenko import macenko_fit, macenko_normalize

__all__ = ["er_shortcut_sum", "macenko_fit", "macenko_normalize"]


def __getattr__(name: str) -> Any:
    """Macenko's functions, loaded at first use: they need NumPy, and `ernet-fast doctor` runs without it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ernet_fast.reference import macenko

    return getattr(macenko, name)
