"""Batched Macenko stain normalisation, augmentation and separation."""

from __future__ import annotations

from ernet_fast.stain.augment import macenko_augment
from ernet_fast.stain.functional import macenko_fit, macenko_normalize
from ernet_fast.stain.normalizer import MacenkoNormalizer
from ernet_fast.stain.result import MacenkoFit, MacenkoStatus
from ernet_fast.stain.separate import Separation, separate

__all__ = [
    "MacenkoFit",
    "MacenkoNormalizer",
    "MacenkoStatus",
    "Separation",
    "macenko_augment",
    "macenko_fit",
    "macenko_normalize",
    "separate",
]
