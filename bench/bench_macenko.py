"""How fast are Macenko normalisation and fit on one CPU thread, on many different images, against other packages?

Every contestant, fitted to the same target, cycles through the images: one call an image a round, interleaved image by
image with the other packages. An image's time is the median of its rounds; a row has percentiles and the largest over
the images, and the ratio to each package as the median and the least of the images' own ratios. From 224x224 on
other packages get fewer of the images, and their rows say how many. Images are real where the data is, else
generated (macenko_images.py); each row says which.

`copy_time` is the least that memory allows: the image read once and, for normalisation, the result written once, at
the bandwidth of a copy of as many bytes in the same run. No implementation comes near: an exact fit has to see the
image at least three times, and its arithmetic costs more than the bytes.

Run: python3 dev.py bench bench/bench_macenko.py [--images N]
Peers are measured where they import (ernet_fast/benchmark/macenko_peers.py says how to install them);
torchstain's come with the project.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from contestants import contestants
from copy_floor import copy_seconds_per_byte
from macenko_calls import OWN, PEERS, calls_of, tensor_of
from macenko_images import ADVERSARIAL, SIZES, Images, adversarial, different_images, large_image
from macenko_isa import CONTESTANTS, IMAGES, RATIOS, times_on
from this_tree import interleaved, processor

from ernet_fast import _backend
from ernet_fast.stain import MacenkoNormalizer, macenko_fit, macenko_normalize

COUNTS = {"700x460": 64, "1024x1024": 64}  # of images; of smaller ones:
COUNT = 128
PEER_COUNTS = {"224x224": 64, "700x460": 16, "1024x1024": 8}  # of smaller ones all
BUDGETS = {"224x224": 12}  # seconds; of other sizes:
BUDGET = 6
SMALL = ("64x64", "96x96")
ISA = (_backend.build_info() or {"isa": "portable"})["isa"]
RATIO, SMALL_RATIO = f"ratio_torchstain_torch >= {RATIOS[ISA]}", "ratio_torchstain_torch >= 25"
NO_SLOW_IMAGE = ["p99_of_median <= 1.25", "max_of_median <= 1.6"]
DTYPES: dict[str, tuple[torch.dtype, float]] = {  # by how much of the time of uint8 each may take
    "uint8": (torch.uint8, 1), "float32 from bytes": (torch.float32, 3), "float32": (torch.float32, 5),
    "float64": (torch.float64, 5), "float16": (torch.float16, 5), "bfloat16": (torch.bfloat16, 5),
}  # fmt: skip
OVERHEAD_SIZE, OVERHEAD_TARGET = "64x64", 60
OVERHEAD_CALLS = (
    "macenko_normalize of a tensor",
    "macenko_normalize of an array",
    "MacenkoNormalizer of a tensor",
    "macenko_fit of a tensor",
)
COMMON = "common tissue"


@pytest.fixture(scope="module")
def target() -> np.ndarray:
    return np.ascontiguousarray(large_image()[:300, :300])


@functools.lru_cache(maxsize=1)  # those of 1024x1024 take 200 MB
def images_of(size: str, count: int) -> Images:
    return different_images(size, count)


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


def targets_of(operation: str, size: str) -> list[str]:
    if operation == "fit":
        return [] if size in SMALL else [RATIO]
    return [SMALL_RATIO if size in SMALL else RATIO, *NO_SLOW_IMAGE]


def against_torchstain(found: Any, who: str) -> dict[str, Any]:
    """Ratios to the other packages, and torchstain torch as the peer of the tables."""
    ratios = {key: value for key, value in found.ratios(who).items() if "ernet_fast" not in key}
    if "torchstain torch" not in found.times:
        return ratios
    peer = {"peer": "torchstain torch", "peer_p50": found.medians()["torchstain torch"]}
    return {**ratios, **peer, "ratio": ratios["ratio_torchstain_torch"]}


@contestants(*OWN, *PEERS)
@pytest.mark.parametrize("operation", ["normalize", "fit"])
@pytest.mark.parametrize("size", SIZES)
def test_one_image(interleave_images, record_row, most_images, target, operation, size, who):
    height, width = SIZES[size]
    images = images_of(size, most_images(COUNTS.get(size, COUNT)))

    def timed(only):
        names = [only] if only else [*OWN, *PEERS]
        calls = calls_of(names, operation, images.arrays, target, PEER_COUNTS.get(size, COUNT))
        return interleaved.time_over_images(calls, rounds=15, budget=BUDGETS.get(size, BUDGET))

    found = interleave_images(timed)
    info = {**copy_of(3 * height * width, 2 if operation == "normalize" else 1), "images_from": images.origin}
    if who in OWN:
        info |= {**against_torchstain(found, who), "isa": ISA, "target": targets_of(operation, size)}
    elif len(found.times[who]) < len(images.arrays):
        info["images_from"] += f"; {len(found.times[who])} of these alone, as it takes long"
    where = {"operation": operation, "size": size, "pixels": height * width, "who": who, "threads": 1}
    name, title = f"{operation} {size} {who}", f"{operation} {size}, {who}"
    record_row(f"{operation} {size}", **found.figures(who), name=name, params=where, title=title, **info)


@contestants(*CONTESTANTS)
@pytest.mark.parametrize("isa", RATIOS)
def test_instruction_sets(interleave_images, record_row, most_images, isa, who):
    """Each in a process of its own."""
    variants = (_backend.build_info() or {"isa_variants": []})["isa_variants"]
    if isa not in variants or isa not in processor.processor()["instruction_sets"]:
        pytest.skip(f"this CPU or this build has no {isa}")
    count = most_images(IMAGES)
    found = interleave_images(lambda only: times_on(isa, count, only))
    if who == OWN[0]:
        group = "normalize 224x224 by instruction set"
        info = {"images_from": images_of("224x224", count).origin, **against_torchstain(found, who)}
        record_row(
            group, **found.figures(who), name=f"normalize 224x224 ISA {isa}", title=f"normalize 224x224, {isa}", **info,
            params={"operation": "normalize", "isa": isa, "threads": 1},
            target=[f"ratio_torchstain_torch >= {RATIOS[isa]}", *NO_SLOW_IMAGE],
        )  # fmt: skip


@contestants(COMMON, *ADVERSARIAL)
def test_adversarial_images(interleave_images, record_row, most_images, target, who):
    """Images that are hard on a search for percentiles, against the median of common ones in the same run."""
    common = images_of("224x224", most_images(COUNT)).arrays[: most_images(32)]
    fitted = macenko_fit(target)

    def timed(only):
        calls = {}
        for kind in (COMMON, *ADVERSARIAL) if only is None else (only,):
            arrays = common if kind == COMMON else [adversarial(kind, seed) for seed in range(most_images(8))]
            calls[kind] = {
                number: functools.partial(macenko_normalize, tensor_of(image), fitted)
                for number, image in enumerate(arrays)
            }
        return interleaved.time_over_images(calls, rounds=15, budget=4)

    found = interleave_images(timed)
    if who != COMMON:
        figures = found.figures(who)
        over_common = {"peer": "common images", "max_of_common": figures["max"] / found.medians()[COMMON]}
        record_row(
            "normalize 224x224, adversarial images", **figures, name=f"normalize 224x224 adversarial {who}",
            params={"operation": "normalize", "adversarial": who, "threads": 1}, title=f"normalize 224x224, {who}",
            peer_p50=found.medians()[COMMON], target="max_of_common <= 3", images_from="made for this", **over_common,
        )  # fmt: skip


def batch_of_64(count: int) -> torch.Tensor:
    images = images_of("224x224", count).arrays
    tiles = [images[number % len(images)] for number in range(64)]
    return torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2).contiguous()


@contestants("1", "2")
def test_threads_on_a_batch_of_64(interleave, record_row, most_images, target, who):
    batch, fitted = batch_of_64(most_images(COUNT)), macenko_fit(target)

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


def of_dtype(name: str, image: np.ndarray, number: int) -> torch.Tensor:
    """The image as [1, 3, H, W]: its bytes, these over 255, or values of [0, 1] that no byte has."""
    pixels, dtype = tensor_of(image), DTYPES[name][0]
    if name == "uint8":
        return pixels
    unit = pixels.double() / 255
    if name != "float32 from bytes":
        generator = torch.Generator().manual_seed(number)
        unit = (unit + (torch.rand(unit.shape, generator=generator, dtype=unit.dtype) - 0.5) / 255).clamp(0, 1)
    return unit.to(dtype)


@contestants(*DTYPES)
def test_dtypes(interleave_images, record_row, most_images, target, who):
    """A dozen images: bytes; float32 in [0, 1] that began as bytes; other values in [0, 1] in every dtype."""
    images = images_of("224x224", most_images(COUNT))
    dozen, fitted = images.arrays[: most_images(12)], macenko_fit(target)

    def call_of(name, image, number):
        scale = {} if name == "uint8" else {"range": 1}
        return functools.partial(macenko_normalize, of_dtype(name, image, number), fitted, **scale)

    def timed(only):
        calls = {
            name: {number: call_of(name, image, number) for number, image in enumerate(dozen)}
            for name in ([only] if only else DTYPES)
        }
        return interleaved.time_over_images(calls, rounds=15, budget=5)

    found = interleave_images(timed)
    dtype, most = DTYPES[who]
    info: dict[str, Any] = copy_of(3 * 224 * 224 * dtype.itemsize, 2)
    if who != "uint8":
        middle, least = interleaved.ratios(found.of_images(who), found.of_images("uint8"))
        info |= {"times_uint8": 1 / middle, "worst_times_uint8": 1 / least, "target": f"times_uint8 <= {most:g}"}
    record_row(
        "normalize 224x224 by dtype", **found.figures(who), name=f"normalize 224x224 {who}",
        params={"operation": "normalize", "dtype": who, "threads": 1}, title=f"normalize 224x224, {who}", **info,
    )  # fmt: skip


@contestants(*OVERHEAD_CALLS)
def test_call_overhead(interleave_images, record_row, most_images, target, who):
    """A whole call on a small image, its pixels' work included."""
    images = images_of(OVERHEAD_SIZE, most_images(64))
    fitted, normalizer = macenko_fit(target), MacenkoNormalizer().fit(target)

    def calls_on(array: np.ndarray):
        tile = tensor_of(array)[0]
        return (
            lambda: macenko_normalize(tile, fitted),
            lambda: macenko_normalize(array, fitted),
            lambda: normalizer(tile),
            lambda: macenko_fit(tile),
        )

    def timed(only):
        of_image = [dict(zip(OVERHEAD_CALLS, calls_on(array), strict=True)) for array in images.arrays]
        names = [only] if only else OVERHEAD_CALLS
        calls = {name: {number: calls[name] for number, calls in enumerate(of_image)} for name in names}
        return interleaved.time_over_images(calls, rounds=25, budget=4)

    found = interleave_images(timed)
    targets = {"target": f"p50 <= {OVERHEAD_TARGET}"} if "normalize" in who.lower() else {}
    record_row(
        f"call {OVERHEAD_SIZE}", **found.figures(who, "us"), name=f"call {OVERHEAD_SIZE} {who}",
        params={"call": who, "threads": 1}, title=f"a whole call on {OVERHEAD_SIZE}, {who}",
        images_from=images.origin, **targets,
    )  # fmt: skip
