"""The CPU loops of every instruction set, against plain sums and sorting, under AddressSanitizer and
UndefinedBehaviorSanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
ISAS = {"portable": [], "avx2": ["-march=x86-64-v3"], "avx512": ["-march=x86-64-v4"]}
ISAS["avx512vbmi"] = [*ISAS["avx512"], "-mavx512vbmi", "-mavx512vbmi2", "-mavx512vnni"]


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
def test_loops_are_clean_under_sanitizers(isa, tmp_path):
    if shutil.which("g++") is None or not CSRC.is_dir():
        pytest.skip("needs g++ and the C++ sources")
    common = ["g++", "-O1", "-std=c++17", f"-I{CSRC}", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    machine = subprocess.run(["g++", "-dumpmachine"], capture_output=True, text=True).stdout
    if isa != "portable" and not machine.startswith("x86_64"):
        pytest.skip("an instruction set of x86-64")
    # The portable loops are always there; the others are compiled beside them.
    variants = ["portable"] if isa == "portable" else ["portable", isa]
    objects, defined = [], []
    for variant in variants:
        for source in sorted((CSRC / "cpu").glob("macenko_*loops.cpp")):
            objects.append(str(tmp_path / f"{source.stem}.{variant}.o"))
            flags = [f"-DERNET_ISA={variant}", *ISAS[variant]]
            subprocess.run([*common, *flags, "-c", str(source), "-o", objects[-1]], check=True)
        defined.append(f"-DERNET_HAS_{variant.upper()}")
    rest = [
        str(CSRC / "cpu" / name)
        for name in ("macenko_colours.cpp", "macenko_image.cpp", "macenko_scaled.cpp", "macenko_select.cpp", "isa.cpp")
    ]
    program = str(tmp_path / "loops")
    programs = [str(HERE / "sanitized_loops.cpp"), str(HERE / "exact_loops.cpp")]
    subprocess.run([*common, *defined, *rest, *programs, *objects, "-o", program], check=True)
    done = subprocess.run([program], env={**os.environ, "ERNET_ISA": isa}, capture_output=True, text=True)
    if "this CPU or this build does not have it" in done.stderr:
        pytest.skip(f"this CPU has no {isa}")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
