"""Batched stain normalisation (Macenko, Reinhard), augmentation and separation."""

from __future__ import annotations

from ernet_fast.stain import deprecated_operators as deprecated_operators  # registers them
from ernet_fast.stain.augment import macenko_augment
from ernet_fast.stain.colour_counts import ColourCounts
from ernet_fast.stain.functional import macenko_fit, macenko_normalize
from ernet_fast.stain.normalizer import MacenkoNormalizer
from ernet_fast.stain.reinhard import ReinhardFit, ReinhardNormalizer, reinhard_fit, reinhard_normalize
from ernet_fast.stain.result import MacenkoFit, MacenkoStatus
from ernet_fast.stain.separate import Separation, separate
from ernet_fast.stain.slide import macenko_normalize_slide
from ernet_fast.stain.slide_tiles import SlideTile, SlideTiles
from ernet_fast.stain.transforms import StainAugment, StainNormalize, as_v2

__all__ = [
    "ColourCounts", "MacenkoFit", "MacenkoNormalizer", "MacenkoStatus", "ReinhardFit", "ReinhardNormalizer",
    "Separation", "SlideTile", "SlideTiles", "StainAugment", "StainNormalize", "as_v2", "macenko_augment",
    "macenko_fit", "macenko_normalize", "macenko_normalize_slide", "reinhard_fit", "reinhard_normalize", "separate",
]  # fmt: skip
