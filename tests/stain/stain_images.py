"""Images for the stain tests: real ones where the data is, and synthetic tissue everywhere."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

HAEMATOXYLIN = np.array([0.65, 0.70, 0.29])
EOSIN = np.array([0.07, 0.99, 0.11])


def data_root() -> Path | None:
    """The folder of real images: $ERNET_TEST_DATA, else ../shared/data beside the repository."""
    given = os.environ.get("ERNET_TEST_DATA")
    root = Path(given) if given else Path(__file__).resolve().parents[3] / "shared" / "data"
    return root if root.is_dir() else None


def real_images() -> list[Path]:
    """Every BreakHis image of the tiny set and the torchstain pair; empty without the data."""
    root = data_root()
    if root is None:
        return []
    found = [p for p in (root / "BreaKHis_tiny").rglob("*") if p.suffix in (".png", ".jpg")]
    return sorted(found) + sorted((root / "torchstain").glob("*.png"))


def real_parameters() -> list:
    """One parameter a real image, or one skipped parameter that says what is missing."""
    paths = real_images()
    if paths:
        return [pytest.param(path, id=path.stem) for path in paths]
    reason = "no real images: set ERNET_TEST_DATA to a folder with BreaKHis_tiny/ and torchstain/"
    return [pytest.param(None, id="real", marks=pytest.mark.skip(reason=reason))]


def synthetic_parameters() -> list:
    """Sizes (height, width, seed) of synthetic tissue, none a multiple of anything."""
    sizes = [(64, 64), (97, 51), (128, 200), (33, 257), (41, 25)]
    return [pytest.param((height, width, seed), id=f"{height}x{width}") for seed, (height, width) in enumerate(sizes)]


def load(parameter: Path | tuple[int, int, int]) -> np.ndarray:
    """The image [H, W, 3] uint8 of a parameter of either list."""
    if isinstance(parameter, tuple):
        return synthetic_tissue(*parameter)
    image = pytest.importorskip("PIL.Image", reason="Pillow reads the real images").open(parameter)
    return np.array(image)[..., :3].copy()  # the torchstain pair has an alpha channel


def synthetic_tissue(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Nuclei on stroma with a bright gap, by Beer-Lambert with noise, [H, W, 3] uint8."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    nuclei = np.zeros((height, width))
    for _ in range(max(4, height * width // 250)):
        centre = rng.uniform(0, height), rng.uniform(0, width)
        radius = rng.uniform(1.5, 4.5)
        nuclei = np.maximum(nuclei, np.exp(-((((y - centre[0]) ** 2 + (x - centre[1]) ** 2) / radius**2) ** 2)))
    fibres = 0.5 + 0.4 * np.sin(y / rng.uniform(3, 9) + 2 * np.sin(x / rng.uniform(5, 15)))
    gap = (x + 0.3 * y > 1.05 * width) * 1.0
    h = rng.uniform(1.0, 1.8) * nuclei * rng.uniform(0.7, 1.0, nuclei.shape)
    e = rng.uniform(0.5, 1.0) * fibres * (1 - 0.6 * nuclei)
    od = (h[..., None] * HAEMATOXYLIN + e[..., None] * EOSIN) * (1 - gap[..., None])
    od += rng.normal(0, 0.015, od.shape)
    return np.clip(240 * np.exp(-od), 0, 255).astype(np.uint8)


def batch(*images: np.ndarray) -> torch.Tensor:
    """Images [H, W, 3] of one size as a contiguous tensor [B, 3, H, W]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
