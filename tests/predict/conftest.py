"""A trained network, small enough for tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

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


@pytest.fixture(scope="session")
def run_folder(tiny_breakhis: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one epoch at 200X, with stain normalisation."""
    out = tmp_path_factory.mktemp("predict") / "run"
    config = TrainConfig(
        data=str(tiny_breakhis), out=str(out), base_channels=8, image_size=32, batch_size=8, epochs=1, device="cpu",
        magnifications=(200,),
    )  # fmt: skip
    fit(config, reporter=Reporter(quiet=True))
    return out
