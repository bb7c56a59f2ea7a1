"""A whole slide as a memory map: how long, and how much memory of the process?

A synthetic slide of SIZE x SIZE pixels is written to disk, its stains are found and it is normalised into another
memory map, in a process of its own. Its memory before is set against the peak while it runs: all of it, mapped pages
of the two files included. The result is held bit for bit against that of one call: of the whole slide at 5,000 x 5,000,
of three bands of it with the stains that were found at 20,000 x 20,000.

Run: python3 dev.py bench --slow bench_macenko_slide
The large slide needs 2.4 GB on the disk of pytest's temporary folder (--basetemp to choose another).
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from macenko_images import large_image
from process_memory import resident

SMALL, LARGE = 5_000, 20_000
TILE = 1250
MOST_GROWTH = 400  # MiB: the counts of colours, as much again to fit, and a few strips


class Found(NamedTuple):
    """Seconds of all and of counting the colours, bytes before and beyond them at the peak, and whether it is right."""

    seconds: float
    counting: float
    before: int
    grown: int
    right: bool


def write_slide(path: Path, size: int) -> None:
    """Each row of tiles is a little darker or brighter, so that no two are the same."""
    slide = np.lib.format.open_memmap(path, "w+", np.uint8, (size, size, 3))
    row = np.tile(large_image()[:TILE, :TILE], (1, -(-size // TILE), 1))[:, :size]
    rng = np.random.default_rng(0)
    for y in range(0, size, TILE):
        table = np.clip(np.arange(256) + int(rng.integers(-20, 20)), 0, 255).astype(np.uint8)
        slide[y : y + TILE] = table[row[: size - y]]
        slide.base.madvise(mmap.MADV_DONTNEED)
    slide.flush()


def normalize_slide(folder: Path, size: int) -> Found:
    """Normalise the slide of the folder into another memory map, on one thread."""
    from ernet_fast.stain import MacenkoNormalizer, macenko_normalize, macenko_normalize_slide

    torch.set_num_threads(1)
    slide = np.load(folder / "slide.npy", mmap_mode="r")
    out = np.lib.format.open_memmap(folder / "out.npy", "w+", np.uint8, slide.shape)
    target = MacenkoNormalizer().target
    macenko_normalize(large_image()[:64, :64], target)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, begin, marks = resident("VmRSS"), time.perf_counter(), []
    fit = macenko_normalize_slide(slide, out, target, progress=lambda done, work: marks.append(time.perf_counter()))
    seconds, grown = time.perf_counter() - begin, resident("VmHWM") - before
    if size == SMALL:
        right = np.array_equal(out, macenko_normalize(slide, target))
    else:
        bands = (slice(y, y + 300) for y in (0, size // 2, size - 300))
        right = all(np.array_equal(out[band], macenko_normalize(slide[band], target, fit)) for band in bands)
    return Found(seconds, marks[len(marks) // 2 - 1] - begin, before, grown, fit.status.tolist() == [0] and bool(right))


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs /proc/self/clear_refs of Linux")
@pytest.mark.parametrize("size", [SMALL, pytest.param(LARGE, marks=pytest.mark.slow)])
def test_slide(record_row, tmp_path, size):
    write_slide(tmp_path / "slide.npy", size)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(normalize_slide, tmp_path, size).result()
    assert found.right
    where = {"height": size, "width": size, "pixels": size * size, "threads": 1}
    record_row(
        "whole slide", *3 * [found.seconds], "s", name=f"slide {size} x {size}: seconds", params=where,
        repeats=1, title=f"slide of {size} x {size}, time", counting_seconds=found.counting,
        megapixels_per_second=size * size / found.seconds / 1e6,
        detail=f"{found.counting:.1f} s of it to count the colours; files on disk",
    )  # fmt: skip
    before, grown = found.before / 2**20, found.grown / 2**20
    record_row(
        "whole slide", *3 * [grown], "MiB", name=f"slide {size} x {size}: growth of the peak", params=where,
        repeats=1, title=f"slide of {size} x {size}, growth of the peak of memory", peak_before=before,
        peak=before + grown, file_mebibytes=3 * size * size / 2**20, target=f"p50 <= {MOST_GROWTH}",
        detail=f"from {before:.0f} to {before + grown:.0f} MiB of the process, while image and result are "
        f"{6 * size * size / 2**20:,.0f} MiB; "
        + ("bit-identical to one call" if size == SMALL else "three bands bit-identical to one call each"),
    )  # fmt: skip
    for name in ("slide.npy", "out.npy"):
        (tmp_path / name).unlink()
