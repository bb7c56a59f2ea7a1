"""Registers, stack and local memory of every CUDA kernel, read from the objects of the last build.

A kernel with a stack frame or local memory spills; one over its register budget runs with too few warps. Either ends
with exit code 1. cuobjdump comes with triton.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import triton

ROOT = Path(__file__).resolve().parent.parent
REGISTER_BUDGET = 128  # at least 512 threads a multiprocessor
USAGE = re.compile(r"Function (\S+):\s*\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


def cuobjdump() -> Path:
    """The cuobjdump that triton carries."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not path.exists():
        raise SystemExit(f"check_kernels: {path} is missing; install the triton of requirements-dev.txt.")
    return path


def demangle(name: str) -> str:
    """A readable kernel name, without its arguments."""
    done = subprocess.run(["c++filt", name], capture_output=True, text=True, check=False)
    text = done.stdout.strip() if done.returncode == 0 else name
    return re.sub(r"\(anonymous namespace\)::|^void ", "", text).split("(")[0]


def main() -> int:
    """Print the table; returns the exit code."""
    objects = sorted(ROOT.glob("build/temp*/release/*.cu.o"))
    if not objects:
        print("check_kernels: no CUDA objects; build with nvcc on the PATH.")
        return 1
    rows, bad = [], []
    for path in objects:
        text = subprocess.run([cuobjdump(), "-res-usage", path], capture_output=True, text=True, check=True).stdout
        for section in re.split(r"(?=arch = sm_)", text):
            arch = re.match(r"arch = (sm_\w+)", section)
            for name, registers, stack, shared, local in USAGE.findall(section):
                row = (
                    demangle(name),
                    arch.group(1) if arch else "?",
                    int(registers),
                    int(stack),
                    int(shared),
                    int(local),
                )
                rows.append(row)
                if row[3] or row[5] or row[2] > REGISTER_BUDGET:
                    bad.append(row)
    if not rows:
        print("check_kernels: the objects hold no kernels.")
        return 1
    print(f"{'kernel':56} {'arch':8} {'registers':>9} {'stack':>6} {'shared':>7} {'local':>6}")
    for row in sorted(rows):
        print(f"{row[0][:56]:56} {row[1]:8} {row[2]:9} {row[3]:6} {row[4]:7} {row[5]:6}")
    if bad:
        print(f"{len(bad)} kernel(s) spill or use more than {REGISTER_BUDGET} registers: {sorted({b[0] for b in bad})}")
        return 1
    print(f"{len(rows)} kernels: no stack, no local memory, at most {max(row[2] for row in rows)} registers.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
