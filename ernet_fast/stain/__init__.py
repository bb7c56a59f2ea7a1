"""Batched Macenko stain normalisation."""

from __future__ import annotations

from ernet_fast.stain.functional import macenko_fit, macenko_normalize
from ernet_fast.stain.normalizer import MacenkoNormalizer
from ernet_fast.stain.result import MacenkoFit, MacenkoStatus

__all__ = ["MacenkoFit", "MacenkoNormalizer", "MacenkoStatus", "macenko_fit", "macenko_normalize"]
