"""Runs the Triton kernels in Triton's interpreter, on the CPU: see interpreted_*.py for the cases."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

CASES = {
    "interpreted_triton.py": 115,
    "interpreted_coefficients.py": 80,
    "interpreted_stage.py": 21,
    "interpreted_large_maps.py": 8,
}
"""Files of tests, and how many each must at least hold."""
ROOT = Path(__file__).resolve().parent.parent.parent

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_kernels_in_the_interpreter(name):
    """In a process of its own: TRITON_INTERPRET must be set before the kernels are imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        str(Path(__file__).with_name(name)),
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0 and passed and int(passed[1]) >= CASES[name], done.stdout[-6000:] + done.stderr[-2000:]
