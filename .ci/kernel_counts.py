"""What each CUDA kernel does for a pixel, counted in its machine code, and the images a second that follow on an H200.

    python3 dev.py kernels            print the tables; fail if docs/macenko-gpu.md is not in step with the build
    python3 dev.py kernels --write    put them into that page

A loop over pixels says in its source how much it takes, in a comment behind the `for`:

    for (...) {  // 48 bytes of pixels an iteration
    for (...) {  // 16 pixels an iteration, 3 times

"3 times" is how often the kernel goes over all pixels in this loop. Where a loop loads its pixels by 16 bytes the
number is checked against those loads (a loop that the compiler unrolled takes a multiple). Counts are of the way
through one iteration with the most instructions and, in brackets, with the fewest, in the middle of an aligned image.
Both are bounds of what a warp executes. Prologues and what is done once an image are left out.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from gpu_limits import H200, RATES, resident_blocks
from sass import Instruction, Kernel, Loop, Place, output

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "macenko-gpu.md"
BEGIN, END = "<!-- kernel counts: begin -->", "<!-- kernel counts: end -->"
DETAILED = "sm_90a"
SIZES = {"224²": 224 * 224, "700x460": 700 * 460}
RANDOM_BANKS = 3.5  # largest number of 32 random words in one of 32 banks, on average
STATED = re.compile(r"//.*?\b(\d+) (bytes of pixels|pixels) an iteration(?:, (\d+) times)?")


@dataclass(frozen=True)
class Statement:
    """What the source says of a loop over pixels."""

    amount: int
    in_bytes: bool
    times: int


@dataclass
class PixelLoop:
    """One loop over pixels: instructions an iteration by class, and what it moves."""

    kernel: Kernel
    line: str
    pixels: float
    times: int
    most: Counter[str]
    fewest: int

    def per_pixel(self, kind: str) -> float:
        """Of `kind`, for a pixel, over all times."""
        return self.most[kind] / self.pixels * self.times


def statements() -> dict[Place, Statement]:
    """The loops over pixels of csrc/cuda and csrc/macenko, by file below csrc and line."""
    found = {}
    for folder in ("cuda", "macenko"):
        for path in sorted((ROOT / "csrc" / folder).glob("*.*")):
            for number, line in enumerate(path.read_text().splitlines(), 1):
                if match := STATED.search(line):
                    said = Statement(int(match[1]), match[2].startswith("bytes"), int(match[3] or 1))
                    found[(f"{folder}/{path.name}", number)] = said
    return found


def below_csrc(place: Place) -> Place:
    """A place as `statements` names it."""
    return place[0].rpartition("/csrc/")[2], place[1]


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
    for one in instructions:
        kind = kind_of(one)
        found["all"] += 1
        found[kind] += 1
        name, width = one.opcode.split(".")[0], width_of(one)
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


def own_blocks(kernel: Kernel, loop: Loop) -> frozenset[int]:
    """The blocks of a loop that are in no inner loop."""
    inner = [other.blocks for other in kernel.loops if other.blocks < loop.blocks]
    return loop.blocks - frozenset().union(*inner)


def loop_of(kernel: Kernel, place: Place) -> Loop | None:
    """The innermost loop whose own instructions come from a source line."""
    found = None
    for loop in kernel.loops:
        instructions = (one for block in own_blocks(kernel, loop) for one in kernel.of_block(block))
        if any(place in map(below_csrc, one.places) for one in instructions):
            found = loop
    return found


def is_narrow(kernel: Kernel, block: int) -> bool:
    """True if a block asks of each element whether it is there: the way of unaligned images and their ends."""
    return any(one.predicate and kind_of(one) == "global" and width_of(one) < 16 for one in kernel.of_block(block))


def measure(kernel: Kernel, loop: Loop, place: Place, said: Statement) -> PixelLoop:
    """Count one loop; raises where what its source says contradicts its loads."""
    blocks = kernel.way_through(loop, lambda block: not is_narrow(kernel, block))
    narrow = not blocks
    blocks = blocks or kernel.way_through(loop, lambda block: True)
    least = kernel.way_through(loop, lambda block: narrow or not is_narrow(kernel, block), longest=False)
    most = count([one for block in blocks for one in kernel.of_block(block)])
    size = 3 * element_size(kernel)
    pixels = said.amount / size if said.in_bytes else said.amount
    loads = [one for b in blocks for one in kernel.of_block(b) if one.opcode.startswith(("LDG", "LDS"))]
    wide = [one for one in loads if width_of(one) == 16 and one.opcode.startswith("LDG")]
    wide = wide or [one for one in loads if width_of(one) == 16]
    if wide:
        loaded = 16 * len(wide) / size
        if loaded % pixels:
            raise SystemExit(
                f"{kernel.name}: {place[0]}:{place[1]} says {pixels:g} pixels an iteration, the loop loads {loaded:g}."
            )
        pixels = loaded
    fewest = sum(len(kernel.of_block(block)) for block in least)
    return PixelLoop(kernel, f"{Path(place[0]).name}:{place[1]}", pixels, said.times, most, fewest)


def pixel_loops(kernels: list[Kernel]) -> Iterator[PixelLoop]:
    """Every loop over pixels that a kernel for DETAILED has."""
    for kernel in kernels:
        if not kernel.instructions:
            continue
        here = {below_csrc(place) for one in kernel.instructions for place in one.places}
        for place, said in statements().items():
            if place in here:
                loop = loop_of(kernel, place)
                if loop is None:
                    raise SystemExit(f"{kernel.name}: {place[0]}:{place[1]} is no loop in the machine code.")
                yield measure(kernel, loop, place, said)


def clocks_a_pixel(loop: PixelLoop, conflicts: float = 1) -> dict[str, float]:
    """Clocks of one multiprocessor that each of its units is busy for a pixel, and that memory takes."""
    get = loop.per_pixel
    words = get("words") + (conflicts - 1) * (get("look-ups") + 2 * get("atomic"))
    memory = (get("bytes read") + get("bytes written")) / H200.bytes_a_second
    return {
        "issue": get("all") / RATES["issue"],
        "FMA": (get("fma") + get("imad")) / RATES["fma"],
        "multiply-add": get("imad") / RATES["imad"],
        "ALU": get("alu") / RATES["alu"],
        "float64": get("fp64") / RATES["fp64"],
        "special functions": get("xu") / RATES["xu"],
        "shared memory": words / RATES["shared"],
        "device memory": memory * H200.multiprocessors * H200.gigahertz * 1e9,
    }


def pixels_a_second(clocks: float) -> float:
    """Of a whole H200."""
    return H200.multiprocessors * H200.gigahertz * 1e9 / clocks


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
                loop.line,
                f"{loop.pixels:g}" + (f" x {loop.times}" if loop.times > 1 else ""),
                f"{per('bytes read'):.3g} / {per('bytes written'):.3g}",
                f"{loop.most['wide loads']} / {loop.most['wide stores']}",
                f"{per('all'):.1f} ({loop.fewest / loop.pixels * loop.times:.1f})",
                *(f"{per(kind):.1f}" for kind in ("fma", "imad", "alu", "fp64", "xu", "shared", "atomic", "branch")),
            ]
        )
    names = ["float32", "multiply-add", "other integer", "float64", "special", "shared", "atomics", "branches"]
    return markdown(["kernel", "loop", "pixels", "bytes read / written", "by 16 bytes", "instructions", *names], rows)


def prediction(loops: list[PixelLoop]) -> list[str]:
    """Images a second of every kernel on its own, from its loops over pixels."""
    rows = []
    for name in dict.fromkeys(loop.kernel.name for loop in loops):
        cells = [f"`{name}`"]
        for conflicts in (1.0, RANDOM_BANKS):
            total: Counter[str] = Counter()
            for loop in loops:
                if loop.kernel.name == name:
                    total.update(clocks_a_pixel(loop, conflicts))
            unit, clocks = max(total.items(), key=lambda item: item[1])
            rate = pixels_a_second(clocks)
            cells += [unit, f"{rate / 1e9:.0f}", *(f"{rate / size / 1e3:,.0f}" for size in SIZES.values())]
        rows.append(cells)
    sizes = [f"{size}, thousand images/s" for size in SIZES]
    header = ["kernel", "bound by", "Gpixel/s", *sizes, "at random: bound by", "Gpixel/s", *sizes]
    return markdown(header, rows)


def section(kernels: list[Kernel]) -> str:
    """What stands between the marks of the page."""
    loops = list(pixel_loops(kernels))
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
            "**Prediction** for an H200, each kernel on its own: the busiest of its units, all else hidden behind it.",
            "Left without bank conflicts, right with the look-ups and atomics of a warp at random banks",
            f"({RANDOM_BANKS} times the clocks).",
            "",
            *prediction(loops),
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
