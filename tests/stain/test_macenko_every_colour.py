"""The reconstruction of every 8-bit colour, under every instruction set, to the error it is said to have."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ernet_fast import _backend

RELATIVE_ERROR = 1e-6

# Grey levels e, exact, may come out as anything in [e - 1e-6 e, e + 1e-6 e], truncated for 8-bit images.
PROGRAM = f"""
import sys
import numpy as np
import torch
from stain_images import synthetic_tissue
from ernet_fast import _backend
from ernet_fast.stain import MacenkoNormalizer, macenko_fit, macenko_normalize

assert _backend.extension_available(), _backend.why_unavailable()
error = {RELATIVE_ERROR}
source, target = macenko_fit(synthetic_tissue(60, 70, 1)), MacenkoNormalizer().target
gain = (target.max_concentration / source.max_concentration)[0].numpy()
matrix = (target.stain_matrix[0].numpy() * gain) @ np.linalg.pinv(source.stain_matrix[0].numpy())
od = -np.log((np.arange(256.0) + 1) / 240)
levels = np.arange(256, dtype=np.uint8)
wrong = 0
for red in range(0, 256, int(sys.argv[1])):
    image = np.empty((256, 256, 3), np.uint8)
    image[..., 0], image[..., 1], image[..., 2] = red, levels[:, None], levels
    exact = np.minimum(240 * np.exp(-(od[image] @ matrix.T)), 255)
    found = macenko_normalize(image, target, source)
    wrong += np.count_nonzero((found < np.floor(exact * (1 - error))) | (found > np.floor(exact * (1 + error))))
    for dtype in (np.float32, np.float64) if red % 17 == 0 else ():
        found = macenko_normalize(image.astype(dtype), target, source)
        wrong += np.count_nonzero(np.abs(found - exact) > error * exact)
print(wrong)
"""


@pytest.mark.skipif(not _backend.extension_available(), reason="the compiled operators are not built")
@pytest.mark.parametrize("isa", (_backend.build_info() or {"isa_variants": ["portable"]})["isa_variants"])
def test_every_colour(isa):
    paths = os.pathsep.join([*sys.path, str(Path(__file__).parent)])
    environment = {**os.environ, "ERNET_ISA": isa, "PYTHONPATH": paths}
    # All 2^24 colours under the set that is fastest here, every fifth red level under the others.
    step = "1" if _backend.build_info().get("isa") == isa else "5"
    command = [sys.executable, "-c", PROGRAM, step]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode and "this CPU or this build does not have it" in done.stderr:
        pytest.skip(f"{isa} is not available here")
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) == 0
