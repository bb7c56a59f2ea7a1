"""The most memory that a process takes for training a network: what the system counts, allocators and all.

Run: python bench/process_memory.py plain|naive|fused DEPTH BATCH      prints bytes beyond those of the imports
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEPS = 3


def peak_of_training(name: str, depth: int, batch: int) -> int:
    """Bytes at the peak of some training steps of one of the networks of `er_networks`, in a new process."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, __file__, name, str(depth), str(batch)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def resident(key: str) -> int:
    """VmRSS (now) or VmHWM (at most so far) of this process, in bytes."""
    found = re.search(rf"^{key}:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    if found is None:
        raise OSError(f"/proc/self/status has no {key}.")
    return 1024 * int(found[1])


def main(name: str, depth: str, batch: str) -> None:
    """Train for some steps and print the peak."""
    from er_networks import batch_of, network, training_of

    before = resident("VmRSS")
    step, _ = training_of(network(name, int(depth)), *batch_of(int(batch)))
    for _ in range(STEPS):
        step()
    print(resident("VmHWM") - before)


if __name__ == "__main__":
    main(*sys.argv[1:])
