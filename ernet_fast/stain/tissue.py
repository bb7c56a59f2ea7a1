"""Which pixels are tissue: those whose optical densities -ln((I + 1) / Io) are all at least beta."""

from __future__ import annotations

import numpy as np

_BLOCK = 3 << 14  # bytes that are looked at together: they stay in the first caches


class Tissue:
    """Tells tissue from background in 8-bit images.

    Attributes:
        level: the brightest grey level of tissue; -1 if there is none.
    """

    def __init__(self, Io: float = 240, beta: float = 0.15) -> None:
        levels = np.arange(256)
        dense = -np.log((levels + 1) / Io) >= beta
        self.level = int(levels[dense].max()) if dense.any() else -1

    def mask(self, image: np.ndarray) -> np.ndarray:
        """Booleans [H, W] of an image uint8 [H, W, 3]."""
        return np.maximum(np.maximum(image[..., 0], image[..., 1]), image[..., 2]) <= self.level

    def count(self, image: np.ndarray) -> int:
        """How many pixels of an image uint8 [H, W, 3] are tissue."""
        if not image.flags.c_contiguous:
            return int(np.count_nonzero(self.mask(image)))
        flat, found = image.reshape(-1), 0
        for begin in range(0, flat.size, _BLOCK):  # three neighbours at a time are faster than three channels
            bright = flat[begin : begin + _BLOCK] > self.level
            beyond = bright[:-2] | bright[1:-1]
            beyond |= bright[2:]
            found += bright.size // 3 - int(np.count_nonzero(beyond[::3]))
        return found

    def share(self, image: np.ndarray) -> float:
        """The share of tissue among the pixels of an image uint8 [H, W, 3]."""
        return self.count(image) / max(1, image.size // 3)
