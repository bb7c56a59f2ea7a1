"""Runs small enough for tests. Makes same_state importable: tests are collected with importmode=importlib."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ernet_fast.train import Reporter, TrainConfig

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small are slower with several threads, much so on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make_config(tiny_breakhis: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """A configuration of a narrow network on 32x32 pixels; keyword arguments change it, `out` is a name below
    tmp_path.
    """

    def make(out: str = "run", **changes: Any) -> TrainConfig:
        settings: dict[str, Any] = {
            "data": str(tiny_breakhis),
            "out": str(tmp_path / out),
            "base_channels": 8,
            "image_size": 32,
            "epochs": 2,
            "batch_size": 8,
            "device": "cpu",
        }
        return TrainConfig(**(settings | changes))

    return make


@pytest.fixture
def quiet() -> Reporter:
    return Reporter(quiet=True)
