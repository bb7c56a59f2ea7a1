"""The race detector of the emulator: no access of the kernels is unordered, and planted races are found.

Barriers, fences and atomics are known to ThreadSanitizer by what they order, so one schedule shows what random ones
may never: see simt.h.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from emulator import build, missing_tools
from race_run import PLANTED

HERE = Path(__file__).resolve().parent
KERNELS = ("resident", "cluster", "streaming", "draw")
# A barrier of each plan left out: after the moments' sums, after the images' totals, and between counts and their use.
OMITTED = ("resident:10", "cluster:0", "streaming:2", "draw:0")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """How each case ended, and the end of what was printed."""
    if missing_tools():
        pytest.skip(missing_tools())
    tsan = subprocess.run(["g++", "-print-file-name=libtsan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(tsan).is_absolute():
        pytest.skip("libtsan is not installed")
    library = build(tmp_path_factory.mktemp("races"), "thread")
    environment = {
        **os.environ, "PYTHONPATH": str(HERE), "LD_PRELOAD": tsan, "OPENBLAS_NUM_THREADS": "1",
        "TSAN_OPTIONS": "halt_on_error=1 exitcode=66",
    }  # fmt: skip
    cases = [*KERNELS, *OMITTED, *(f"{name}={right}" for name in PLANTED for right in (0, 1))]
    command = [sys.executable, str(HERE / "race_run.py"), str(library), *cases]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(line.split(" ", 1) for line in done.stdout.splitlines()), done.stderr


@pytest.mark.parametrize("kernels", KERNELS)
def test_kernels_have_no_races(found, kernels):
    assert found[0][kernels] == "clean", found[1][:4000]


@pytest.mark.parametrize("case", OMITTED)
def test_a_barrier_that_orders_nothing_is_found(found, case):
    assert found[0][case] == "race"


@pytest.mark.parametrize("name", PLANTED)
def test_planted_races_are_found(found, name):
    assert found[0][f"{name}=1"] == "clean", found[1][:4000]
    if name == "early_exit":
        assert found[0]["early_exit=0"] == "exit code -6" and "rank 0, whose block has returned" in found[1]
    else:
        assert found[0][f"{name}=0"] == "race" and re.search(rf"SUMMARY: .* in {name}_kernel", found[1])
