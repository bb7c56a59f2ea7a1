"""The CPU loops of every instruction set, against plain sums and sorting, under AddressSanitizer and
UndefinedBehaviorSanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
ISAS = {"portable": [], "avx2": ["-march=x86-64-v3"], "avx512": ["-march=x86-64-v4"]}
ISAS["avx512vbmi"] = [*ISAS["avx512"], "-mavx512vbmi", "-mavx512vbmi2", "-mavx512vnni"]
MACENKO = CSRC / "macenko" / "cpu"
DRIVERS = [MACENKO / f"{name}.cpp" for name in ("colour_counts", "image", "levels", "network_input", "percentiles")]
TORCH = Path(torch.__file__).parent / "include"  # its types of 16 bits
COMPILE = [
    *(["ccache"] if shutil.which("ccache") else []),  # paths below ROOT: another folder's objects are as good
    "g++",
    "-O1",
    "-std=c++17",
    "-Icsrc",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
]


def may_run(isa: str) -> bool:
    """False if this CPU certainly cannot: what it cannot run need not be compiled."""
    cpu = Path("/proc/cpuinfo")
    return (
        not cpu.exists()
        or {"portable": "sse2", "avx512": "avx512bw", "avx512vbmi": "avx512_vbmi"}.get(isa, isa)
        in cpu.read_text().split()
    )


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> tuple[Path, list[str]]:
    """The loops of this machine's instruction sets, and the checks, as one program."""
    if shutil.which("g++") is None or not CSRC.is_dir():
        pytest.skip("needs g++ and the C++ sources")
    folder = tmp_path_factory.mktemp("sanitized")
    machine = subprocess.run(["g++", "-dumpmachine"], capture_output=True, text=True).stdout
    isas = [isa for isa in ISAS if machine.startswith("x86_64") and may_run(isa)] or ["portable"]
    jobs = [
        (loops, f"{loops.stem}.{isa}.o", [f"-DERNET_ISA={isa}", *ISAS[isa]])
        for isa in isas
        for loops in sorted((MACENKO / "simd").glob("*.cpp"))
    ]
    sources = [
        *DRIVERS,
        CSRC / "memory" / "output_cache.cpp",
        CSRC / "simd" / "isa.cpp",
        HERE / "sanitized_loops.cpp",
        HERE / "exact_loops.cpp",
    ]
    flags = ["-ffp-contract=off", *(f"-DERNET_HAS_{isa.upper()}" for isa in isas)]  # as setup.py has them compiled
    flags += ["-isystem", str(TORCH)]
    jobs += [(source, f"{source.stem}.o", flags) for source in sources]

    def build(job: tuple[Path, str, list[str]]) -> str:
        source, name, flags = job
        command = [*COMPILE, *flags, "-c", str(source.relative_to(ROOT)), "-o", str(folder / name)]
        subprocess.run(command, cwd=ROOT, check=True)
        return str(folder / name)

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        objects = list(threads.map(build, jobs))
    subprocess.run([*COMPILE, *objects, "-o", str(folder / "loops")], check=True)
    return folder / "loops", isas


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
def test_loops_are_clean_under_sanitizers(program, isa):
    path, isas = program
    if isa not in isas:
        pytest.skip(f"this CPU has no {isa}")
    done = subprocess.run([path], env={**os.environ, "ERNET_ISA": isa}, capture_output=True, text=True)
    if "this CPU or this build does not have it" in done.stderr:
        pytest.skip(f"this CPU has no {isa}")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
