"""The most memory that a process takes for training a network: what the system counts, allocators and all."""

from __future__ import annotations

import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

STEPS = 3


def peak_of_training(name: str, depth: int, batch: int) -> int:
    """Bytes at the peak of some training steps of one of the networks of `er_networks`, in a new process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(train, name, depth, batch).result()


def resident(key: str) -> int:
    """VmRSS (now) or VmHWM (at most so far) of this process, in bytes."""
    found = re.search(rf"^{key}:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    if found is None:
        raise OSError(f"/proc/self/status has no {key}.")
    return 1024 * int(found[1])


def train(name: str, depth: int, batch: int) -> int:
    """Train for some steps; returns the peak, in bytes beyond those of the imports."""
    from er_networks import batch_of, network, training_of

    before = resident("VmRSS")
    step, _ = training_of(network(name, depth), *batch_of(batch))
    for _ in range(STEPS):
        step()
    return resident("VmHWM") - before
