"""Small batches [B, 3, H, W] for the emulator, which takes microseconds a pixel."""

from __future__ import annotations

import numpy as np
from stain_images import synthetic_tissue


def stack(*images):
    return np.ascontiguousarray(np.stack(images).transpose(0, 3, 1, 2))


def channels_last(images):
    return np.ascontiguousarray(images.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)


def tissue(height, width, count):
    return stack(*(synthetic_tissue(height, width, seed) for seed in range(count)))


def degenerate():
    """One image of every kind that cannot be fitted or strains the selection, with one ordinary one among them."""
    size = (24, 20, 3)
    noise = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    two = np.where(np.arange(20)[None, :, None] < 7, np.uint8((90, 40, 130)), np.uint8((180, 90, 170)))
    one_tissue_pixel = np.full(size, 255, np.uint8)
    one_tissue_pixel[3, 4] = (100, 50, 120)
    nine = np.full(size, 255, np.uint8)
    nine[5, :9] = noise[5, :9] // 2
    return stack(
        np.full(size, 255, np.uint8),
        np.zeros(size, np.uint8),
        np.full(size, (100, 50, 120), np.uint8),
        noise,
        np.broadcast_to(two, size),
        one_tissue_pixel,
        nine,
        synthetic_tissue(24, 20, 5),
        np.repeat(noise[:, :1], 20, axis=1),
    )
