"""The code of arm64, on any machine with Debian's cross compiler and emulator (g++-aarch64-linux-gnu, qemu-user): the
commands of setup.py compile it without warnings, loops compute with NEON, and the checks of the loops pass emulated."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
CROSS, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
TORCH = Path(torch.__file__).parent / "include"  # its types of 16 bits
MACENKO_CHECKS = [ROOT / "tests" / "stain" / f"{name}_loops.cpp" for name in ("sanitized", "exact")]
ER_CHECKS = [Path(__file__).parent / "er_loops.cpp"]
# What setup.py would do on a machine of arm64.
WRITE_SCRIPT = """
import platform, runpy, setuptools, sys
from pathlib import Path
platform.machine = lambda: "aarch64"
setuptools.setup = lambda **arguments: None
folder = Path(sys.argv[1])
script = runpy.run_path("setup.py")["NinjaScript"](folder, folder / "libernet.so", "0")
(folder / "build.ninja").write_text(script.text())
"""


def missing() -> str | None:
    """What is not installed here and how to get it."""
    packages = {"g++": "g++", CROSS: "g++-aarch64-linux-gnu", EMULATOR: "qemu-user"}
    return next((f"needs {name}: install {packages[name]}" for name in packages if shutil.which(name) is None), None)


needs_emulator = pytest.mark.skipif(missing() is not None, reason=str(missing()))


def ninja_script(folder: Path, compiler: str) -> str:
    environment = {**os.environ, "CXX": compiler, "ERNET_CUDA": "0", "ERNET_WERROR": "1"}
    subprocess.run([sys.executable, "-c", WRITE_SCRIPT, str(folder)], cwd=ROOT, env=environment, check=True)
    return (folder / "build.ninja").read_text()


@pytest.fixture(scope="module")
def objects(tmp_path_factory) -> dict[str, Path]:
    """By name, the objects that need nothing of torch's library, compiled as setup.py has them compiled."""
    pytest.importorskip("ninja")
    folder = tmp_path_factory.mktemp("arm64")
    script = ninja_script(folder, f"ccache {CROSS}" if shutil.which("ccache") else CROSS)
    made = [Path(path) for path in re.findall(r"^build (\S+\.o): cxx", script, re.MULTILINE)]
    wanted = {path.name: path for path in made if not re.search(r"_ops\.|^library\.", path.name)}
    ninja = [sys.executable, "-m", "ninja", "-f", str(folder / "build.ninja"), "--quiet"]
    done = subprocess.run([*ninja, *map(str, wanted.values())], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return wanted


def compiled(compiler: str, sources: list[Path], objects: list[Path], program: Path) -> Path:
    """The program of `sources`, whose own code is not what is tested, and `objects`."""
    flags = [
        "-O1",
        "-std=c++17",
        "-static",
        "-ffp-contract=off",
        "-DERNET_ISA=portable",
        f"-I{ROOT / 'csrc'}",
        "-isystem",
        str(TORCH),
    ]
    subprocess.run([compiler, *flags, *map(str, [*sources, *objects]), "-o", str(program)], check=True)
    return program


def test_setup_has_no_flags_of_another_processor(tmp_path):
    script = ninja_script(tmp_path, os.environ.get("CXX", "c++"))
    assert not re.search(r"\s-m\S+", script) and "avx" not in re.sub(r"\S*_vbmi\S*|ERNET_HAS_\w+", "", script)
    assert 'ERNET_ISA_VARIANTS="portable"' in script and "-DERNET_HAS_AVX2" not in script


@needs_emulator
@pytest.mark.slow
def test_loops_on_maps_compute_with_vectors(objects):
    """Products and sums of whole vectors, of all types, and float16 converted four at a time."""
    loops = str(objects["er_simd_weighted_sum_planar.cpp.portable.o"])
    code = subprocess.run([CROSS.replace("g++", "objdump"), "-d", loops], capture_output=True, text=True).stdout
    assert len(re.findall(r"\sfmla\s+v\d+\.4s", code)) > 300 and len(re.findall(r"\sfmla\s+v\d+\.2d", code)) > 100
    assert re.search(r"\sfcvtl\s", code) and re.search(r"\sfcvtn\s", code) and not re.search(r"\sfcvt\s+s\d+, h", code)
    assert not re.search(r"\s(fmadd|fmul|fadd)\s+[sd]\d", code)


@needs_emulator
@pytest.mark.slow
def test_loops_on_maps(objects, tmp_path):
    """Sums and inner products of small integers, which are exact on every processor."""
    parts = [path for name, path in objects.items() if name.startswith(("er_", "simd_"))]
    program = compiled(CROSS, ER_CHECKS, parts, tmp_path / "er")
    done = subprocess.run([EMULATOR, program], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "wrong 0"), done.stdout + done.stderr


@needs_emulator
@pytest.mark.slow
def test_macenko_loops(objects, tmp_path):
    """Against plain sums and sorting, a few images of those of the test with sanitizers."""
    parts = [path for name, path in objects.items() if not name.startswith(("er_", "conv_"))]
    program = compiled(CROSS, MACENKO_CHECKS, parts, tmp_path / "macenko")
    done = subprocess.run([EMULATOR, program, "few"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_emulator
def test_same_bits_as_on_this_processor(tmp_path):
    source = [Path(__file__).parent / "same_bits.cpp"]
    printed = [
        subprocess.run(
            [*emulator, compiled(compiler, source, [], tmp_path / name)], capture_output=True, text=True, check=True
        ).stdout
        for name, compiler, emulator in (("here", "g++", []), ("there", CROSS, [EMULATOR]))
    ]
    assert printed[0] == printed[1] and len(printed[0].splitlines()) > 7000
