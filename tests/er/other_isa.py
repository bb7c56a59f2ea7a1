"""Runs tests of a file again in a process whose loops are those of another instruction set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ernet_fast import _backend

ISAS = ["portable", "avx2", "avx512"]
_START = """
import importlib.util, sys
sys.path.insert(0, {folder!r})
from ernet_fast import _backend
assert _backend.build_info()["isa"] == {isa!r}
spec = importlib.util.spec_from_file_location("tests_again", {file!r})
tests = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tests)
"""


def run_on(isa: str, file: str, code: str) -> None:
    """Run `code`, which finds the module `file` as `tests`; skip the test where the CPU or the build has no `isa`."""
    info = _backend.build_info()
    if info is None or isa not in info["isa_variants"]:
        pytest.skip(f"{isa} is not compiled in")
    order = [*ISAS, "avx512vbmi"]
    if order.index(isa) > order.index(info["isa"]) and not os.environ.get("ERNET_ISA"):
        pytest.skip(f"this CPU has no {isa}")
    root = Path(__file__).resolve().parent.parent.parent
    environment = {**os.environ, "ERNET_ISA": isa, "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    start = _START.format(folder=str(Path(file).resolve().parent), isa=isa, file=file)
    whole = f"{start}\n{code}\nprint('as expected')\n"
    done = subprocess.run([sys.executable, "-c", whole], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "as expected", done.stdout + done.stderr
