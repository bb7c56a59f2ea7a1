"""How fast are Macenko normalisation and fit on one CPU thread, against other packages?

Each group is one operation on one image of one size, everyone fitted to the same target and timed in turns, so that
ratios are within one run. `floor` is the least that any implementation needs: the image read once and, for
normalisation, the result written once, at the bandwidth of a copy of as many bytes in the same run. It is a bound of
memory alone: an exact fit has to see the image at least three times, and its arithmetic costs more than the bytes.

Run: python3 dev.py bench bench/bench_macenko.py
Peers are measured where they import (macenko_peers.py says how to install them); torchstain's come with the project.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from copy_floor import copy_seconds_per_byte
from macenko_images import SIZES, large_image
from macenko_peers import Call, peers_of
from turns import in_turns, percentiles

from ernet_fast.stain import MacenkoNormalizer, macenko_fit, macenko_normalize

MEMORY = {"ernet_fast": torch.contiguous_format, "ernet_fast channels-last": torch.channels_last}
OVERHEAD_SIZE, OVERHEAD_BAR = "64x64", 60
BAR = "ratio_torchstain_torch >= 30"


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return large_image()


@pytest.fixture(scope="module")
def target(image: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(image[:300, :300])


@pytest.fixture(scope="module")
def peers(target: np.ndarray):
    found, missing = peers_of(target)
    for name, reason in missing.items():
        print(f"not measured: {name}: {reason}")
    return found


@pytest.fixture(autouse=True)
def one_thread(torch_threads) -> None:
    torch_threads(1)


def floor_of(size: int, accesses: int) -> dict[str, Any]:
    """The least time for `size` bytes, read once or (2 accesses) read once and written once."""
    what = "read once" if accesses == 1 else "read once, the result written once"
    return {
        "floor": 1e3 * accesses * size * copy_seconds_per_byte(2 * size),
        "floor_why": f"{size} bytes {what}, at the bandwidth of a copy of as many",
    }


def own_calls(operation: str, image: np.ndarray, target: np.ndarray) -> dict[str, Call]:
    fitted = macenko_fit(target)
    calls: dict[str, Call] = {}
    for name, memory in MEMORY.items():
        batch = torch.from_numpy(image).permute(2, 0, 1)[None].contiguous(memory_format=memory)
        if operation == "normalize":
            calls[name] = lambda batch=batch: macenko_normalize(batch, fitted)
        else:
            calls[name] = lambda batch=batch: macenko_fit(batch)
    return calls


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("operation", ["normalize", "fit"])
def test_one_image(record_row, image, target, peers, operation, size):
    height, width = SIZES[size]
    crop = np.ascontiguousarray(image[:height, :width])
    own = own_calls(operation, crop, target)
    theirs = {name: peer[operation == "fit"](crop) for name, peer in peers.items()}
    times = in_turns({**own, **theirs}, rounds=15, budget=6)
    figures = {name: percentiles([1e3 * second for second in seconds]) for name, seconds in times.items()}
    floor = floor_of(crop.size, 2 if operation == "normalize" else 1)
    for name in figures:
        info = {**floor, "title": f"{operation} {size}, {name}"}
        if name in own:
            info |= {
                f"ratio_{other.replace(' ', '_').replace('-', '_')}": figures[other]["p50"] / figures[name]["p50"]
                for other in theirs
            }
            info |= {"bar": BAR} if "torchstain torch" in theirs and size != OVERHEAD_SIZE else {}
        where = {"operation": operation, "size": size, "pixels": height * width, "who": name, "threads": 1}
        record_row(
            f"{operation} {size}", **figures[name], unit="ms", repeats=len(times[name]),
            name=f"{operation} {size} {name}", params=where, **info,
        )  # fmt: skip


def batch_of_64(image: np.ndarray) -> torch.Tensor:
    tiles = [image[y : y + 224, x : x + 224] for y in range(0, 1000, 125) for x in range(0, 1000, 125)]
    return torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2).contiguous()


def test_threads_on_a_batch_of_64(record_row, image, target):
    batch, fitted = batch_of_64(image), macenko_fit(target)

    def on(threads: int) -> Callable[[], torch.Tensor]:
        def call() -> torch.Tensor:
            torch.set_num_threads(threads)
            return macenko_normalize(batch, fitted)

        return call

    times = in_turns({str(threads): on(threads) for threads in (1, 2)}, rounds=25, budget=10)
    figures = {int(name): percentiles([1e3 * second for second in seconds]) for name, seconds in times.items()}
    for threads, found in figures.items():
        torch.set_num_threads(threads)
        info = floor_of(batch.numel(), 2)
        if threads == 2:
            info |= {"ratio_one_thread": figures[1]["p50"] / found["p50"], "bar": "ratio_one_thread >= 1.8"}
        where = {"operation": "normalize", "size": "224x224", "batch": 64, "threads": threads}
        record_row(
            "normalize 64 x 224x224", **found, unit="ms", repeats=len(times[str(threads)]),
            name=f"normalize 64 x 224x224 threads {threads}", params=where,
            title=f"normalize 64 x 224x224, threads: {threads}", **info,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", ["uint8", "float32", "float64"])
def test_dtypes(record_row, image, target, dtype):
    """Floating-point images are worked on in float64 throughout."""
    crop = np.ascontiguousarray(image[:224, :224].transpose(2, 0, 1))[None]
    batch, fitted = torch.from_numpy(crop).to(getattr(torch, dtype)), macenko_fit(target)
    times = in_turns({"normalize": lambda: macenko_normalize(batch, fitted)}, rounds=15, budget=3)["normalize"]
    record_row(
        "normalize 224x224 by dtype", **percentiles([1e3 * second for second in times]), unit="ms", repeats=len(times),
        name=f"normalize 224x224 {dtype}", params={"operation": "normalize", "dtype": dtype, "threads": 1},
        title=f"normalize 224x224, {dtype}", **floor_of(crop.size * batch.element_size(), 2),
    )  # fmt: skip


def test_call_overhead(record_row, image, target):
    """A whole call on a small image, its pixels' work included."""
    height, width = SIZES[OVERHEAD_SIZE]
    tile = torch.from_numpy(np.ascontiguousarray(image[:height, :width].transpose(2, 0, 1)))
    fitted, normalizer = macenko_fit(target), MacenkoNormalizer().fit(target)
    array = np.ascontiguousarray(image[:height, :width])
    calls: dict[str, Call] = {
        "macenko_normalize of a tensor": lambda: macenko_normalize(tile, fitted),
        "macenko_normalize of an array": lambda: macenko_normalize(array, fitted),
        "MacenkoNormalizer of a tensor": lambda: normalizer(tile),
        "macenko_fit of a tensor": lambda: macenko_fit(tile),
    }
    times = in_turns(calls, rounds=50, budget=8)
    for name, seconds in times.items():
        bar = {"bar": f"p50 <= {OVERHEAD_BAR}"} if "normalize" in name.lower() else {}
        record_row(
            f"call {OVERHEAD_SIZE}", **percentiles([1e6 * second for second in seconds]), unit="us",
            repeats=len(seconds), name=f"call {OVERHEAD_SIZE} {name}", params={"call": name, "threads": 1},
            title=f"a whole call on {OVERHEAD_SIZE}, {name}", **bar,
        )  # fmt: skip
