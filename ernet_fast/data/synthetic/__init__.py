"""A seeded generator of H&E-like patches in the BreakHis layout, for demos and tests; no data for science."""

from __future__ import annotations

from ernet_fast.data.synthetic.dataset import write_breakhis_like
from ernet_fast.data.synthetic.patch import SyntheticPatch, generate_patch
from ernet_fast.data.synthetic.stain import STAINING, StainProfile, beer_lambert, sample_stain

__all__ = [
    "STAINING", "StainProfile", "SyntheticPatch", "beer_lambert", "generate_patch", "sample_stain",
    "write_breakhis_like",
]  # fmt: skip
