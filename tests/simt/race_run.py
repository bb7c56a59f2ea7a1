"""Runs kernels of an emulator with ThreadSanitizer, `race_run.py LIBRARY CASE...`, in a process that preloads it.

Each case runs in a process of its own, and prints whether it is `clean`, has a `race`, or another end. `kernels:7` runs
the kernels with the barrier that each thread comes to as its eighth ordering nothing.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import numpy as np
from emulator import Emulator, Network, pointer

RACE = 66  # ThreadSanitizer's exit code
STAINS = np.array([[[0.65, 0.2], [0.70, 0.8], [0.29, 0.55]]]), np.array([[1.5, 1.0]])
PLANTED = ("rounds", "warp", "last_block", "count", "neighbour", "early_exit")


def stained(count: int, height: int, width: int) -> np.ndarray:
    """Images [B, 3, H, W] of two stains in random amounts."""
    rng = np.random.default_rng(height)
    amounts = rng.gamma(2, 0.4, (count, height * width, 2))
    light = 240 * np.exp(-amounts @ STAINS[0][0].T)
    return np.ascontiguousarray(light.astype(np.uint8).transpose(0, 2, 1)).reshape(count, 3, height, width)


def run_kernels(library: Path, parts: tuple[str, ...] = ("resident", "cluster", "streaming", "draw")) -> None:
    """Every kernel: two images for each block, all ways of a list, several blocks an image, both layouts and dtypes."""
    images = stained(2, 30, 37)
    network = Network(np.float16, (0.7, 0.5, 0.6), (0.2, 0.25, 0.3), 3)
    for seed, kind in enumerate(parts):
        emulator = Emulator(library, seed)
        if kind in ("resident", "cluster"):
            plan = emulator.choose_plan(images, kind, 2)
            for listed in (plan.listed, 1):
                emulator.normalize(images, plan._replace(listed=listed), STAINS, multiprocessors=plan.blocks)
            emulator.normalize(images[:1].transpose(0, 1, 3, 2).copy(), plan, STAINS, network=network)
        elif kind == "streaming":
            several = stained(1, 70, 120)
            emulator.normalize(several, None, STAINS)
            last = np.ascontiguousarray(several.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
            emulator.fit(last.astype(np.float32)[:, :, :35])
        else:
            emulator.reconstruct(images, STAINS, STAINS)
            emulator.separate(images.astype(np.float32), STAINS, STAINS, True)


def run_planted(library: Path, name: str) -> None:
    """A planted kernel, `NAME=1` without its error, `NAME=0` with it."""
    kernel, _, right = name.partition("=")
    out = np.zeros(256, np.int32)
    getattr(ctypes.CDLL(str(library)), f"planted_{kernel}")(pointer(out), int(right))


def run_case(library: Path, case: str) -> None:
    what, _, omitted = case.partition(":")
    if omitted:
        ctypes.CDLL(str(library)).simt_omit_barrier(int(omitted))
    if "=" in what:
        return run_planted(library, what)
    return run_kernels(library, *([] if what == "kernels" else [(what,)]))


def verdict(library: Path, case: str) -> str:
    """How a case ends in a process of its own."""
    child = os.fork()
    if child == 0:
        try:
            run_case(library, case)
        except BaseException as error:
            print(f"{case}: {error!r}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return {0: "clean", RACE: "race"}.get(code, f"exit code {code}")


if __name__ == "__main__":
    for case in sys.argv[2:]:
        print(case, verdict(Path(sys.argv[1]), case), flush=True)
