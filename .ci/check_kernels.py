"""Registers, stack and local memory of every CUDA kernel of the last build, and what each does for a pixel.

A kernel with a stack frame or local memory spills; one over its register budget runs with too few warps; one that does
not load or store pixels by 16 bytes moves them slowly. Each ends with exit code 1, as do tables in docs/macenko-gpu.md
that are not in step (`--write` brings them there).
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import kernel_counts
from sass import Kernel, read_kernels

ROOT = Path(__file__).resolve().parent.parent
REGISTER_BUDGET = 128  # at least 512 threads a multiprocessor
WITHOUT_PIXELS = ("total_kernel",)
WRITERS = ("reconstruct_kernel", "separate_kernel", "team_kernel")  # of pixels; the others only read them


def check(kernels: list[Kernel]) -> int:
    """Print the resources of all kernels; returns the exit code."""
    print(f"{'kernel':56} {'arch':8} {'registers':>9} {'stack':>6} {'shared':>7} {'local':>6}")
    for one in sorted(kernels, key=lambda kernel: (kernel.name, kernel.arch)):
        print(f"{one.name[:56]:56} {one.arch:8} {one.registers:9} {one.stack:6} {one.shared:7} {one.local:6}")
    bad = {one.name for one in kernels if one.stack or one.local or one.registers > REGISTER_BUDGET}
    if bad:
        print(f"{len(bad)} kernel(s) spill or use more than {REGISTER_BUDGET} registers: {sorted(bad)}")
        return 1
    most = max(one.registers for one in kernels)
    print(f"{len(kernels)} kernels: no stack, no local memory, at most {most} registers.\n")
    return 0


def check_accesses(kernels: list[Kernel]) -> int:
    """Look for 16-byte loads and stores in the machine code; returns the exit code."""
    missing = []
    for one in kernels:
        if not one.instructions or one.name.startswith(WITHOUT_PIXELS):
            continue
        wide = {each.opcode[:3] for each in one.instructions if kernel_counts.is_wide_global(each)}
        wanted = {"LDG", "STG"} if one.name.startswith(WRITERS) else {"LDG"}
        missing += [f"{one.name} for {one.arch}: {kind}" for kind in sorted(wanted - wide)]
    if missing:
        print("\n".join(["no 16-byte accesses of this kind in", *missing]))
        return 1
    print("Pixels are loaded and stored by 16 bytes in every kernel.\n")
    return 0


def main(arguments: list[str]) -> int:
    """Check the resources, then the counts; returns the exit code."""
    if arguments not in ([], ["--write"]):
        print("usage: dev.py kernels [--write]", file=sys.stderr)
        return 2
    objects = sorted(ROOT.glob("build/temp*/release/*.cu.o"))
    if not objects:
        print("check_kernels: no CUDA objects; build with nvcc on the PATH.")
        return 1
    kernels = read_kernels(objects, kernel_counts.DETAILED)
    if not kernels:
        print("check_kernels: the objects hold no kernels.")
        return 1
    return check(kernels) or check_accesses(kernels) or kernel_counts.report(kernels, into_page=bool(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
