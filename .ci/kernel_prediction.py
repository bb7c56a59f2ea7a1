"""The speed of kernels and of whole calls on an H200 that follows from the counts of their loops over pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from gpu_limits import H200, KIB, MULTIPROCESSORS, RATES

SIZES = {"224²": 224 * 224, "700x460": 700 * 460}
RANDOM_BANKS = 3.5  # largest number of 32 random words in one of 32 banks, on average
# Assumptions, to be held against a measurement
ONCE_AN_IMAGE = 20.0  # us: some 30 barriers, scans of 2 x 1024 bins, 1000 dependent float64 operations of one thread
ISSUED = 0.7  # of the clocks that a loop with four warps a scheduler has an instruction to issue in
CALLS = {
    "224x224": 224 * 224,
    "256x256": 256 * 256,
    "512x512": 512 * 512,
    "700x460": 700 * 460,
    "1024x1024": 1 << 20,
    "4096x4096": 1 << 24,
}
FEW_KEYS = 1 << 16  # up to so many pixels one round of exact keys is enough, beyond it two
BESIDE_PIXELS = 12 * KIB  # of a block's shared memory
LISTED = 0.035
MOST_BLOCKS = 16  # of a cluster


class Work(Protocol):
    """A loop over pixels, as kernel_counts.PixelLoop has it."""

    work: str

    @property
    def kernel(self) -> Any:
        """The kernel that it is in, which has a name."""

    def per_pixel(self, kind: str) -> float:
        """How many of `kind` there are for a pixel."""


def clocks_a_pixel(loop: Work, conflicts: float = 1) -> dict[str, float]:
    """Clocks of one multiprocessor that each of its units is busy for a pixel, and that memory takes."""
    get = loop.per_pixel
    # a team repeats its table of logarithms for every bank
    scattered = 0.0 if loop.kernel.name.startswith("team_kernel") and loop.work != "load_pixels" else get("look-ups")
    words = get("words") + (conflicts - 1) * (scattered + 2 * get("atomic"))
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


def busiest(loop: Work, conflicts: float) -> tuple[str, float]:
    """The busiest unit of a loop, and its clocks a pixel."""
    return max(clocks_a_pixel(loop, conflicts).items(), key=lambda item: item[1])


def slowed(bound: tuple[str, float], issued: float) -> float:
    """Clocks of a loop that issues in a share of them; memory is not slowed by that."""
    unit, clocks = bound
    return clocks if unit == "device memory" else clocks / issued


def kernels_table(loops: Sequence[Work]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: pixels and images a second of every kernel on its own."""
    rows = []
    for loop in loops:
        if "true" in loop.kernel.name:
            continue
        cells = [f"`{loop.kernel.name}`", loop.work]
        for conflicts in (1.0, RANDOM_BANKS):
            unit, clocks = busiest(loop, conflicts)
            rate = pixels_a_second(clocks)
            cells += [unit, f"{rate / 1e9:.0f}", *(f"{rate / size / 1e3:,.0f}" for size in SIZES.values())]
        rows.append(cells)
    sizes = [f"{size}, thousand images/s" for size in SIZES]
    return ["kernel", "loop", "bound by", "Gpixel/s", *sizes, "at random: bound by", "Gpixel/s", *sizes], rows


def blocks_of(pixels: int) -> int:
    """Blocks that hold an image together; 0 where a cluster is too small for it."""
    limit = MULTIPROCESSORS["90"].shared_bytes_a_block - BESIDE_PIXELS
    blocks = 1
    while blocks <= MOST_BLOCKS and 3 * -(-pixels // blocks) > limit:
        blocks *= 2
    return blocks if blocks <= MOST_BLOCKS else 0


def passes_of(loops: Sequence[Work], pixels: int, blocks: int) -> list[Work]:
    """The loops of one planar 8-bit call, in any order, as often as they are gone through; none if one is missing."""
    if blocks:
        fit = sums = build = f"team_kernel<{'BlockTeam' if blocks == 1 else 'ClusterTeam'}, false>"
    else:
        sums, fit, build = (f"{kernel}_kernel<unsigned char, false>" for kernel in ("begin", "advance", "reconstruct"))
    wanted = {(sums, "load_pixels"), (sums, "sums_of_thread"), (build, "rebuild_image image")}
    wanted |= {(fit, f"coarse_pass {what}_coarse") for what in ("angle", "concentration")}
    found = [loop for loop in loops if (loop.kernel.name, loop.work) in wanted]
    exact = [loop for loop in loops if loop.kernel.name == fit and loop.work.startswith("exact_pass")]
    if (len(found), len(exact)) != (4, 2):
        return []
    return [*found, *exact, *(exact if pixels > FEW_KEYS else [])]


def plans_table(loops: Sequence[Work]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: images a second of whole calls."""
    head = ["call", "plan", "us an image at best", "images/s at best", "us expected", "images/s expected"]
    rows = []
    for size, pixels in CALLS.items():
        blocks = blocks_of(pixels)
        passes = passes_of(loops, pixels, blocks)
        if not passes:
            continue
        plan = {0: "streaming", 1: "resident"}.get(blocks, f"cluster of {blocks}")
        cells = [f"normalize {size}", plan]
        share = blocks or H200.multiprocessors  # multiprocessors that work on an image
        for conflicts, issued, beside in ((1.0, 1.0, 0.0), (RANDOM_BANKS, ISSUED, ONCE_AN_IMAGE if blocks else 0.0)):
            clocks = sum(slowed(busiest(loop, conflicts), issued) for loop in passes)
            seconds = pixels / share * clocks / (H200.gigahertz * 1e9) + 1e-6 * beside
            cells += [f"{1e6 * seconds:,.0f}", f"{H200.multiprocessors // share / seconds:,.0f}"]
        rows.append(cells)
    return head, rows
