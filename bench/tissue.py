"""Images that look like H&E to the arithmetic, for benches that need many and no pictures."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def tissue(count: int, height: int, width: int, channels_last: bool = False) -> Tensor:
    """Images of two stains in random amounts, uint8 [count, 3, height, width]."""
    rng = np.random.default_rng([count, height, width])
    amounts = rng.gamma(1.0, 0.5, (count, height, width, 2))
    od = amounts @ np.array([[0.65, 0.70, 0.29], [0.2, 0.9, 0.3]])
    images = torch.from_numpy(np.clip(240 * np.exp(-od), 0, 255).astype(np.uint8)).permute(0, 3, 1, 2)
    return images if channels_last else images.contiguous()
