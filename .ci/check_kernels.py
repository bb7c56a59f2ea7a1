"""Registers, stack and local memory of every CUDA kernel of the last build, and whether it moves pixels by 16 bytes.

A kernel with a stack frame or local memory spills; one over its register budget runs with too few warps; one that does
not load or store pixels by 16 bytes moves them slowly. Each ends with exit code 1, on every architecture of the build.
Uses cuobjdump: the one beside nvcc, else the one that triton carries. Standard library only.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REGISTER_BUDGET = 128  # at least 512 threads a multiprocessor
WRITERS = ("reconstruct_kernel", "separate_kernel", "resident_kernel")  # of pixels; the others only read them
EMPTY_BELOW_90 = "BlockCluster"  # thread block clusters need compute capability 9.0: compiled to nothing before

ARCH = re.compile(r"^arch = (sm_\w+)", re.MULTILINE)
USAGE = re.compile(r"Function (\S+):\s*\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
FUNCTION = re.compile(r"^\s*Function : (\S+)", re.MULTILINE)
WIDE = re.compile(r"\b(LDG|STG)\S*\.128\b")


@dataclass
class Kernel:
    """One kernel for one architecture."""

    name: str
    arch: str
    registers: int
    stack: int
    shared: int
    local: int
    wide: set[str] = field(default_factory=set)
    """"LDG" if it loads 16 bytes at a time from device memory, "STG" if it stores them so."""

    @property
    def wanted(self) -> set[str]:
        """What `wide` must hold."""
        major = int(re.sub(r"\D", "", self.arch)) // 10
        if EMPTY_BELOW_90 in self.name and major < 9:
            return set()
        return {"LDG", "STG"} if self.name.startswith(WRITERS) else {"LDG"}


def cuobjdump() -> Path:
    """Where cuobjdump is."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    triton = importlib.util.find_spec("triton")
    found = [
        home and Path(home) / "bin" / "cuobjdump",
        shutil.which("cuobjdump"),
        triton and triton.origin and Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump",
    ]
    for path in filter(None, found):
        if Path(path).exists():
            return Path(path)
    raise SystemExit("cuobjdump is missing; install the CUDA toolkit's, or the triton of requirements-dev.txt.")


def output(*command: str | Path, stdin: str | None = None) -> str:
    """What a tool prints."""
    return subprocess.run(command, input=stdin, capture_output=True, text=True, check=True).stdout


def parts(pattern: re.Pattern[str], listing: str) -> Iterable[tuple[str, str]]:
    """Each name that the pattern finds in what cuobjdump prints, and the text up to the next."""
    pieces = pattern.split(listing)
    return zip(pieces[1::2], pieces[2::2], strict=True)


def parse(usage: str, code: str) -> list[Kernel]:
    """The kernels of one object, with mangled names, from `cuobjdump -res-usage` and `cuobjdump -sass`."""
    found = {
        (arch, name): Kernel(name, arch, *map(int, numbers))
        for arch, text in parts(ARCH, usage)
        for name, *numbers in USAGE.findall(text)
    }
    for arch, text in parts(ARCH, code):
        for name, body in parts(FUNCTION, text):
            if (arch, name) in found:  # else a device function
                found[arch, name].wide = set(WIDE.findall(body))
    return list(found.values())


def read_kernels(objects: Iterable[Path]) -> list[Kernel]:
    """The kernels in `objects` for every architecture, with readable names."""
    tool = cuobjdump()
    kernels = [
        kernel for path in objects for kernel in parse(output(tool, "-res-usage", path), output(tool, "-sass", path))
    ]
    readable = output("c++filt", stdin="\n".join(kernel.name for kernel in kernels)).splitlines()
    for kernel, name in zip(kernels, readable, strict=True):
        kernel.name = re.sub(r"\(anonymous namespace\)::|^void |ernet::\w+::", "", name).split("(")[0]
    return kernels


def faults(kernels: list[Kernel]) -> list[str]:
    """What is wrong with the kernels, a line each."""
    found = []
    for one in kernels:
        where = f"{one.name} for {one.arch}"
        if one.stack or one.local:
            found.append(f"{where} spills: {one.stack} bytes of stack, {one.local} of local memory")
        if one.registers > REGISTER_BUDGET:
            found.append(f"{where} uses {one.registers} registers, more than {REGISTER_BUDGET}")
        found += [f"{where} has no 16-byte {kind}" for kind in sorted(one.wanted - one.wide)]
    for name in (*WRITERS, EMPTY_BELOW_90):
        if not any(name in one.name for one in kernels):
            found.append(f"no kernel is called {name}; .ci/check_kernels.py names it, so bring that up to date")
    return found


def main() -> int:
    """Print the resources of all kernels and what is wrong with them; returns the exit code."""
    objects = sorted(ROOT.glob(f"build/temp.{sysconfig.get_platform()}/release/*.cu.o"))
    if not objects:
        print("check_kernels: no CUDA objects; build with nvcc on the PATH.")
        return 1
    kernels = read_kernels(objects)
    print(f"{'kernel':56} {'arch':8} {'registers':>9} {'stack':>6} {'shared':>7} {'local':>6}  16-byte accesses")
    for one in sorted(kernels, key=lambda kernel: (kernel.name, kernel.arch)):
        numbers = f"{one.registers:9} {one.stack:6} {one.shared:7} {one.local:6}"
        print(f"{one.name[:56]:56} {one.arch:8} {numbers}  {' '.join(sorted(one.wide))}")
    if found := faults(kernels):
        print("\n".join(found))
        return 1
    most = max(one.registers for one in kernels)
    print(f"{len(kernels)} kernels: no stack, no local memory, at most {most} registers; pixels are moved by 16 bytes.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
