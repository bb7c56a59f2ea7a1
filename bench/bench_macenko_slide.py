"""A whole slide as a memory map: how long, and how much memory of the process?

A synthetic slide of SIZE x SIZE pixels is written to disk, its stains are found and it is normalised into another
memory map, in a process of its own. Its memory before is set against the peak while it runs: all of it, mapped pages
of the two files included. The result is held bit for bit against that of one call: of the whole slide at 5,000 x 5,000,
of three bands of it with the stains that were found at 20,000 x 20,000.

Run: python3 dev.py bench --slow bench_macenko_slide
The large slide needs 2.4 GB on the disk of pytest's temporary folder (--basetemp to choose another).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parent
SMALL, LARGE = 5_000, 20_000
MOST_GROWTH = 400  # MiB: the counts of colours, as much again to fit, and a few strips

PROGRAM = """
import json, mmap, sys, time
import numpy as np
import torch
from macenko_images import large_image
from ernet_fast.stain import ColourCounts, MacenkoNormalizer, macenko_normalize, macenko_normalize_slide

def mebibytes(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name)) / 1024

folder, size, whole = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "True"
torch.set_num_threads(1)
shape = (size, size, 3)
slide = np.lib.format.open_memmap(f"{folder}/slide.npy", "w+", np.uint8, shape)
tile = large_image()[:1250, :1250]
row = np.tile(tile, (1, -(-size // 1250), 1))[:, :size]
rng = np.random.default_rng(0)
for y in range(0, size, 1250):
    # Each row of tiles is a little darker or brighter, so that no two are the same.
    table = np.clip(np.arange(256) + int(rng.integers(-20, 20)), 0, 255).astype(np.uint8)
    slide[y : y + 1250] = table[row[: size - y]]
    slide.base.madvise(mmap.MADV_DONTNEED)
slide.flush()
del slide
slide = np.load(f"{folder}/slide.npy", mmap_mode="r")
out = np.lib.format.open_memmap(f"{folder}/out.npy", "w+", np.uint8, shape)
target = MacenkoNormalizer().target
macenko_normalize(tile[:64, :64], target)
del row, table
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak counts from here
before, begin, marks = mebibytes("VmRSS"), time.perf_counter(), []
fit = macenko_normalize_slide(slide, out, target, progress=lambda done, work: marks.append(time.perf_counter() - begin))
seconds = time.perf_counter() - begin
grown = mebibytes("VmHWM") - before
first = marks[len(marks) // 2 - 1]
if whole:
    same = np.array_equal(out, macenko_normalize(slide, target))
else:
    bands = (slice(y, y + 300) for y in (0, size // 2, size - 300))
    same = all(np.array_equal(out[band], macenko_normalize(slide[band], target, fit)) for band in bands)
print(json.dumps([seconds, first, before, grown, fit.status.tolist(), bool(same)]))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs /proc/self/clear_refs of Linux")
@pytest.mark.parametrize("size", [SMALL, pytest.param(LARGE, marks=pytest.mark.slow)])
def test_slide(record_row, tmp_path, size):
    paths = [str(BENCH), str(BENCH.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), str(size), str(size == SMALL)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
    seconds, first, before, grown, status, same = json.loads(done.stdout)
    assert status == [0] and same
    where = {"height": size, "width": size, "pixels": size * size, "threads": 1}
    record_row(
        "whole slide", seconds, seconds, seconds, "s", name=f"slide {size} x {size}: seconds", params=where,
        repeats=1, title=f"slide of {size} x {size}, time", counting_seconds=first,
        megapixels_per_second=size * size / seconds / 1e6,
        detail=f"{first:.1f} s of it to count the colours; files on disk",
    )  # fmt: skip
    record_row(
        "whole slide", grown, grown, grown, "MiB", name=f"slide {size} x {size}: growth of the peak", params=where,
        repeats=1, title=f"slide of {size} x {size}, growth of the peak of memory", peak_before=before,
        peak=before + grown, file_mebibytes=3 * size * size / 2**20, target=f"p50 <= {MOST_GROWTH}",
        detail=f"from {before:.0f} to {before + grown:.0f} MiB of the process, while image and result are "
        f"{6 * size * size / 2**20:,.0f} MiB; "
        + ("bit-identical to one call" if size == SMALL else "three bands bit-identical to one call each"),
    )  # fmt: skip
    for name in ("slide.npy", "out.npy"):
        (tmp_path / name).unlink()
