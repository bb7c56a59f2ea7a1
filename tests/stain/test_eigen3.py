"""The bound that ends the rotations of eigen3 changes no bit of what more of them give."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"


@pytest.mark.skipif(not CSRC.is_dir() or shutil.which("g++") is None, reason="needs the sources and g++")
@pytest.mark.parametrize("flags", [[], ["-march=native", "-ffp-contract=fast"]], ids=["separate", "fused"])
def test_stopping_early_changes_no_bit(tmp_path, flags):
    """Of 60,000 matrices of all kinds; and it leaves out a sweep and more of ordinary ones."""
    program = tmp_path / "eigen3_bits"
    source = HERE / "eigen3_bits.cpp"
    subprocess.run(["g++", "-std=c++17", "-O2", *flags, f"-I{CSRC}", str(source), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("0 wrong"), done.stdout
