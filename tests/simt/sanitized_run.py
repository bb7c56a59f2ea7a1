"""Runs kernels of a sanitized emulator, `sanitized_run.py LIBRARY CASE`, in a process that preloads the sanitizer."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import numpy as np
from emulator import Emulator, Network, pointer


def run_kernels(library: Path) -> None:
    """Every kernel on sizes around the group and tile limits, in both layouts and dtypes, at odd addresses too."""
    rng = np.random.default_rng(0)
    stains = np.array([[[0.65, 0.2], [0.70, 0.8], [0.29, 0.55]]]), np.array([[1.5, 1.0]])
    shapes = [(1, 1, 1), (2, 3, 5), (3, 4, 4), (1, 7, 11), (2, 64, 65), (1, 100, 90)]
    for seed, (count, height, width) in enumerate(shapes):
        emulator = Emulator(library, seed)
        for dtype in (np.uint8, np.float32):
            size = count * 3 * height * width
            memory = rng.integers(0, 256, size + 1, dtype=np.uint8).astype(dtype)
            for flat in (memory[:size].copy(), memory[1:]):
                planar = flat.reshape(count, 3, height, width)
                interleaved = flat.reshape(count, height, width, 3).transpose(0, 3, 1, 2)
                for images in (planar, interleaved):
                    emulator.reconstruct(images, stains, stains)
                    emulator.separate(images, stains, stains, True)
                    if height < 60:
                        run_plans(emulator, images, stains)


def run_plans(emulator: Emulator, images: np.ndarray, stains: tuple[np.ndarray, np.ndarray]) -> None:
    """Fit and reconstruction by every plan, to images and to the input of a network."""
    wanted = [("streaming", 1)]
    wanted += [("resident", 1), ("cluster", 2)] if images.dtype == np.uint8 else []
    for network in (None, Network(np.float16, (0.7, 0.5, 0.6), (0.2, 0.25, 0.3), 3)):
        for kind, blocks in wanted:
            plan = emulator.choose_plan(images, kind, blocks, network is not None)
            emulator.normalize(images, plan, stains, network=network)
            if kind != "streaming" and network is None:  # with lists that are too short, and with none
                for listed in (0, 1):
                    emulator.normalize(images, plan._replace(listed=listed), stains)


def run_overread(library: Path) -> None:
    """One thread more than there are elements."""
    out = np.zeros(128, np.int32)
    lib = ctypes.CDLL(str(library))
    allocated = ctypes.CDLL(None).malloc
    allocated.restype = ctypes.c_void_p
    lib.planted_copy(ctypes.c_void_p(allocated(ctypes.c_size_t(64 * 4))), pointer(out), 96, 65)


if __name__ == "__main__":
    {"kernels": run_kernels, "overread": run_overread}[sys.argv[2]](Path(sys.argv[1]))
    print("finished")
