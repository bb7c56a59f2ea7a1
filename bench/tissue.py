"""Images that look like H&E to the arithmetic, for benches that need many and no pictures."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

HAEMATOXYLIN, EOSIN = np.array([0.65, 0.70, 0.29]), np.array([0.14, 0.95, 0.20])


def tissue(count: int, height: int, width: int, channels_last: bool = False) -> Tensor:
    """Images of two stains in random amounts, uint8 [count, 3, height, width]."""
    rng = np.random.default_rng([count, height, width])
    amounts = rng.gamma(1.0, 0.5, (count, height, width, 2))
    od = amounts @ np.array([[0.65, 0.70, 0.29], [0.2, 0.9, 0.3]])
    images = torch.from_numpy(np.clip(240 * np.exp(-od), 0, 255).astype(np.uint8)).permute(0, 3, 1, 2)
    return images if channels_last else images.contiguous()


def varied_tissue(seed: int, height: int, width: int, tissue_share: float | None = None) -> np.ndarray:
    """One image [H, W, 3] uint8 of nuclei, stroma and background: stains, density, shares and noise of its own.

    Args:
        seed: two images of one size differ in everything.
        tissue_share: of the pixels; None draws from 30 to 100 %.
    """
    rng = np.random.default_rng([seed, height, width])
    stains = np.stack([vector + rng.normal(0, 0.05, 3) for vector in (HAEMATOXYLIN, EOSIN)]).clip(0.02)
    stains /= np.linalg.norm(stains, axis=1, keepdims=True)
    share = rng.uniform(0.3, 1.0) if tissue_share is None else tissue_share
    regions, stroma = _smooth(rng, height, width, 60), _smooth(rng, height, width, 12).clip(0, 1)
    nuclei = _smooth(rng, height, width, 5)
    nuclei = np.clip(4 * (nuclei - np.quantile(nuclei, rng.uniform(0.6, 0.9))), 0, 1)
    covered = regions <= np.quantile(regions, share)
    concentrations = np.stack([
        rng.uniform(0.8, 2.2) * nuclei + 0.1 * stroma, rng.uniform(0.4, 1.4) * (0.4 + stroma) * (1 - 0.6 * nuclei)
    ], axis=2) * covered[..., None]  # fmt: skip
    intensity = rng.uniform(232, 245) * np.exp(-concentrations.astype(np.float32) @ stains.astype(np.float32))
    intensity += np.float32(rng.uniform(0.5, 4)) * rng.standard_normal(intensity.shape, dtype=np.float32)
    return np.clip(intensity, 0, 255).astype(np.uint8)


def _smooth(rng: np.random.Generator, height: int, width: int, grain: int) -> np.ndarray:
    """A random field [height, width] of about 0 to 1 that changes over `grain` pixels."""
    coarse = rng.random((1, 1, height // grain + 3, width // grain + 3), dtype=np.float32)
    return interpolate(torch.from_numpy(coarse), size=(height, width), mode="bicubic")[0, 0].numpy()
