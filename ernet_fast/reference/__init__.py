"""Naive compositions in plain PyTorch and NumPy: the oracle of the tests, the fallback, the baseline of every speed figure."""

from __future__ import annotations

from ernet_fast.reference.macenko import macenko_fit, macenko_normalize

__all__ = ["macenko_fit", "macenko_normalize"]
