"""A trained network, small enough for tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ernet_fast.train import Reporter, TrainConfig, fit


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small are slower with several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def trained(data: Path, out: Path, **changes: Any) -> Path:
    config = TrainConfig(
        data=str(data), out=str(out), base_channels=8, image_size=32, batch_size=8, epochs=1, device="cpu",
        magnifications=(200,), **changes,
    )  # fmt: skip
    fit(config, reporter=Reporter(quiet=True))
    return out


@pytest.fixture(scope="session")
def run_folder(tiny_breakhis: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one epoch at 200X, with stain normalisation."""
    return trained(tiny_breakhis, tmp_path_factory.mktemp("predict") / "run")


@pytest.fixture(scope="session")
def reinhard_folder(tiny_breakhis: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same by Reinhard's method."""
    return trained(tiny_breakhis, tmp_path_factory.mktemp("predict") / "reinhard", stain="reinhard")
