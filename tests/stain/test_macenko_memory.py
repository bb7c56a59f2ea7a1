"""Temporary memory of a call: at most 4 bytes a pixel of the image in work, beside the image and the result."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ernet_fast import _backend

BYTES_A_PIXEL = 4
# What an allocator keeps for itself, and the code that is paged in on the way.
SLACK = 4 << 20

PROGRAM = """
import sys
import numpy as np
import torch
from stain_images import synthetic_tissue
from ernet_fast.stain import MacenkoNormalizer, macenko_fit, macenko_normalize

def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) * 1024

kind, layout, dtype, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
size, rng = 2000, np.random.default_rng(0)
if kind == "tissue":
    image = np.tile(synthetic_tissue(80, 100, 1), (25, 20, 1))
else:
    image = rng.integers(0, 200, (3, 3), dtype=np.uint8)[rng.integers(0, 3, (size, size), dtype=np.uint8)]
memory = torch.channels_last if layout == "channels-last" else torch.contiguous_format
small = torch.from_numpy(image[:700, :700].copy()).permute(2, 0, 1)[None].to(getattr(torch, dtype))
images = torch.from_numpy(image).permute(2, 0, 1)[None].to(getattr(torch, dtype)).contiguous(memory_format=memory)
del image
target = MacenkoNormalizer().target
for call, results in ((macenko_fit, 0), (lambda x: macenko_normalize(x, target), 1)):
    call(small)
    before = status("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak counts from here
    result = call(images)
    print(status("VmHWM") - before - results * images.numel() * images.element_size())
    del result
print(size * size)
"""


@pytest.mark.skipif(not _backend.extension_available(), reason="the compiled operators are not built")
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs /proc/self/clear_refs of Linux")
@pytest.mark.parametrize(
    "case",
    [
        ("tissue", "planar", "uint8", "1"),
        ("three colours", "planar", "uint8", "2"),
        ("tissue", "channels-last", "float32", "2"),
    ],
    ids=lambda case: "-".join(case),
)
def test_temporary_memory(case):
    paths = os.pathsep.join([*sys.path, str(Path(__file__).parent)])
    command = [sys.executable, "-c", PROGRAM, *case]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=True)
    *temporary, pixels = map(int, done.stdout.split())
    assert max(temporary) <= BYTES_A_PIXEL * pixels + SLACK, temporary
