"""Batched Macenko stain normalisation."""

from __future__ import annotations

from ernet_fast.stain.result import MacenkoFit, MacenkoStatus

__all__ = ["MacenkoFit", "MacenkoStatus"]
