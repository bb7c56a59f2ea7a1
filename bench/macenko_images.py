"""Images for the Macenko benches: real H&E where the data is, else noise around two stains."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tissue import tissue

SIZES = {"64x64": (64, 64), "224x224": (224, 224), "700x460": (460, 700), "1024x1024": (1024, 1024)}
"""Height and width by the name of a size, which is width x height."""
TISSUE_LEVEL = 205  # of all channels: (I + 1) / 240 <= exp(-0.15)


def data_root() -> Path | None:
    """The folder of real images: $ERNET_TEST_DATA, else ../shared/data beside the repository."""
    given = os.environ.get("ERNET_TEST_DATA")
    root = Path(given) if given else Path(__file__).resolve().parents[2] / "shared" / "data"
    return root if root.is_dir() else None


def read(path: Path) -> np.ndarray:
    """An image [H, W, 3] uint8."""
    image = pytest.importorskip("PIL.Image", reason="Pillow reads the real images").open(path)
    return np.ascontiguousarray(np.array(image)[..., :3])  # the torchstain pair has an alpha channel


def large_image() -> np.ndarray:
    """An H&E image of at least 1300 x 1300 pixels."""
    root = data_root()
    if root is not None:
        return np.tile(read(root / "torchstain" / "source.png"), (3, 3, 1))
    return np.ascontiguousarray(tissue(1, 1300, 1300, channels_last=True)[0].permute(1, 2, 0).numpy())


def files_of(root: Path, name: str) -> list[Path]:
    """Every image of one of the sets of `root`, in order."""
    return sorted(path for path in (root / name).rglob("*") if path.suffix in (".png", ".jpg"))


def crops(root: Path, size: int = 224, least_tissue: int = 1000) -> Iterator[np.ndarray]:
    """The middle of every image of BreaKHis_mini that is large enough and has enough tissue in it."""
    for path in files_of(root, "BreaKHis_mini"):
        image = read(path)
        top, left = ((length - size) // 2 for length in image.shape[:2])
        crop = np.ascontiguousarray(image[max(top, 0) : top + size, max(left, 0) : left + size])
        tissue_pixels = (crop.max(axis=2) <= TISSUE_LEVEL).sum()
        if crop.shape == (size, size, 3) and tissue_pixels >= least_tissue:
            yield crop
