"""Every way to install that the documents name, each from the source archive, in environments of their own: weekly.

The lines of README.md's section Install run as they stand in an empty environment; the other ways share a second one.
torch is held at the version of this interpreter (PIP_CONSTRAINT), as an open `pip install torch` takes whatever is
newest. Takes minutes for each environment, and compiles once (once a way without ccache). Runs in the environment of
requirements-release.txt: `python .ci/installs.py [WAY ...]`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from build_wheel import ROOT, backend, unpacked

TORCH = "torch==" + metadata.version("torch").split("+")[0]
COMPILED = """
import torch, ernet_fast
from ernet_fast import _backend
assert "site-packages" in ernet_fast.__file__ or EDITABLE, ernet_fast.__file__
assert _backend.extension_available() == COMPILED, _backend.why_unavailable()
y = ernet_fast.er_shortcut_sum([torch.randn(2, 8, 5, 7) for _ in range(3)], torch.randn(2, 8))
tiles = torch.randint(30, 230, (2, 3, 64, 64), dtype=torch.uint8)
assert ernet_fast.stain.MacenkoNormalizer()(tiles).shape == tiles.shape
print(torch.__version__, (_backend.build_info() or {}).get("cuda_archs"), _backend.why_unavailable())
"""


class Environment:
    """An environment in a folder, and commands that find it first."""

    def __init__(self, folder: Path, source: Path) -> None:
        self.folder, self.source = folder, source
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        constraint = folder / "constraint.txt"
        constraint.write_text(TORCH + "\n")
        hidden = ("PYTHONPATH", "VIRTUAL_ENV", "ERNET_")
        self.variables = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
        self.variables |= {
            "PATH": f"{folder}/bin{os.pathsep}{os.environ['PATH']}",
            "PIP_CONSTRAINT": str(constraint),
            "UV_CONSTRAINT": str(constraint),
            "PIP_QUIET": "1",
        }

    def shell(self, line: str, **variables: str) -> str:
        """What a line of a shell prints; ends with its output if it fails."""
        done = subprocess.run(
            line, shell=True, cwd=self.source, env=self.variables | variables, capture_output=True, text=True,
            executable="/bin/bash",
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"installs: failed: {line}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
        return done.stdout + done.stderr

    def use(self, compiled: bool = True, editable: bool = False, **variables: str) -> str:
        """Use what is installed, from another folder than its sources."""
        code = COMPILED.replace("COMPILED", str(compiled)).replace("EDITABLE", str(editable))
        done = subprocess.run(
            [self.folder / "bin" / "python", "-W", "ignore", "-c", code],
            cwd=self.folder, env=self.variables | variables, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"installs: does not work once installed:\n{done.stderr}")
        return done.stdout.strip()

    def install(self, line: str, compiled: bool = True, editable: bool = False, **variables: str) -> str:
        """Install anew with this line, and use it; torch must be what it was."""
        self.shell("pip uninstall -y ernet_fast")
        self.shell(line, **variables)
        said = self.use(compiled, editable)
        assert said.split()[0].split("+")[0] == TORCH.removeprefix("torch=="), f"torch was replaced: {said}"
        return said

    def without(self, *programs: str) -> str:
        """A PATH with the environment's programs alone, but for /bin/sh and those that are no compiler."""
        folder = self.folder / ("without-" + "-".join(programs))
        folder.mkdir(exist_ok=True)
        for name in ("bash", "sh", "env", "uname", "g++", "c++", "as", "ld", "ldd"):
            found = next((path for path in map(Path, (f"/bin/{name}", f"/usr/bin/{name}")) if path.exists()), None)
            if found and name not in programs and not (folder / name).exists():
                (folder / name).symlink_to(found)
        return f"{self.folder}/bin{os.pathsep}{folder}"


def readme_lines(text: str) -> list[str]:
    """The commands of the first block of the section Install, without their remarks."""
    block = re.search(r"^## Install\n.*?```\n(.*?)```", text, re.DOTALL | re.MULTILINE)
    assert block, "README.md has no section Install with a block of commands"
    return [re.sub(r"\s+#.*", "", line) for line in block[1].splitlines() if line.strip()]


def readme(empty: Environment) -> str:
    """The lines of README.md, one after the other, in an empty environment."""
    for line in readme_lines((ROOT / "README.md").read_text()):
        start = time.perf_counter()
        empty.shell(line)
        print(f"  {line}: {time.perf_counter() - start:.0f} s", flush=True)
    return empty.use()


WAYS: dict[str, Callable[[Environment], str]] = {
    "no isolation": lambda e: e.install("pip install --no-build-isolation --no-deps ."),
    "editable": lambda e: e.install("pip install --no-build-isolation --no-deps -e .", editable=True),
    "source archive": lambda e: e.install(f"pip install --no-build-isolation --no-deps {ROOT}/dist/*.tar.gz"),
    "isolated, behind a pinned torch": lambda e: e.install("pip install ."),
    "uv": lambda e: e.install("pip install uv && uv pip install --no-build-isolation --no-deps --reinstall ."),
    "MAX_JOBS=1": lambda e: e.install("pip install --no-build-isolation --no-deps .", MAX_JOBS="1"),
    "no nvcc": lambda e: e.install("pip install --no-build-isolation --no-deps .", CUDA_HOME="/nowhere"),
    "no compiler": lambda e: e.install(
        "pip install --no-build-isolation --no-deps .", compiled=False, CXX="", PATH=e.without("g++", "c++")
    ),
    # a folder in which nobody, root neither, can write
    "read-only home": lambda e: e.install("pip install --no-build-isolation --no-deps .", HOME="/proc/self/fdinfo")
    + e.use(HOME="/proc/self/fdinfo", XDG_CACHE_HOME="/proc/self/fdinfo"),
}


def main(wanted: list[str]) -> int:
    """Run every way, or those named; returns the exit code."""
    if unknown := {*wanted} - {*WAYS, "readme"}:
        raise SystemExit(f"installs: no way {', '.join(sorted(unknown))}; there are readme, {', '.join(WAYS)}")
    (ROOT / "dist").mkdir(exist_ok=True)
    source = unpacked(backend("build_sdist", ROOT))
    with tempfile.TemporaryDirectory() as folder:
        if not wanted or "readme" in wanted:
            print("readme:\n  " + readme(Environment(Path(folder) / "empty", source)), flush=True)
        ways = [way for way in WAYS if not wanted or way in wanted]
        if ways:
            shared = Environment(Path(folder) / "shared", source)
            shared.shell(f"pip install {TORCH} numpy 'setuptools>=77' wheel ninja")
        for way in ways:
            start = time.perf_counter()
            said = WAYS[way](shared)
            print(f"{way}: {said} ({time.perf_counter() - start:.0f} s)", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
