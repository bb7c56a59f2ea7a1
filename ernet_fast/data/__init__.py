"""BreakHis, patient-wise splits, augmentation, uploads to a GPU and a synthetic stand-in."""

from __future__ import annotations

from ernet_fast.data import synthetic
from ernet_fast.data.augment import PatchTransform
from ernet_fast.data.breakhis import BreakHis
from ernet_fast.data.image_io import ImageReadError, read_image
from ernet_fast.data.layout import LABELS, MAGNIFICATIONS, SUBTYPES, Sample, Skipped, parse_name
from ernet_fast.data.listed import ListedImages
from ernet_fast.data.prefetch import Prefetcher
from ernet_fast.data.splits import SplitRow, Splits, make_splits, read_published_fold, read_split_csv, write_split_csv

__all__ = [
    "LABELS", "MAGNIFICATIONS", "SUBTYPES", "BreakHis", "ImageReadError", "ListedImages", "PatchTransform",
    "Prefetcher", "Sample", "Skipped", "SplitRow", "Splits", "make_splits", "parse_name", "read_image",
    "read_published_fold", "read_split_csv", "synthetic", "write_split_csv",
]  # fmt: skip
