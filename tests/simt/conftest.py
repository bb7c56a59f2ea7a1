"""Paths of the emulator and of the image generator, and the built emulator."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "stain"), str(HERE.parents[1] / ".ci")]


@pytest.fixture(scope="session")
def simt_library(tmp_path_factory):
    from emulator import build, missing_tools

    reason = missing_tools()
    if reason:
        pytest.skip(reason)
    return build(tmp_path_factory.mktemp("simt"))
