#!/usr/bin/env python3
"""One command for everything a developer does: `python3 dev.py demo | test | build | bench | report | lint | ...`.

Needs Python >= 3.10 and a C++ compiler; standard library only. The interpreter that runs it is used as it is if it has
torch >= 2.11 and the test packages; else a virtual environment `.venv` is made from requirements-dev.txt, once.

    demo  [ARGS]   set up, build, and run `ernet-fast demo` (see `python3 dev.py demo --help`)
    test  [ARGS]   set up, build, and run the tests, in as many processes as there are cores, at most 4 (-n 0: in this
                   one); ARGS go to pytest
    build          set up and build the extension in place
    bench [ARGS]   set up, build, and run the benches into bench/results/; --compare REV, --history: see --help
    report [ARGS]  bring the tables of README.md and docs/ into step with bench/results/; --check only looks
    lint           ruff, clang-format, mypy
    kernels        build the CUDA code for every architecture and check registers, stack and spills of each kernel
    gpu   [ARGS]   on a machine with an NVIDIA GPU: build for it, test every kernel on it, record what was found

Environment: ERNET_VENV (folder of the virtual environment, default .venv); ERNET_CUDA, ERNET_CUDA_ARCHS, MAX_JOBS (see
setup.py). Without a GPU, `demo`, `test` and `bench` build no GPU code unless one of the two is set.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent
REQUIREMENTS = ROOT / "requirements-dev.txt"
COMMANDS = ("demo", "test", "build", "bench", "report", "lint", "kernels", "gpu")
# What each command needs of an interpreter that is used as it is. torchstain, hypothesis and the like are looked for by
# the tests themselves.
BUILD = ("torch", "numpy", "pybind11", "ninja", "setuptools")
TRAIN = ("lightning_fabric", "torchmetrics", "matplotlib", "PIL", "rich")
NEEDS = {
    "build": BUILD,
    "gpu": ("torch", "numpy", "setuptools"),
    "gpu --simulate": (*BUILD, "pytest"),
    "demo": (*BUILD, *TRAIN, "skimage"),
    "test": (*BUILD, *TRAIN, "pytest", "pytest_benchmark", "hypothesis"),
    "bench": (*BUILD, "pytest", "pytest_benchmark"),
    "report": (*BUILD, "matplotlib"),
    "lint": (*BUILD, "ruff", "mypy", "clang_format"),
    "kernels": (*BUILD, "triton"),
}


def torch_is_new_enough() -> bool:
    """True if the torch of this interpreter is 2.11 or later."""
    try:
        major, minor = metadata.version("torch").split(".")[:2]
    except metadata.PackageNotFoundError:
        return False
    return (int(major), int(minor)) >= (2, 11)


def missing(command: str) -> list[str]:
    """The packages that `command` needs and this interpreter lacks."""
    lacking = [name for name in NEEDS[command] if importlib.util.find_spec(name) is None]
    if "torch" not in lacking and not torch_is_new_enough():
        lacking.append("torch>=2.11")
    return lacking


def venv_folder() -> Path:
    """Where the virtual environment is, or will be."""
    return Path(os.environ.get("ERNET_VENV", ROOT / ".venv")).resolve()


def make_venv() -> Path:
    """Make the virtual environment, or bring it up to date; returns its Python."""
    folder = venv_folder()
    python = folder / "bin" / "python"
    stamp = folder / "requirements.sha256"
    wanted = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()
    if python.exists() and stamp.exists() and stamp.read_text() == wanted:
        return python
    print(f"Setting up {folder} from {REQUIREMENTS.name} (once; torch is large)", flush=True)
    if not python.exists():
        run([sys.executable, "-m", "venv", str(folder)], "making a virtual environment (is python3-venv installed?)")
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    first = next(line for line in REQUIREMENTS.read_text().splitlines() if line.startswith("torch=="))
    run([*pip, first], f"installing {first}")
    run([*pip, "-r", str(REQUIREMENTS)], f"installing {REQUIREMENTS.name}")
    stamp.write_text(wanted)
    return python


def run(command: Sequence[str], doing: str, environment: dict[str, str] | None = None) -> None:
    """Run a command; end with its exit code and what was being done if it fails."""
    code = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
    if code:
        print(f"dev.py: failed while {doing} (exit code {code}).", file=sys.stderr)
        raise SystemExit(code if code > 0 else 1)


def project_environment() -> dict[str, str]:
    """The environment in which the package is found in place."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def gpu_present() -> bool:
    """True if the NVIDIA driver is here and sees a device."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int()
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def choose_python(command: str) -> str:
    """The interpreter for `command`: this one where it has what is needed, else that of the virtual environment."""
    lacking = missing(command)
    if not lacking:
        return sys.executable
    if command == "gpu":
        raise SystemExit(f"dev.py gpu uses this interpreter's own torch; {sys.executable} lacks {', '.join(lacking)}.")
    return str(make_venv())


def what_to_build(command: str) -> dict[str, str]:
    """Variables for setup.py: code for GPUs takes minutes, and is left out where none could run it and nobody asks."""
    asked = command in ("build", "kernels") or {"ERNET_CUDA", "ERNET_CUDA_ARCHS"} & {*os.environ}
    return {} if asked or gpu_present() else {"ERNET_CUDA": "0"}


def build(python: str, environment: dict[str, str]) -> None:
    """Build the extension in place; does nothing where nothing has changed."""
    run([python, "setup.py", "--quiet", "build_ext", "--inplace"], "building the extension", environment)


def lint(python: str) -> None:
    """Check style and types of the whole project."""
    run([python, "-m", "ruff", "check", "."], "checking style with ruff")
    run([python, "-m", "ruff", "format", "--check", "."], "checking the format with ruff")
    patterns = [f"{folder}/**/*.{suffix}" for folder in ("csrc", "tests") for suffix in ("cpp", "h", "cu")]
    sources = [str(path) for pattern in patterns for path in ROOT.glob(pattern)]
    formatter = str(Path(python).with_name("clang-format"))
    run([formatter, "--dry-run", "--Werror", *sources], "checking the format with clang-format")
    run([python, "-m", "mypy"], "checking types with mypy")


def main(arguments: Sequence[str]) -> int:
    """Run one command."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__.strip())
        return 0 if arguments else 2
    command, *rest = arguments
    if command not in COMMANDS:
        print(f"dev.py: no command {command!r}; there are {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    if command in ("build", "lint", "kernels") and {"-h", "--help"} & {*rest}:  # they have no page of their own
        print(__doc__.strip())
        return 0
    if command == "gpu" and "--simulate" not in rest and not {"-h", "--help"} & {*rest} and not gpu_present():
        print("dev.py gpu: no NVIDIA GPU here; nothing was built, run or recorded.")
        return 1
    simulated = command == "gpu" and "--simulate" in rest  # needs no driver, so no particular torch
    python, environment = choose_python("gpu --simulate" if simulated else command), project_environment()
    if command == "lint":
        lint(python)
        return 0
    if command in ("gpu", "report"):
        script = {"gpu": "bench/gpu_check.py", "report": "bench/report.py"}[command]
        return subprocess.run([python, script, *rest], cwd=ROOT, env=environment, check=False).returncode
    if command == "kernels":
        environment |= {"ERNET_CUDA_ARCHS": os.environ.get("ERNET_CUDA_ARCHS", "75;80;86;90a;100;120")}
    environment |= what_to_build(command)
    build(python, environment)
    if command == "build":
        return 0
    if command in ("demo", "test"):
        # OpenMP threads that spin while they wait make a step several times slower where another process has a core
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    runs = {
        "kernels": [python, ".ci/check_kernels.py", *rest],
        "demo": [python, "-m", "ernet_fast", "demo", *rest],
        "test": [python, "-m", "pytest", *workers(python, rest), *rest],
        "bench": [python, "bench/measure.py", *rest],
    }
    return subprocess.run(runs[command], cwd=ROOT, env=environment, check=False).returncode


def workers(python: str, rest: Sequence[str]) -> list[str]:
    """Arguments that spread all tests over processes, where pytest-xdist is installed and `rest` does not say how."""
    if any(x.startswith(("-n", "--numprocesses", "--pdb")) or (ROOT / x.partition("::")[0]).exists() for x in rest):
        return []
    found = subprocess.run([python, "-c", "import xdist"], capture_output=True, check=False).returncode == 0
    return ["-n", str(min(4, os.cpu_count() or 1)), "--dist", "loadfile"] if found else []


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
