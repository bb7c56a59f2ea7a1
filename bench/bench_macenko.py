"""How fast are Macenko normalisation and fit on one CPU thread, against other packages?

Each group is one operation on one image of one size, every package fitted to the same target and interleaved, so that
ratios are within one run. `copy_time` is the least that memory allows: the image read once and, for
normalisation, the result written once, at the bandwidth of a copy of as many bytes in the same run.
No implementation comes near: an exact fit has to see the image at least three times, and its arithmetic costs more
than the bytes.

Run: python3 dev.py bench bench/bench_macenko.py
Peers are measured where they import (ernet_fast/benchmark/macenko_peers.py says how to install them);
torchstain's come with the project.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from contestants import contestants
from copy_floor import copy_seconds_per_byte
from macenko_images import SIZES, large_image
from measured import key_of
from this_tree import macenko_peers

from ernet_fast.stain import MacenkoNormalizer, macenko_fit, macenko_normalize

MEMORY = {"ernet_fast": torch.contiguous_format, "ernet_fast channels-last": torch.channels_last}
DTYPES = {"uint8": torch.uint8, "float32": torch.float32, "float64": torch.float64}
OVERHEAD_SIZE, OVERHEAD_TARGET = "64x64", 60
OVERHEAD_CALLS = (
    "macenko_normalize of a tensor",
    "macenko_normalize of an array",
    "MacenkoNormalizer of a tensor",
    "macenko_fit of a tensor",
)
TARGET = "ratio_torchstain_torch >= 30"
Call = Callable[[], Any]
PEERS = {peer.name: peer for peer in macenko_peers.peers_on("cpu")}


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return large_image()


@pytest.fixture(scope="module")
def target(image: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(image[:300, :300])


@pytest.fixture(autouse=True)
def one_thread(torch_threads) -> None:
    torch_threads(1)


def copy_of(size: int, accesses: int) -> dict[str, Any]:
    """The least time for `size` bytes, read once or (2 accesses) read once and written once."""
    what = "read once" if accesses == 1 else "read once, the result written once"
    return {
        "copy_time": 1e3 * accesses * size * copy_seconds_per_byte(2 * size),
        "copy_why": f"{size} bytes {what}, at the bandwidth of a copy of as many",
    }


def own_calls(operation: str, image: np.ndarray, target: np.ndarray) -> dict[str, Call]:
    batch, fitted = macenko_peers.planar(image)[None], macenko_fit(target)
    batches = {name: batch.contiguous(memory_format=memory) for name, memory in MEMORY.items()}
    if operation == "fit":
        return {name: functools.partial(macenko_fit, given) for name, given in batches.items()}
    return {name: functools.partial(macenko_normalize, given, fitted) for name, given in batches.items()}


@contestants(*MEMORY, *PEERS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("operation", ["normalize", "fit"])
def test_one_image(interleave, record_row, image, target, operation, size, who):
    height, width = SIZES[size]
    crop = np.ascontiguousarray(image[:height, :width])

    def make():
        given, to = macenko_peers.planar(crop), macenko_peers.planar(target)
        peers = {
            name: lambda peer=peer: peer.normalize(given[None], to) if operation == "normalize" else peer.fit(given)
            for name, peer in PEERS.items()
        }
        theirs, missing = macenko_peers.working(peers)
        for name, reason in missing.items():
            print(f"not measured: {name}: {reason}")
        return {**own_calls(operation, crop, target), **theirs}

    found = interleave(make, rounds=15, budget=6)
    medians = found.medians()
    info = {**copy_of(crop.size, 2 if operation == "normalize" else 1), "title": f"{operation} {size}, {who}"}
    if who in MEMORY:
        info |= {f"ratio_{key_of(peer)}": medians[peer] / medians[who] for peer in PEERS if peer in medians}
        info |= {"target": TARGET} if "torchstain torch" in medians and size != OVERHEAD_SIZE else {}
    where = {"operation": operation, "size": size, "pixels": height * width, "who": who, "threads": 1}
    name = f"{operation} {size} {who}"
    record_row(f"{operation} {size}", **found.percentiles(who), name=name, params=where, **info)


def batch_of_64(image: np.ndarray) -> torch.Tensor:
    tiles = [image[y : y + 224, x : x + 224] for y in range(0, 1000, 125) for x in range(0, 1000, 125)]
    return torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2).contiguous()


@contestants("1", "2")
def test_threads_on_a_batch_of_64(interleave, record_row, image, target, who):
    batch, fitted = batch_of_64(image), macenko_fit(target)

    def on(threads: int) -> torch.Tensor:
        torch.set_num_threads(threads)
        return macenko_normalize(batch, fitted)

    found = interleave(lambda: {name: functools.partial(on, int(name)) for name in ("1", "2")}, rounds=25, budget=10)
    torch.set_num_threads(int(who))
    info = copy_of(batch.numel(), 2)
    if who == "2":
        info |= {"ratio_one_thread": found.medians()["1"] / found.medians()["2"], "target": "ratio_one_thread >= 1.8"}
    group = "normalize 64 x 224x224"
    where = {"operation": "normalize", "size": "224x224", "batch": 64, "threads": int(who)}
    name, title = f"{group} threads {who}", f"{group}, threads: {who}"
    record_row(group, **found.percentiles(who), name=name, params=where, title=title, **info)


@contestants(*DTYPES)
def test_dtypes(interleave, record_row, image, target, who):
    """Floating-point images are worked on in float64 throughout."""
    crop = torch.from_numpy(image[:224, :224].transpose(2, 0, 1).copy())[None]
    normalize = functools.partial(macenko_normalize, target=macenko_fit(target))
    calls = {name: functools.partial(normalize, crop.to(dtype)) for name, dtype in DTYPES.items()}
    found = interleave(lambda: calls, rounds=15, budget=3)
    record_row(
        "normalize 224x224 by dtype", **found.percentiles(who), name=f"normalize 224x224 {who}",
        params={"operation": "normalize", "dtype": who, "threads": 1}, title=f"normalize 224x224, {who}",
        **copy_of(crop.numel() * DTYPES[who].itemsize, 2),
    )  # fmt: skip


@contestants(*OVERHEAD_CALLS)
def test_call_overhead(interleave, record_row, image, target, who):
    """A whole call on a small image, its pixels' work included."""
    height, width = SIZES[OVERHEAD_SIZE]
    array = np.ascontiguousarray(image[:height, :width])
    tile = macenko_peers.planar(array)
    fitted, normalizer = macenko_fit(target), MacenkoNormalizer().fit(target)
    calls: tuple[Call, ...] = (
        lambda: macenko_normalize(tile, fitted),
        lambda: macenko_normalize(array, fitted),
        lambda: normalizer(tile),
        lambda: macenko_fit(tile),
    )
    found = interleave(lambda: dict(zip(OVERHEAD_CALLS, calls, strict=True)), rounds=50, budget=8)
    targets = {"target": f"p50 <= {OVERHEAD_TARGET}"} if "normalize" in who.lower() else {}
    record_row(
        f"call {OVERHEAD_SIZE}", **found.percentiles(who, "us"), name=f"call {OVERHEAD_SIZE} {who}",
        params={"call": who, "threads": 1}, title=f"a whole call on {OVERHEAD_SIZE}, {who}", **targets,
    )  # fmt: skip
