"""Small trees in the BreakHis layout, and the composition of the published data set."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ernet_fast.data import MAGNIFICATIONS, SUBTYPES, Sample, parse_name
from ernet_fast.data.layout import image_path

MakeTree = Callable[..., Path]


@pytest.fixture
def make_tree(tmp_path: Path) -> MakeTree:
    """`make_tree(patients=..., images=..., magnifications=...)` writes 8x8 images of that many patients a class;
    returns the root.

    `extra` lists further images as (subtype, slide, magnification, sequence).
    """

    def make(
        patients: int = 7,
        images: int = 2,
        magnifications: Iterable[int] = (40, 200),
        extra: Iterable[tuple[str, str, int, str]] = (),
        root: str = "BreaKHis_v1",
        suffix: str = ".png",
    ) -> Path:
        tree = tmp_path / root / "histology_slides"
        entries = [
            (code, f"14-{1000 * (code in 'DC LC MC PC'.split()) + number}", magnification, f"{k:03d}")
            for malignant in (0, 1)
            for number, code in enumerate(4 * [c for c, kind in SUBTYPES.items() if kind.malignant == malignant])
            for magnification in magnifications
            for k in range(1, images + 1)
            if number < patients
        ]
        for k, entry in enumerate([*entries, *extra]):
            path = image_path(tree, *entry, suffix)
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.full((8, 9, 3), k % 256, dtype=np.uint8)
            Image.fromarray(pixels).save(path)
        return tmp_path / root

    return make


@pytest.fixture(scope="session")
def published() -> list[Sample]:
    """A sample for every image of BreaKHis_v1, from the published number of images per slide and magnification."""
    samples = []
    with open(Path(__file__).with_name("breakhis_v1_counts.csv"), newline="") as file:
        for row in csv.DictReader(file):
            for magnification in MAGNIFICATIONS:
                for k in range(int(row[str(magnification)])):
                    path = image_path(Path("BreaKHis_v1"), row["subtype"], row["slide"], magnification, f"{k + 1:03d}")
                    samples.append(parse_name(path))
    return samples


@pytest.fixture
def mini(real_images: Path) -> Path:
    """The folder BreaKHis_mini among the real images."""
    folder = real_images / "BreaKHis_mini"
    if not folder.is_dir():
        pytest.skip(f"no folder BreaKHis_mini in {real_images}")
    return folder
