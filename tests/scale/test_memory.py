"""What `ernet-fast normalize` holds of a file: its pixels once interleaved, and no copy that nobody needs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ernet_fast import _backend
from ernet_fast.data.synthetic import generate_patch
from ernet_fast.scale.target import make_method
from ernet_fast.scale.treat import Limits, normalize, open_picture

# Pillow's 4 and the array's 3 bytes while decoding; 3 + 4 while encoding, and the encoder's rows.
BYTES_A_PIXEL = 8

PROGRAM = """
import resource, sys
from ernet_fast.cli import main
assert main(["normalize", *sys.argv[1:]]) == 0
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def tissue_file(path: Path, repeats: int) -> Path:
    patch = generate_patch(size=(128, 128), seed=0).image.transpose(1, 2, 0)
    Image.fromarray(np.tile(patch, (repeats, repeats, 1))).save(path)
    return path


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak in KiB, as Linux counts it")
@pytest.mark.skipif(not _backend.extension_available(), reason="the compiled operators are not built")
def test_a_large_file_is_held_once(tmp_path: Path) -> None:
    def peak(repeats: int) -> int:
        source = tissue_file(tmp_path / f"{repeats}.png", repeats)
        command = [sys.executable, "-c", PROGRAM, str(source), str(tmp_path / f"{repeats}.out.png")]
        done = subprocess.run(command, env={**os.environ}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return int(done.stdout.rsplit("peak", 1)[1])

    pixels = (40 * 128) ** 2
    assert peak(40) - peak(2) <= BYTES_A_PIXEL * pixels


def test_pixels_stay_interleaved(tmp_path: Path) -> None:
    picture = open_picture(tissue_file(tmp_path / "a.png", 2).read_bytes(), Limits())
    result, _, _ = normalize(picture, make_method("published"), None)
    for pixels in (torch.from_numpy(picture.pixels), result):
        assert pixels.shape == (256, 256, 3) and pixels.dtype == torch.uint8 and pixels.is_contiguous()
