"""Tests of the tester: the emulator has to find planted errors."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from emulator import build, missing_tools, pointer

HERE = Path(__file__).resolve().parent


def rotate(library, seed, with_barrier):
    threads = 96
    lib = ctypes.CDLL(str(library))
    lib.simt_seed(ctypes.c_uint64(seed))
    values, out = np.arange(1, threads + 1, dtype=np.int32), np.zeros(threads, np.int32)
    lib.planted_rotate(pointer(values), pointer(out), threads, int(with_barrier))
    return np.array_equal(out, np.roll(values, -1))


def test_a_missing_barrier_shows_and_a_present_one_works(simt_library):
    assert all(rotate(simt_library, seed, True) for seed in range(5))
    assert not any(rotate(simt_library, seed, False) for seed in range(5))


def run(library, case, preload="", **environment):
    env = {**os.environ, "PYTHONPATH": str(HERE), "LD_PRELOAD": preload, **environment}
    command = [sys.executable, str(HERE / "sanitized_run.py"), str(library), case]
    return subprocess.run(command, env=env, capture_output=True, text=True)


def test_a_deadlock_ends_with_a_message(simt_library):
    script = f"import ctypes; ctypes.CDLL({str(simt_library)!r}).planted_split_barrier((ctypes.c_int * 64)())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode != 0 and "deadlock" in done.stderr


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    if missing_tools():
        pytest.skip(missing_tools())
    asan = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(asan).is_absolute():
        pytest.skip("libasan is not installed")
    library = build(tmp_path_factory.mktemp("sanitized"), "address,undefined")

    def run_case(case):
        # Python's own allocations are not of interest, and numpy arrays need malloc's red zones.
        return run(library, case, preload=asan, ASAN_OPTIONS="detect_leaks=0", PYTHONMALLOC="malloc")

    return run_case


@pytest.mark.slow
def test_kernels_are_clean_under_sanitizers(sanitized):
    done = sanitized("kernels")
    assert done.returncode == 0 and "finished" in done.stdout, done.stderr[-4000:]


def test_a_read_past_the_end_is_found(sanitized):
    done = sanitized("overread")
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr, done.stderr[-2000:]
