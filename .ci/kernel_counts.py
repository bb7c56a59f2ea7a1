"""What each CUDA kernel does for a pixel, counted in its machine code, and the images a second that follow on an H200.

    python3 dev.py kernels            print the tables; fail if docs/macenko-gpu.md is not in step with the build
    python3 dev.py kernels --write    put them into that page

Where a loop loads its pixels by 16 bytes, the number that its source states (pixel_passes.py) is checked against those
loads (a loop that the compiler unrolled takes a multiple). Counts are of the way through one iteration with the most
instructions and, in brackets, with the fewest, in the middle of an aligned image: bounds of what a warp executes.
Single pixels that are evaluated again in double precision are an inner loop: of 8-bit images it is gone through once an
iteration in passes that look for exact keys and not at all in others, of float32 images once for every pixel.
Prologues and what is done once an image are left out.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from gpu_limits import resident_blocks
from kernel_prediction import (
    CAPTION,
    RANDOM_BANKS,
    kernels_table,
    plans_table,
)
from pixel_passes import (
    Statement,
    below_csrc,
    few_statements,
    function_at,
    inlined_from,
    inner_loops,
    innermost_at,
    loops_at,
    statements,
)
from sass import Instruction, Kernel, Loop, Place, output

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "macenko-gpu.md"
BEGIN, END = "<!-- kernel counts: begin -->", "<!-- kernel counts: end -->"
DETAILED = "sm_90a"
WIDE = 8  # bytes; accesses of single elements, which may be left out thread by thread, are narrower


@dataclass
class PixelLoop:
    """One loop over pixels: instructions an iteration by class, and what it moves."""

    kernel: Kernel
    work: str  # the name of the pass, or where the loop stands
    pixels: float
    times: int
    most: Counter[str]
    fewest: int

    def per_pixel(self, kind: str) -> float:
        """Of `kind`, for a pixel, over all times."""
        return self.most[kind] / self.pixels * self.times


def kind_of(one: Instruction) -> str:
    """The unit that executes an instruction."""
    name = one.opcode.split(".")[0]
    if name in ("FADD", "FMUL", "FFMA", "HADD2", "HMUL2", "HFMA2"):
        return "fma"
    if name in ("IMAD", "XMAD", "IDP", "IMUL"):
        return "imad"
    if name in ("DADD", "DMUL", "DFMA", "DSETP", "DMNMX"):
        return "fp64"
    if name in ("MUFU", "I2F", "F2I", "F2F", "FRND", "POPC", "FLO", "BREV", "I2FP", "F2IP"):
        return "xu" if name not in ("I2FP", "F2IP") else "alu"
    if name in ("LDS", "STS", "LDSM", "STSM"):
        return "shared"
    if name in ("ATOMS", "ATOM", "ATOMG", "RED", "REDS"):
        return "atomic"
    if name in ("LDG", "STG", "LD", "ST", "LDGSTS", "LDL", "STL"):
        return "global"
    if name in ("BRA", "BSSY", "BSYNC", "BREAK", "EXIT", "CALL", "RET", "BAR", "WARPSYNC", "BRX", "NOP", "YIELD"):
        return "branch"
    if name in ("SHFL", "VOTE", "VOTEU", "MATCH", "REDUX"):
        return "warp"
    if name.startswith("U") or name in ("LDC", "LDCU", "S2R", "S2UR", "R2UR", "CS2R"):
        return "uniform"
    return "alu"


def width_of(one: Instruction) -> int:
    """Bytes a thread that a memory access moves."""
    for suffix, width in ((".128", 16), (".64", 8), (".U16", 2), (".S16", 2), (".16", 2), (".U8", 1), (".S8", 1)):
        if one.opcode.endswith(suffix) or f"{suffix}." in one.opcode:
            return width
    return 4


def is_wide_global(one: Instruction) -> bool:
    """True if an instruction moves 16 bytes to or from device memory."""
    return kind_of(one) == "global" and width_of(one) == 16


def count(instructions: list[Instruction]) -> Counter[str]:
    """Instructions by unit, and bytes and words moved."""
    found: Counter[str] = Counter()
    whole = {one.opcode[:2] for one in instructions if kind_of(one) == "global" and width_of(one) >= WIDE}
    for one in instructions:
        kind = kind_of(one)
        found["all"] += 1
        found[kind] += 1
        name, width = one.opcode.split(".")[0], width_of(one)
        if kind == "global" and name[:2] in whole and one.predicate and width < WIDE:
            continue  # on the way of whole groups nothing is moved by it
        if kind == "global":
            found["bytes written" if name.startswith("ST") else "bytes read"] += width
            found["wide stores" if name.startswith("ST") else "wide loads"] += width == 16
        elif kind == "shared":
            found["words"] += max(1, width // 4)
            found["wide shared" if width == 16 else "look-ups"] += 1
        elif kind == "atomic":
            found["words"] += 2  # read and written
    return found


def element_size(kernel: Kernel) -> int:
    """Bytes of one channel of a pixel that a kernel reads, by its name."""
    return 4 if re.search(r"f32|<float", kernel.name) else 1


def worth(kernel: Kernel, block: int, longest: bool) -> tuple[float, ...]:
    """What makes a way through a loop that of whole groups of aligned pixels: wide accesses, no single elements.

    Among those ways the one with the most instructions is wanted, or with the fewest.
    """
    instructions = kernel.of_block(block)
    wide = sum(width_of(one) for one in instructions if kind_of(one) in ("global", "shared") and width_of(one) >= WIDE)
    narrow = sum(kind_of(one) == "global" and width_of(one) < WIDE for one in instructions)
    return wide, -narrow, len(instructions) if longest else -len(instructions)


def is_exact(kernel: Kernel, loop: Loop) -> bool:
    """True if a loop works in double precision: the one over the single pixels that float32 cannot place."""
    return any(kind_of(one) == "fp64" for block in loop.blocks for one in kernel.of_block(block))


def times_exact(kernel: Kernel, work: str, pixels: float) -> float:
    """How often an iteration goes through the loop over single pixels."""
    if element_size(kernel) == 4:
        return pixels
    return 1.0 if "exact" in work else 0.0


def measure(kernel: Kernel, loop: Loop, place: Place, work: str, said: Statement) -> PixelLoop:
    """Count one loop; raises where what its source says contradicts its loads."""
    again = [inner for inner in inner_loops(kernel, loop) if is_exact(kernel, inner)]
    single = frozenset().union(*(inner.blocks for inner in again))

    def way(longest: bool) -> list[int]:
        value = functools.partial(worth, kernel, longest=longest)
        return kernel.way_through(loop, lambda block: block not in single, value) or kernel.way_through(
            loop, lambda block: True, value
        )

    blocks, least = way(True), way(False)
    most = count([one for block in blocks for one in kernel.of_block(block)])
    size = 3 * element_size(kernel)
    pixels = said.amount / size if said.in_bytes else said.amount
    loads = [one for b in blocks for one in kernel.of_block(b) if one.opcode.startswith("LDG") and width_of(one) == 16]
    if loads:
        loaded = 16 * len(loads) / size
        if loaded % pixels:
            raise SystemExit(
                f"{kernel.name}: {place[0]}:{place[1]} says {pixels:g} pixels an iteration, the loop loads {loaded:g}."
            )
        pixels = loaded
    for inner in again:
        single_pixel = [one for b in kernel.way_through(inner, lambda _: True) for one in kernel.of_block(b)]
        times = times_exact(kernel, work, pixels)
        for kind, number in count(single_pixel).items():
            if not kind.startswith("bytes"):
                most[kind] += number * times
        if not loads:  # else they are in the cache, and in any case what the threads share is no pixel
            values = [one for one in single_pixel if one.opcode.startswith("LDG") and "STRONG" not in one.opcode]
            most["bytes read"] += times * sum(width_of(one) for one in values if width_of(one) < WIDE)
    fewest = sum(len(kernel.of_block(block)) for block in least)
    return PixelLoop(kernel, work or f"{Path(place[0]).name}:{place[1]}", pixels, said.times, most, fewest)


def pixel_loops(kernels: list[Kernel]) -> Iterator[PixelLoop]:
    """Every loop over pixels that a kernel for DETAILED has."""
    for kernel in kernels:
        if not kernel.instructions:
            continue
        here = {below_csrc(place) for one in kernel.instructions for place in one.places}
        for place, said in statements().items():
            if place not in here:
                continue
            loops = list(loops_at(kernel, place))
            if not loops:
                raise SystemExit(f"{kernel.name}: {place[0]}:{place[1]} is no loop in the machine code.")
            for work, loop in loops:
                yield measure(kernel, loop, place, work, said)


def few_pixels(kernels: list[Kernel]) -> Iterator[PixelLoop]:
    """The loops over sampled and listed pixels, for one such pixel.

    Of a loop that was unrolled all instructions are shared out to its pixels, those of rare ways included.
    """
    for kernel in kernels:
        for place, said in few_statements().items():
            function = function_at(place)
            if said.unrolled:
                found = inlined_from(kernel, function)
            else:
                loop = innermost_at(kernel, place)
                ways = kernel.way_through(loop, lambda _: True) if loop else []
                found = [one for block in ways for one in kernel.of_block(block)]
            if not found:
                continue
            most = count(found)
            del most["bytes read"], most["bytes written"]  # in the shared memory of a cluster, where they are any
            yield PixelLoop(kernel, f"{function}, of a {said.which} pixel", said.amount, 1, most, 0)


def nvcc_version() -> str:
    """The compiler that made the objects, as it names itself."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    path = shutil.which("nvcc") or (f"{home}/bin/nvcc" if home else "/usr/local/cuda/bin/nvcc")
    found = re.search(r"V(\d+\.\d+\.\d+)", output(path, "--version"))
    return found.group(1) if found else "unknown"


def markdown(header: list[str], rows: list[list[str]]) -> list[str]:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def resources(kernels: list[Kernel]) -> list[str]:
    """Registers, shared memory and warps of every kernel on every architecture."""
    archs = sorted({kernel.arch for kernel in kernels}, key=lambda arch: int(re.sub(r"\D", "", arch)))
    rows = []
    for name in sorted({kernel.name for kernel in kernels}):
        mine = {kernel.arch: kernel for kernel in kernels if kernel.name == name}
        cells = [f"`{name}`", str(next(iter(mine.values())).threads)]
        for arch in archs:
            kernel = mine.get(arch)
            if kernel is None:
                cells.append("-")
                continue
            blocks = resident_blocks(arch, kernel.threads, kernel.registers, kernel.shared)
            warps = "?" if blocks is None else str(blocks * -(-kernel.threads // 32))
            cells.append(f"{kernel.registers} / {kernel.shared / 1024:.1f} / {warps}")
        rows.append(cells)
    return markdown(["kernel", "threads", *archs], rows)


def work(loops: list[PixelLoop]) -> list[str]:
    """Instructions and bytes a pixel."""
    rows = []
    for loop in loops:
        per = loop.per_pixel
        rows.append(
            [
                f"`{loop.kernel.name}`",
                loop.work,
                f"{loop.pixels:g}" + (f" x {loop.times}" if loop.times > 1 else ""),
                f"{per('bytes read'):.3g} / {per('bytes written'):.3g}",
                f"{loop.most['wide loads']:g} / {loop.most['wide stores']:g}",
                f"{per('all'):.1f} ({loop.fewest / loop.pixels * loop.times:.1f})",
                *(f"{per(kind):.1f}" for kind in ("fma", "imad", "alu", "fp64", "xu", "shared", "atomic", "branch")),
            ]
        )
    names = ["float32", "multiply-add", "other integer", "float64", "special", "shared", "atomics", "branches"]
    return markdown(["kernel", "loop", "pixels", "bytes read / written", "by 16 bytes", "instructions", *names], rows)


def work_on_few(loops: list[PixelLoop]) -> list[str]:
    """Instructions a sampled or listed pixel."""
    kinds = ("all", "fma", "imad", "alu", "fp64", "xu", "shared", "atomic", "branch")
    names = ["float32", "multiply-add", "other integer", "float64", "special", "shared", "atomics", "branches"]
    rows = [[f"`{one.kernel.name}`", one.work, *(f"{one.per_pixel(kind):.1f}" for kind in kinds)] for one in loops]
    return markdown(["kernel", "work", "instructions", *names], rows)


def section(kernels: list[Kernel]) -> str:
    """What stands between the marks of the page."""
    loops = list(pixel_loops(kernels))
    few = list(few_pixels(kernels))
    return "\n".join(
        [
            f"Made by `python3 dev.py kernels --write` with nvcc {nvcc_version()}.",
            "",
            "**Resources**: registers a thread / KiB of static shared memory a block / warps resident on a",
            "multiprocessor. No kernel has a stack frame or local memory.",
            "",
            *resources(kernels),
            "",
            f"**Work a pixel** on {DETAILED}, from the machine code of each loop over pixels: bytes of device memory,",
            "16-byte loads / stores an iteration, instructions (fewest in brackets) by the unit that executes them.",
            "",
            *work(loops),
            "",
            "**Work on a few pixels**, those of a sample and those that are listed, per pixel that is worked on. Where",
            "loops were unrolled, rare ways through them are counted in.",
            "",
            *work_on_few(few),
            "",
            "**Prediction** for an H200, each planar loop on its own: the busiest of its units, all else hidden behind",
            "it. Left without bank conflicts, right with the look-ups and atomics of a warp at random banks",
            f"({RANDOM_BANKS} times the clocks; tables that are repeated for every bank have none).",
            "",
            *markdown(*kernels_table(loops)),
            "",
            *CAPTION,
            "",
            *markdown(*plans_table(loops, few)),
        ]
    )


def stored() -> str:
    """What the page holds now."""
    text = PAGE.read_text()
    return text.split(BEGIN)[1].split(END)[0].strip()


def write(text: str) -> None:
    """Put a new section into the page."""
    page = PAGE.read_text()
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def differences(new: str, old: str) -> list[str]:
    """Where the page is not in step: every number if one compiler made both, else the kernels and their loops."""

    def made_with(text: str) -> str:
        return text.splitlines()[0] if text else ""

    def outline(text: str) -> list[str]:
        rows = [line.split("|") for line in text.splitlines() if line.startswith("| `")]
        return sorted({cells[1].strip() for cells in rows})

    if made_with(new) != made_with(old):
        return [f"kernel {name}" for name in sorted(set(outline(new)) ^ set(outline(old)))]
    mine, theirs = new.splitlines(), old.splitlines()
    if architectures(new) != architectures(old):  # fewer were built: what they have in common is in the other tables
        mine, theirs = (text.split("**Work a pixel**")[-1].splitlines() for text in (new, old))
    return [line for line in theirs if line not in mine] + [line for line in mine if line not in theirs]


def architectures(text: str) -> list[str]:
    """Those of the table of resources."""
    return re.findall(
        r"sm_\w+", next((line for line in text.splitlines() if line.startswith("| kernel | threads")), "")
    )


def report(kernels: list[Kernel], into_page: bool) -> int:
    """Print the tables, and write them into the page or compare them with it; returns the exit code."""
    if not any(kernel.instructions for kernel in kernels):
        print(f"kernel_counts: nothing is built for {DETAILED}, which the counts are of; set ERNET_CUDA_ARCHS.")
        return 0
    text = section(kernels)
    print(text)
    if into_page:
        write(text)
        return 0
    found = differences(text, stored())
    if found:
        print("\n".join(["docs/macenko-gpu.md is not in step; python3 dev.py kernels --write does it:", *found]))
    return 1 if found else 0
