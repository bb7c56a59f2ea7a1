#!/usr/bin/env python3
"""One command for everything a developer does: `python3 dev.py demo | test | build | bench | report | lint | ...`.

Needs Python >= 3.10 and a C++ compiler; standard library only. The interpreter that runs it is used as it is if it has
torch >= 2.11 and what the command needs; else a virtual environment `.venv` is made, once: from requirements-demo.txt
for `demo` and `build`, completed from requirements-dev.txt by the first other command.

    demo  [ARGS]   set up, build, and run `ernet-fast demo` (see `python3 dev.py demo --help`)
    test  [ARGS]   set up, build, and run the tests, in as many processes as there are cores, at most 4 (-n 0: in this
                   one); ARGS go to pytest
    build          set up and build the extension in place
    bench [ARGS]   set up, build, and run the benches into bench/results/; --compare REV, --history: see --help
    report [ARGS]  bring the tables of README.md and docs/ into step with bench/results/; --check only looks
    lint           ruff, clang-format, mypy
    kernels        build the CUDA code for every architecture and check registers, stack and spills of each kernel
    gpu   [ARGS]   on a machine with an NVIDIA GPU: build for it, test every kernel on it, record what was found
    wheel [ARGS]   the source archive and a manylinux wheel in dist/, checked, installed and tried
    installs [WAY] every way to install that the documents name, in environments of their own
    compat [ARGS]  the tests of the same binary under another torch, with the real torchvision and timm (5.5 GB)
    docs  [ARGS]   the pages of docs/ as a site in build/site; --serve shows it

Environment: ERNET_VENV (folder of the virtual environment, default .venv); ERNET_CUDA, ERNET_CUDA_ARCHS, ERNET_ISAS,
MAX_JOBS (see setup.py). Where torch has no CUDA nothing builds GPU code unless one of the first two is set; without a
GPU, `demo`, `test` and `bench` do not either. `demo` compiles for this CPU alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent
DEMO = ROOT / "requirements-demo.txt"  # of demo and build
REQUIREMENTS = ROOT / "requirements-dev.txt"  # of all commands, with those of DEMO
RELEASE = ROOT / "requirements-release.txt"  # of wheel, installs and docs
COMMANDS = ("demo", "test", "build", "bench", "report", "lint", "kernels", "gpu", "wheel", "installs", "compat", "docs")
# What each command needs of an interpreter that is used as it is. torchstain, hypothesis and the like are looked for by
# the tests themselves.
BUILD = ("torch", "numpy", "ninja", "setuptools")
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
    "wheel": (*BUILD, "wheel", "auditwheel"),
    "installs": (*BUILD, "wheel", "auditwheel"),
    "docs": (*BUILD, "mkdocs", "material", "mkdocstrings"),
    "compat": BUILD,
}


# What runs without a build before it.
SCRIPTS = {
    "gpu": "bench/gpu_check.py",
    "report": "bench/report.py",
    "wheel": ".ci/build_wheel.py",
    "installs": ".ci/installs.py",
    "docs": ".ci/docs.py",
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


def stamp_of(requirements: Path) -> tuple[Path, str]:
    """The file that says what was installed for a file of requirements, and what it says once that is done."""
    content = DEMO.read_bytes() if requirements == REQUIREMENTS else b""
    wanted = hashlib.sha256(content + requirements.read_bytes()).hexdigest()
    return venv_folder() / f"{requirements.stem}.sha256", wanted


def is_installed(requirements: Path) -> bool:
    """True if the virtual environment has these requirements as they are now."""
    stamp, wanted = stamp_of(requirements)
    return stamp.exists() and stamp.read_text() == wanted


def make_venv(command: str, meanwhile: Callable[[str], None] | None = None) -> Path:
    """Make the virtual environment, or bring it up to what `command` needs; returns its Python.

    `meanwhile` is called with it once it has ninja and setuptools, while torch and the rest are fetched.
    """
    folder = venv_folder()
    python = folder / "bin" / "python"
    requirements = DEMO if command in ("demo", "build") else REQUIREMENTS
    if python.exists() and (is_installed(REQUIREMENTS) or is_installed(requirements)):
        return python
    disk = "1.2 GB on disk" if requirements == DEMO else "3 GB on disk"
    print(f"Setting up {folder} from {requirements.name} (once; {disk}, with CUDA 3 GB more)", flush=True)
    if not python.exists():
        with step("virtual environment"):
            run([sys.executable, "-m", "venv", str(folder)], "making a virtual environment (is python3-venv missing?)")
    # without byte code, which takes longer than all else: the first import writes that of the modules it needs
    pip = [str(python), "-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check"]
    tools = [line for line in DEMO.read_text().splitlines() if line.startswith(("setuptools==", "wheel==", "ninja=="))]
    if meanwhile:
        with step(f"installing {' '.join(tools)}"):
            run([*pip, *tools], f"installing {' '.join(tools)}")
    with step(f"installing {requirements.name}" + (", compiling loops meanwhile" if meanwhile else "")):
        with subprocess.Popen([*pip, "-r", str(requirements)], cwd=ROOT) as packages:
            try:
                if meanwhile:
                    meanwhile(str(python))
            except BaseException:
                packages.terminate()
                raise
        ended(packages.returncode, f"installing {requirements.name}")
    stamp, wanted = stamp_of(requirements)
    stamp.write_text(wanted)
    return python


@contextlib.contextmanager
def step(what: str) -> Iterator[None]:
    """Say what is done, and how long it took."""
    start = time.perf_counter()
    print(f"  {what} ...", flush=True)
    yield
    print(f"  {what}: {time.perf_counter() - start:.0f} s", flush=True)


def add_release_tools(python: str) -> None:
    """Bring what `wheel`, `installs` and `docs` need besides into the virtual environment."""
    if not is_installed(RELEASE):
        with step(f"installing {RELEASE.name}"):
            run([python, "-m", "pip", "install", "--quiet", "-r", str(RELEASE)], f"installing {RELEASE.name}")
        stamp, wanted = stamp_of(RELEASE)
        stamp.write_text(wanted)


def run(command: Sequence[str], doing: str, environment: dict[str, str] | None = None) -> None:
    """Run a command; end with its exit code and what was being done if it fails."""
    ended(subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode, doing)


def ended(code: int, doing: str) -> None:
    """End with a command's exit code and what was being done if it failed."""
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


def choose_python(command: str, meanwhile: Callable[[str], None] | None = None) -> str:
    """The interpreter for `command`: this one where it has what is needed, else that of the virtual environment."""
    lacking = missing(command)
    if not lacking:
        return sys.executable
    if command == "gpu":
        raise SystemExit(f"dev.py gpu uses this interpreter's own torch; {sys.executable} lacks {', '.join(lacking)}.")
    python = str(make_venv(command, meanwhile))
    if command in ("wheel", "installs", "docs"):
        add_release_tools(python)
    return python


def what_to_build(command: str) -> dict[str, str]:
    """Variables for setup.py: code for GPUs takes minutes, and is left out where none could run it and nobody asks.

    `demo` compiles for this CPU alone; what the other commands build besides goes into the same folder.
    """
    if command in ("kernels", "wheel"):
        return {"ERNET_CUDA_ARCHS": os.environ.get("ERNET_CUDA_ARCHS", "75;80;86;90a;100;120")}
    asked = command == "build" or {"ERNET_CUDA", "ERNET_CUDA_ARCHS"} & {*os.environ}
    variables = {} if asked or gpu_present() else {"ERNET_CUDA": "0"}
    return variables | ({"ERNET_ISAS": os.environ.get("ERNET_ISAS") or "native"} if command == "demo" else {})


def build(python: str, environment: dict[str, str]) -> None:
    """Build the extension in place; does nothing where nothing has changed."""
    start = time.perf_counter()
    run([python, "setup.py", "--quiet", "build_ext", "--inplace"], "building the extension", environment)
    seconds = time.perf_counter() - start
    if seconds > 2:
        print(f"  compiling: {seconds:.0f} s", flush=True)


def build_loops(python: str, environment: dict[str, str]) -> None:
    """Compile what needs no torch."""
    run([python, "setup.py", "--quiet", "build_ext"], "compiling loops", environment | {"ERNET_LOOPS_ONLY": "1"})


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
    environment = project_environment()
    if command in SCRIPTS or command == "lint":
        python = choose_python("gpu --simulate" if simulated else command)
        if command == "wheel":
            environment |= what_to_build(command)
        if command == "lint":
            lint(python)
            return 0
        return subprocess.run([python, SCRIPTS[command], *rest], cwd=ROOT, env=environment, check=False).returncode
    environment |= what_to_build(command)
    python = choose_python(command, lambda python: build_loops(python, environment))
    if python != sys.executable:
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # see make_venv
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
        "compat": [python, ".ci/compat.py", *rest],
    }
    return subprocess.run(runs[command], cwd=ROOT, env=environment, check=False).returncode


def workers(python: str, rest: Sequence[str]) -> list[str]:
    """Arguments that spread all tests over processes, where pytest-xdist is installed and `rest` does not say how."""
    if any(x.startswith(("-n", "--numprocesses", "--pdb")) or (ROOT / x.partition("::")[0]).exists() for x in rest):
        return []
    new_enough = "from importlib.metadata import version; print(*version('pytest-xdist').split('.')[:2])"
    found = subprocess.run([python, "-c", new_enough], capture_output=True, text=True, check=False).stdout.split()
    if [int(number) for number in found] < [3, 7]:
        return []
    # in the order of tests/conftest.py: a file that takes long and comes last would keep one core busy alone
    return ["-n", str(min(4, os.cpu_count() or 1)), "--dist", "loadfile", "--no-loadscope-reorder"]


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
