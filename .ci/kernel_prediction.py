"""The speed of kernels and of whole calls on an H200 that follows from the counts of their loops over pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from gpu_limits import H200, KIB, MULTIPROCESSORS, RATES

SIZES = {"224²": 224 * 224, "700x460": 700 * 460}
RANDOM_BANKS = 3.5  # largest number of 32 random words in one of 32 banks, on average
# of a table that is repeated so many times, on average
BANKS_OF_COPIES = {32: 1.0, 16: 2.0, 8: 2.9}
# Assumptions, to be held against a measurement
SERIAL = 12.0  # us an image: 1000 dependent float64 operations of one thread, tables, loading begun and stores ended
ROUND = 2.0  # us: some 8 barriers, a scan of 2 x 1024 bins, a serial step
ISSUED = 0.7  # of the clocks that a loop with four warps a scheduler has an instruction to issue in
MISSED = 0.01  # of the lists: in vain, so that all keys are counted; none of the real images has one
# Measured on the real images of the tests, 224x224 crops (tests/simt/test_macenko_lists.py holds the first)
LISTED = 0.03  # of the pixels, for one pair of statistics
PUSHES = 4.0  # most pixels that one thread of a warp lists of a group of 16, on average
CALLS = {
    "224x224": 224 * 224,
    "256x256": 256 * 256,
    "512x512": 512 * 512,
    "700x460": 700 * 460,
    "1024x1024": 1 << 20,
    "4096x4096": 1 << 24,
}
PAIRS = 2  # of statistics: angles, concentrations
LIST_ROUNDS = 2  # over the keys of a list: one narrows the interval, one keeps what is in it
ROUNDS = 2 + LIST_ROUNDS  # for a pair, with the sample, and what it takes to make a list and to leave it
FEW_KEYS = 1 << 16  # up to so many pixels one round of exact keys of all is enough, beyond it two
BESIDE_PIXELS = 16 * KIB  # of a block's shared memory
MOST_BLOCKS = 16  # of a cluster
THREADS = 512  # of a block
GROUP = 16  # pixels
SAMPLED, LEAST_STEP = 8192, 16  # as in csrc/macenko/steps/tails.h
CAPTION = [
    "**Whole calls**, 8-bit, planar, enough images to fill the device: the passes of a call after each other,",
    "each at the speed of its busiest unit. At best: no bank conflicts, nothing beside the passes. Expected:",
    f"random banks, an instruction issued in {100 * ISSUED:.0f} % of the clocks, and, for what a team does between",
    f"the passes, {SERIAL:g} us an image and {ROUND:g} us for each of {PAIRS * ROUNDS} rounds of counting;",
    f"{100 * LISTED:g} % of the pixels are listed, for angles and again for concentrations;",
    f"after {100 * MISSED:g} % of the lists all keys are counted as well.",
]


class Work(Protocol):
    """A loop over pixels, as kernel_counts.PixelLoop has it."""

    work: str

    @property
    def kernel(self) -> Any:
        """The kernel that it is in, which has a name."""

    def per_pixel(self, kind: str) -> float:
        """How many of `kind` there are for a pixel."""


def clocks_a_pixel(loop: Work, conflicts: float = 1, copies: int = 32) -> dict[str, float]:
    """Clocks of one multiprocessor that each of its units is busy for a pixel, and that memory takes."""
    get = loop.per_pixel
    # a team repeats its table of levels, where there is room for every bank; what it does with few pixels is scattered
    repeated = loop.kernel.name.startswith("team_kernel") and " pixel" not in loop.work
    look_ups = min(conflicts, BANKS_OF_COPIES.get(copies, conflicts)) if repeated else conflicts
    words = get("words") + (look_ups - 1) * get("look-ups") + (conflicts - 1) * 2 * get("atomic")
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


def busiest(loop: Work, conflicts: float, copies: int = 32) -> tuple[str, float]:
    """The busiest unit of a loop, and its clocks a pixel."""
    return max(clocks_a_pixel(loop, conflicts, copies).items(), key=lambda item: item[1])


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


def copies_of(pixels: int) -> int:
    """How often a block that holds so many pixels repeats its table of levels; csrc/macenko/cuda/plan.cpp."""
    left = MULTIPROCESSORS["90"].shared_bytes_a_block - BESIDE_PIXELS - 3 * pixels
    copies = 1
    while copies < 32 and 2 * KIB * copies <= min(left, 9 * pixels // 4):
        copies *= 2
    return copies


def kernels_of(blocks: int) -> tuple[str, str, str]:
    """The kernels that load, fit and build the planar 8-bit images that so many blocks share; 0: the streaming ones."""
    if blocks:
        return (f"team_kernel<{'BlockTeam' if blocks == 1 else 'ClusterTeam'}, false>",) * 3
    sums, fit, build = (f"{kernel}_kernel<unsigned char, false>" for kernel in ("begin", "advance", "reconstruct"))
    return sums, fit, build


def passes_of(loops: Sequence[Work], pixels: int, blocks: int) -> list[tuple[Work, float]]:
    """The loops of one planar 8-bit call and how often each is gone through on average; none if one is missing."""
    sums, fit, build = kernels_of(blocks)
    every = [(loop, 1.0) for loop in loops if (loop.kernel.name, loop.work) in {
        (sums, "load_pixels"), (sums, "sums_of_thread"), (build, "rebuild_image image")}]  # fmt: skip
    listed = [(loop, float(PAIRS)) for loop in loops if (loop.kernel.name, loop.work) == (fit, "list_pixels")]
    share = MISSED if blocks else 1.0
    coarse = [(loop, share) for loop in loops if loop.kernel.name == fit and loop.work.startswith("coarse_pass")]
    rounds = share * (2 if pixels > FEW_KEYS else 1)
    exact = [(loop, rounds) for loop in loops if loop.kernel.name == fit and loop.work.startswith("exact_pass")]
    complete = (len(every), len(listed), len(coarse), len(exact)) == (2, int(blocks > 0), PAIRS, PAIRS)
    return [*every, *listed, *coarse, *exact] if complete else []


def few_of(few: Sequence[Work], pixels: int, blocks: int) -> list[tuple[Work, float]]:
    """The work of a call on sampled and listed pixels, and for how many pixels' time a block is busy with each.

    All threads of a warp take part in what one does.
    """
    if not blocks:
        return []
    share = -(-pixels // blocks)
    step = max(-(-pixels // SAMPLED), LEAST_STEP)
    slots = THREADS * -(-LISTED * share // THREADS)
    times = {
        "sample_keys": THREADS * -(-share // step // THREADS),
        "list_pixels": (PUSHES - 1) * share / GROUP,  # the first is counted with the pass
        "evaluate_list": slots,
        "count_listed": LIST_ROUNDS * slots,
    }
    name = kernels_of(blocks)[0]
    mine = [(one, times[one.work.split(",")[0]]) for one in few if one.kernel.name == name]
    return [(one, PAIRS * often) for one, often in mine]


def us_beside(blocks: int, pixels: int) -> float:
    """Microseconds an image that its team is expected to spend between the passes."""
    if not blocks:
        return 0.0
    all_keys = 3 if pixels > FEW_KEYS else 2
    return SERIAL + ROUND * PAIRS * (ROUNDS + MISSED * all_keys)


def plans_table(loops: Sequence[Work], few: Sequence[Work]) -> tuple[list[str], list[list[str]]]:
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
        mine = pixels / share
        work = [(loop, often * mine) for loop, often in passes] + few_of(few, pixels, blocks)
        copies = copies_of(int(mine)) if blocks else 1
        for conflicts, issued, beside in ((1.0, 1.0, 0.0), (RANDOM_BANKS, ISSUED, us_beside(blocks, pixels))):
            clocks = sum(slowed(busiest(one, conflicts, copies), issued) * often for one, often in work)
            seconds = clocks / (H200.gigahertz * 1e9) + 1e-6 * beside
            cells += [f"{1e6 * seconds:,.0f}", f"{H200.multiprocessors // share / seconds:,.0f}"]
        rows.append(cells)
    return head, rows
