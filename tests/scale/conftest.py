"""Small images, and one thread: the machine is shared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ernet_fast.data.synthetic import generate_patch


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def write_patch() -> Callable[..., Path]:
    """Write a synthetic tissue image; `size` is height and width, the rest are options of Pillow's `save`."""

    def write(path: Path, seed: int = 0, size: tuple[int, int] = (40, 48), **options: object) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = generate_patch("DC", size=size, seed=seed).image.transpose(1, 2, 0)
        Image.fromarray(np.ascontiguousarray(pixels)).save(path, **options)
        return path

    return write
