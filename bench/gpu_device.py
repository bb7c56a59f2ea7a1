"""What `python3 dev.py gpu` runs on: the device at hand, or the emulator of the tests in its place."""

from __future__ import annotations

import os
import re
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from machine import ROOT, describe

MARKED = re.compile(r"^(pytestmark = .*|@)pytest\.mark\.gpu", re.M)
SIMULATED = ROOT / "bench" / "simulated"


@dataclass(frozen=True)
class GpuDevice:
    """The device, the folder of its cases, and how to build for it and test on it."""

    machine: dict[str, Any]
    folder: Path
    build: list[str]
    tests: list[str]
    sanitizer: str | None = None
    build_environment: dict[str, str] = field(default_factory=dict)


def marked_tests(folder: Path = ROOT / "tests") -> list[str]:
    """The files with tests marked `gpu`: the others may import what is not installed beside the device's torch."""
    return sorted(str(path) for path in folder.rglob("test_*.py") if MARKED.search(path.read_text()))


def device_at_hand() -> GpuDevice:
    """The CUDA device that torch sees first."""
    known = shutil.which("compute-sanitizer")
    beside = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "compute-sanitizer"
    return GpuDevice(
        machine=describe("gpu"),
        folder=ROOT / "bench",
        build=[sys.executable, "setup.py", "build_ext", "--inplace"],
        tests=["-m", "gpu", *marked_tests()],
        sanitizer=known or (str(beside) if beside.exists() else None),
        build_environment={"ERNET_CUDA": "1"},
    )


def emulator(folder: Path = SIMULATED) -> GpuDevice:
    """The kernels run on the CPU: shows that the flow works, and says nothing about any GPU."""
    return GpuDevice(
        machine=describe("gpu-simulated") | {"name": "simulated-gpu"},
        folder=folder,
        build=[sys.executable, str(SIMULATED / "emulated.py"), str(ROOT / "build" / "simt")],
        tests=["tests/simt/test_emulator.py"],
    )
