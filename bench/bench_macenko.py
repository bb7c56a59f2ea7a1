"""How fast are Macenko normalisation and fit on one CPU thread, against torchstain's two backends?

Each row is one image of the size given, fitted to the same target; peers get it in their own format. The groups are one
operation at one size, so the relative columns of pytest-benchmark are ratios within one run. `floor_ms` is the time
that the bytes the library's passes must read and write (four reads of the image and one write; three reads for a fit)
take at the copy bandwidth measured for that working
set: a bound of memory alone, far below what the arithmetic of an exact fit costs.

Run: python3 dev.py bench bench/bench_macenko.py
The images are the real ones of $ERNET_TEST_DATA (../shared/data) where they are, else noise around two stains.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from ernet_fast.stain import MacenkoNormalizer, macenko_fit, macenko_normalize

SIZES = {"64x64": (64, 64), "224x224": (224, 224), "700x460": (460, 700), "1024x1024": (1024, 1024)}
WHO = ["ernet_fast", "ernet_fast NHWC", "torchstain torch", "torchstain numpy"]


def source_image() -> np.ndarray:
    """A large H&E image [H, W, 3] uint8."""
    given = os.environ.get("ERNET_TEST_DATA")
    root = Path(given) if given else Path(__file__).resolve().parents[2] / "shared" / "data"
    path = root / "torchstain" / "source.png"
    if path.exists():
        image = np.array(pytest.importorskip("PIL.Image").open(path))[..., :3]
        return np.tile(image, (3, 3, 1))
    rng = np.random.default_rng(0)
    amounts = rng.gamma(1.0, 0.5, (1300, 1300, 2))
    od = amounts @ np.array([[0.65, 0.70, 0.29], [0.2, 0.9, 0.3]])
    return np.clip(240 * np.exp(-od), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def image():
    return source_image()


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def copy_seconds(size: int, count: float) -> float:
    """Seconds to read or write `size` bytes `count` times, at the bandwidth of a copy of as many."""
    source = torch.empty(size, dtype=torch.uint8).fill_(1)
    target = torch.empty_like(source)
    times = []
    for _ in range(50):
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2] / 2 * count


def call(who: str, operation: str, image: np.ndarray, target: np.ndarray):
    """The call to time, with everything prepared."""
    planar = torch.from_numpy(image).permute(2, 0, 1).contiguous()
    if who.startswith("torchstain"):
        backend = who.split()[1]
        peer = pytest.importorskip("torchstain").normalizers.MacenkoNormalizer(backend=backend)
        own = (lambda x: torch.from_numpy(x).permute(2, 0, 1).contiguous()) if backend == "torch" else (lambda x: x)
        peer.fit(own(target))
        mine = own(image)
        return (lambda: peer.normalize(mine, stains=False)) if operation == "normalize" else (lambda: peer.fit(mine))
    batch = planar[None]
    if who.endswith("NHWC"):
        batch = batch.to(memory_format=torch.channels_last)
    fitted = MacenkoNormalizer().fit(target).target
    if operation == "normalize":
        return lambda: macenko_normalize(batch, fitted)
    return lambda: macenko_fit(batch)


@pytest.mark.parametrize("who", WHO)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("operation", ["normalize", "fit"])
def test_one_image(benchmark, image, operation, size, who):
    height, width = SIZES[size]
    run = call(who, operation, np.ascontiguousarray(image[:height, :width]), np.ascontiguousarray(image[:300, :300]))
    benchmark.group = f"{operation} {size}"
    benchmark.extra_info["floor_ms"] = 1e3 * copy_seconds(3 * height * width, 5 if operation == "normalize" else 3)
    benchmark.pedantic(run, rounds=15, iterations=max(1, 100_000 // (height * width)), warmup_rounds=2)


@pytest.mark.parametrize("threads", [1, 2])
def test_batch_of_64(benchmark, image, threads):
    torch.set_num_threads(threads)
    tiles = [image[y : y + 224, x : x + 224] for y in range(0, 1000, 125) for x in range(0, 1000, 125)]
    batch = torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2).contiguous()
    target = MacenkoNormalizer().target
    benchmark.group = "normalize 64 x 224x224"
    benchmark.extra_info["floor_ms"] = 64e3 * copy_seconds(3 * 224 * 224, 5)
    benchmark.pedantic(lambda: macenko_normalize(batch, target), rounds=15, warmup_rounds=2)
