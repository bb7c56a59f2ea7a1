"""Images for the Macenko benches: real H&E where the data is, else noise around two stains."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

SIZES = {"64x64": (64, 64), "224x224": (224, 224), "700x460": (460, 700), "1024x1024": (1024, 1024)}
"""Height and width by the name of a size, which is width x height."""
TISSUE_LEVEL = 205  # (I + 1) / 240 <= exp(-0.15)


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
    rng = np.random.default_rng(0)
    amounts = rng.gamma(1.0, 0.5, (1300, 1300, 2))
    od = amounts @ np.array([[0.65, 0.70, 0.29], [0.2, 0.9, 0.3]])
    return np.clip(240 * np.exp(-od), 0, 255).astype(np.uint8)


def files_of(root: Path, name: str) -> list[Path]:
    """Every image of one of the sets of `root`, in order."""
    return sorted(path for path in (root / name).rglob("*") if path.suffix in (".png", ".jpg"))


def tissue_pixels(image: np.ndarray) -> int:
    """Pixels whose three optical densities are at least 0.15."""
    return int((image.max(axis=2) <= TISSUE_LEVEL).sum())


def crops(root: Path, size: int = 224, least_tissue: int = 1000) -> Iterator[np.ndarray]:
    """The middle of every image of BreaKHis_mini that is large enough and has enough tissue in it."""
    for path in files_of(root, "BreaKHis_mini"):
        image = read(path)
        top, left = ((length - size) // 2 for length in image.shape[:2])
        crop = np.ascontiguousarray(image[max(top, 0) : top + size, max(left, 0) : left + size])
        if crop.shape == (size, size, 3) and tissue_pixels(crop) >= least_tissue:
            yield crop
