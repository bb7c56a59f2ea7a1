"""Normalisation by one instruction set, which is chosen when a process starts: times of a process of its own.

As a script it prints contestant -> image -> seconds as JSON, by the loops that ERNET_ISA names:

    ERNET_ISA=avx2 PYTHONPATH=. python3 bench/macenko_isa.py IMAGES [CONTESTANT ...]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SIZE, ROUNDS, BUDGET = "224x224", 15, 10
IMAGES = 512
MOST_OF_PEERS = 64  # images, as they take long
CONTESTANTS = ("ernet_fast", "torchstain torch")
RATIOS = {"portable": 8, "avx2": 20, "avx512": 30, "avx512vbmi": 40}
"""How many times as fast as torchstain torch each instruction set is to be from 224x224 on."""


def times_on(isa: str, images: int, only: str | None) -> dict[str, dict[int, list[float]]]:
    """The times by the loops of `isa`, of one contestant or (None) of all interleaved."""
    command = [sys.executable, str(Path(__file__).resolve()), str(images), *([only] if only else CONTESTANTS)]
    environment = {**os.environ, "ERNET_ISA": isa, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} with ERNET_ISA={isa}: {done.stderr.strip()[-800:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return {who: {int(image): seconds for image, seconds in times.items()} for who, times in found.items()}


def main(count: int, names: list[str]) -> None:
    import torch
    from macenko_calls import calls_of
    from macenko_images import different_images, large_image
    from this_tree import interleaved

    torch.set_num_threads(1)
    images, target = different_images(SIZE, count).arrays, large_image()[:300, :300].copy()
    calls = calls_of(names, "normalize", images, target, MOST_OF_PEERS)
    print(json.dumps(interleaved.time_over_images(calls, ROUNDS, BUDGET)))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
