"""Naive compositions in plain PyTorch and NumPy: oracle of the tests, fallback, baseline of every speed figure."""

from __future__ import annotations

from ernet_fast.reference.er import er_shortcut_sum
from ernet_fast.reference.macenko import macenko_fit, macenko_normalize

__all__ = ["er_shortcut_sum", "macenko_fit", "macenko_normalize"]
