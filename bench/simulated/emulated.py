"""The emulator of tests/simt for the simulated `python3 dev.py gpu`; `emulated.py FOLDER` builds all that it needs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "simt"))

import numpy as np
import torch
from agreement import Error, levels
from emulator import Emulator, build, missing_tools
from tissue import tissue

from ernet_fast.stain import MacenkoNormalizer, macenko_normalize

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "simt"


def emulator() -> Emulator:
    """The kernels, as built by the first step of the run."""
    library = FOLDER / "libernet_simt.so"
    if not library.exists():
        raise FileNotFoundError(f"{library}: the emulator is not built.")
    return Emulator(library)


def images_of(count: int, height: int, width: int) -> Any:
    """Tissue as a NumPy array [count, 3, height, width] uint8."""
    return np.ascontiguousarray(tissue(count, height, width).numpy())


PLANS = {"streaming": 1, "resident": 1, "cluster2": 2}  # name: blocks that share an image


def whole_call(images: Any, plan: str) -> Any:
    machine = emulator()
    chosen = machine.choose_plan(images, plan.rstrip("0123456789"), PLANS[plan])
    target = MacenkoNormalizer().target
    given = tuple(part.double().numpy() for part in target[:2])
    return machine.normalize(images, None if plan == "streaming" else chosen, given)[0]


def differences(found: Any, images: Any) -> Iterator[Error]:
    """From the CPU path."""
    expected = macenko_normalize(torch.from_numpy(images), MacenkoNormalizer().target)
    return levels("normalised images", torch.from_numpy(found), expected)


if __name__ == "__main__":
    reason = missing_tools()
    if reason is not None:
        sys.exit(f"the emulator cannot be built here: {reason}")
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    print(build(folder))
    if not (ROOT / "ernet_fast" / "libernet.so").exists():  # the CPU path, which the emulated kernels are compared with
        command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        sys.exit(subprocess.run(command, cwd=ROOT, env={"ERNET_CUDA": "0", **os.environ}, check=False).returncode)
