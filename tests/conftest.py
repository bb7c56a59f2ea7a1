"""Fixtures of all tests: devices, real images, uninitialised memory that shows."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ernet_fast import _backend

ROOT = Path(__file__).resolve().parent.parent

for name in [name for name in os.environ if name.startswith("PYTEST_XDIST")]:
    del os.environ[name]  # a pytest that a test starts is no worker of this one: its benches would be disabled


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with a test marked `slow` come first, so that several processes end together (see dev.py); tests marked
    `gpu` are skipped where there is no CUDA device."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):  # keywords would hold the names of folders too
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Uninitialised floating tensors hold NaN (and integers a large number), so that an element never written shows."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    before, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    extension = _backend.extension()
    if extension is not None:
        extension.poison_map_buffers(True)
    yield
    torch.use_deterministic_algorithms(before, warn_only=warn_only)


@pytest.fixture(scope="session")
def real_images() -> Path:
    """The folder of real H&E images: $ERNET_TEST_DATA, or shared/data beside the repository."""
    named = os.environ.get("ERNET_TEST_DATA")
    folder = Path(named) if named else ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        if named:
            pytest.fail(f"ERNET_TEST_DATA={named} is no folder")
        pytest.skip("no real H&E images here: set ERNET_TEST_DATA to a folder that holds BreaKHis_tiny")
    return folder


@pytest.fixture(scope="session")
def tiny_breakhis(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic data set in the BreakHis layout: 16 patients, 64 images of 64x64 at 100X and 200X."""
    from ernet_fast.data.synthetic import write_breakhis_like

    root = tmp_path_factory.mktemp("tiny_breakhis")
    return write_breakhis_like(root, patients=16, patches_per_patient=2, magnifications=(100, 200), size=(64, 64))
