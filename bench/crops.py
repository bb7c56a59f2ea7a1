"""Crops of 224 x 224 to measure on where the data is not: `python3 bench/crops.py FILE.npz` writes 64 different ones.

Real ones where `macenko_images.py` finds real images, else generated tissue. `python3 dev.py gpu --crops FILE.npz` uses
them.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

SIZE, COUNT = "224x224", 64


class Crops(NamedTuple):
    """Different images, uint8 [N, 3, 224, 224], and in words where they are from."""

    images: Tensor
    origin: str


def save(path: Path, count: int = COUNT) -> str:
    """Write `count` crops; returns where they are from."""
    from macenko_images import different_images

    arrays, origin = different_images(SIZE, count)
    np.savez_compressed(path, images=np.stack(arrays), origin=np.array(origin))
    return origin


def given_crops() -> Crops | None:
    """Those of the file that $ERNET_CROPS names, if it names one."""
    path = os.environ.get("ERNET_CROPS")
    if not path:
        return None
    with np.load(path) as file:
        images = torch.from_numpy(file["images"]).permute(0, 3, 1, 2).contiguous()
        return Crops(images, str(file["origin"]))


if __name__ == "__main__":
    print(save(Path(sys.argv[1])))
