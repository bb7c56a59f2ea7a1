"""How many images a second does Macenko normalisation of device memory reach, and how many from the host?

One row is one call on a batch of one size: the time on the device, with the cache flushed before. `copy_time` is the
time that the bytes of the batch, read once and written once, take at the copy bandwidth of the same run. Rows that name
a plan ask for it (ERNET_MACENKO_PLAN); the others take what the library chooses. Uploads are compared with the
bandwidth of a copy from page-locked memory in the same run. Peers are timed interleaved with ours, per image.

Before anything is timed the result of the configuration is compared with the CPU path: at most one grey level and
0.05 % of the values; batches repeat a few images, and every repeat must have the bits of the first.

Run: python3 dev.py gpu --only bench_macenko_gpu
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from agreement_gpu import asking_for, levels, relative, require
from gpu_case import Ceilings, GpuCase
from gpu_timing import milliseconds
from record import Row, without_figures
from this_tree import macenko_peers, percentiles, time_interleaved
from tissue import tissue
from torch import Tensor

SIZES = {
    "224x224": (224, 224),
    "256x256": (256, 256),
    "512x512": (512, 512),
    "700x460": (460, 700),
    "1024x1024": (1024, 1024),
    "4096x4096": (4096, 4096),
}
"""Height and width by the name of a size, which is width x height."""
BATCHES = (1, 16, 256, 1024, 4096)
MOST_PIXELS = 1_400_000_000  # of a batch: 4 GB of images, and as much for the result
DIFFERENT = 8  # images of a batch that are not repeats
REPEATS = 30
MODULE = "bench_macenko_gpu"
# Plans that are compared with the library's choice, by size
PLANS = {
    "224x224": ("streaming", "cluster2"),
    "700x460": ("streaming", "cluster16"),
    "1024x1024": ("streaming",),
}
LEAST = {"224x224": 1_000_000, "700x460": 160_000}  # images a second, at the largest batch
# Fixed-point ODs are off by at most 1.5 units of 2^-24, eigenvectors by up to 30 times that
STAIN_TOLERANCE = 30 * 1.5 * 2.0**-24
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Where:
    """The device, how calls on it are timed and waited for."""

    device: str = "cuda"
    milliseconds: Callable[..., dict[str, float]] = milliseconds
    wait: Callable[[], Any] = torch.cuda.synchronize


CUDA = Where()


def batch_of(size: str, count: int, device: str, channels_last: bool = False) -> tuple[Tensor, Tensor]:
    """The different images on the CPU, and a batch on the device that repeats them."""
    base = tissue(min(count, DIFFERENT), *SIZES[size], channels_last)
    repeats = -(-count // len(base))
    batch = base.to(device).repeat(repeats, 1, 1, 1)[:count]
    return base, batch.contiguous(memory_format=torch.channels_last) if channels_last else batch


def require_repeats(what: str, found: Tensor, period: int) -> None:
    """Every image has the bits of the one that it repeats."""
    for first in range(period, len(found), period):
        part = found[first : first + period]
        if not torch.equal(part, found[: len(part)]):
            raise AssertionError(f"{what}: image {first} or one of the {len(part) - 1} behind it depends on the batch")


def call_of(operation: str, images: Tensor) -> Callable[[], Any]:
    """The call to time; targets and given sources are on the device."""
    from ernet_fast.stain import MacenkoFit, MacenkoNormalizer, macenko_augment, macenko_fit, macenko_normalize

    target = MacenkoNormalizer().to(images.device).target
    if operation == "normalize":
        return lambda: macenko_normalize(images, target)
    if operation == "fit":
        return lambda: macenko_fit(images)
    if operation == "augment":
        return lambda: macenko_augment(images, generator=torch.Generator().manual_seed(0))
    if operation == "normalize, stains given":
        source = MacenkoFit(*(part.clone() for part in macenko_fit(images)))
        return lambda: macenko_normalize(images, target, source)
    if operation == "normalize to bfloat16 input":
        options: dict[str, Any] = {"output": torch.bfloat16, "mean": MEAN, "std": STD}
        return lambda: macenko_normalize(images, target, **options)
    raise ValueError(f"operation {operation!r}")


def verify(operation: str, base: Tensor, call: Callable[[], Any]) -> None:
    """Compare a call on a batch that repeats `base` with the same call on the CPU."""
    found, expected = call(), call_of(operation, base)()
    if operation == "fit":
        period = len(base)
        for name, one, other in zip(found._fields, found, expected, strict=True):
            require_repeats(name, one, period)
            require(name, relative(one[:period], other), STAIN_TOLERANCE)
        return
    require_repeats(operation, found, len(base))
    if found.dtype == torch.uint8:
        levels(operation, found[: len(base)], expected)
    else:  # one grey level is 1 / (255 std); 0.05 % of the values may be off by it
        difference = (found[: len(base)].float().cpu() - expected.float()).abs()
        require(operation, float(difference.max()), 1.01 / (255 * min(STD)) + 2.0**-7)
        require(operation, float((difference > 0).float().mean()), 5e-4)


def measure(
    operation: str, size: str, count: int, channels_last: bool, ceilings: Ceilings, on: Where = CUDA, plan: str = ""
) -> Row:
    """Verify one operation on one batch, then time it."""
    height, width = SIZES[size]
    base, images = batch_of(size, count, on.device, channels_last)
    call = call_of(operation, images)
    with asking_for(plan):
        if operation == "augment":  # images that are alike come out different
            levels(operation, call_of(operation, images[: len(base)])(), call_of(operation, base)())
        else:
            verify(operation, base, call)
        timing = on.milliseconds(call, REPEATS)
    written = {"fit": 0, "normalize to bfloat16 input": 2}.get(operation, 1)
    moved = images.numel() * (1 + written)
    name = name_of(operation, size, count, channels_last, plan)
    where = {"operation": operation, "size": size, "pixels": height * width, "batch": count}
    return Row(
        MODULE, name, f"{operation}, CUDA",
        {**where, "layout": "NHWC" if channels_last else "NCHW", "plan": plan or "chosen"},
        **timing, unit="ms", repeats=REPEATS,
        extra_info={
            "images_per_second": 1e3 * count / timing["p50"],
            "gigapixels_per_second": count * height * width / timing["p50"] / 1e6,
            "copy_time": moved / ceilings.copy_gigabytes_per_second / 1e6,
            "copy_why": f"{moved} bytes, each read or written once / copy bandwidth",
        },
    )  # fmt: skip


def name_of(operation: str, size: str, count: int, channels_last: bool = False, plan: str = "") -> str:
    """What a row is called."""
    return f"{operation} {count} x {size}" + (" NHWC" if channels_last else "") + (f" {plan}" if plan else "")


def against_peers(size: str, _: Ceilings, on: Where = CUDA, count: int = 1024) -> list[Row]:
    """Ours and every peer that works here, interleaved, in microseconds an image."""
    base, images = batch_of(size, count, on.device)
    verify("normalize", base, call_of("normalize", images))
    target = tissue(1, 256, 256)[0].to(on.device)
    peers = {peer.name: peer for peer in macenko_peers.peers_on(on.device)}
    counts = {"ernet_fast": count, **{name: min(count, peer.gpu_images) for name, peer in peers.items()}}
    calls = {name: lambda name=name: peers[name].normalize(images[: counts[name]], target) for name in peers}
    theirs, missing = macenko_peers.working(calls)
    times = time_interleaved({"ernet_fast": call_of("normalize", images), **theirs}, rounds=10, budget=20, wait=on.wait)
    figures = {name: percentiles([1e6 * s / counts[name] for s in seconds]) for name, seconds in times.items()}
    ours = figures.pop("ernet_fast")
    ratios = {
        f"ratio_{name.replace('-', '_').replace(' ', '_').lower()}": found["p50"] / ours["p50"]
        for name, found in figures.items()
    }
    if ratios:
        ratios["ratio_best_peer"] = min(ratios.values())
    group, rounds = f"normalize {size}, CUDA, an image", len(times["ernet_fast"])
    where = {"size": size, "batch": count, "who": "ernet_fast"}
    rows = [
        Row(
            MODULE,
            f"peers {size}",
            group,
            where,
            **ours,
            unit="us",
            repeats=rounds,
            extra_info={**ratios, "missing": missing},
        )
    ]
    for name, found in figures.items():
        mine = {"size": size, "batch": counts[name], "who": name}
        rows.append(Row(MODULE, f"peers {size} {name}", group, mine, **found, unit="us", repeats=rounds))
    return rows + [
        without_figures(MODULE, f"peers {size} {name}", "skipped", reason) for name, reason in missing.items()
    ]


def pinned_milliseconds(size: int, on: Where) -> dict[str, float]:
    """The time of a copy of `size` bytes from page-locked memory to the device."""
    source = torch.empty(size, dtype=torch.uint8, pin_memory=on.device == "cuda").fill_(1)
    target = torch.empty(size, dtype=torch.uint8, device=on.device)
    return on.milliseconds(lambda: target.copy_(source, non_blocking=True), 10)


def upload(size: str, count: int, page_locked: bool, _: Ceilings, on: Where = CUDA, batches: int = 24) -> Row:
    """Batches from the host, uploaded while the ones before are normalised: a whole pass of a Prefetcher."""
    from ernet_fast.data import Prefetcher
    from ernet_fast.stain import MacenkoNormalizer

    base = tissue(DIFFERENT, *SIZES[size]).repeat(-(-count // DIFFERENT), 1, 1, 1)[:count]
    source = [base.pin_memory() if page_locked and on.device == "cuda" else base.clone() for _ in range(4)]
    given = [source[i % len(source)] for i in range(batches)]
    normalizer = MacenkoNormalizer().to(on.device)
    first = normalizer(next(iter(Prefetcher([given[0]], on.device))))
    require_repeats("upload", first, DIFFERENT)
    levels("upload", first[:DIFFERENT], MacenkoNormalizer()(base[:DIFFERENT]))

    def one_pass() -> None:
        for batch in Prefetcher(given, on.device, depth=2):
            normalizer(batch)

    seconds = time_interleaved({"pass": one_pass}, rounds=5, slice_seconds=0.0, budget=30, wait=on.wait)["pass"]
    figures = percentiles([1e3 * value / batches for value in seconds])
    copied = pinned_milliseconds(base.numel(), on)["p50"]
    kind = "page-locked" if page_locked else "ordinary"
    return Row(
        MODULE, f"upload {count} x {size} from {kind} memory", "upload and normalize, CUDA, a batch",
        {"size": size, "batch": count, "memory": kind}, **figures, unit="ms", repeats=len(seconds),
        extra_info={
            "images_per_second": 1e3 * count / figures["p50"], "copy_time": copied,
            "copy_why": f"{base.numel()} bytes copied from page-locked memory in the same run",
            "pinned_gigabytes_per_second": base.numel() / copied / 1e6,
        },
    )  # fmt: skip


def batches_of(size: str) -> Iterator[int]:
    """The batches of a size that fit."""
    height, width = SIZES[size]
    return (count for count in BATCHES if count * height * width <= MOST_PIXELS)


def gpu_cases() -> list[GpuCase]:
    """Every size and batch; the other operations and layouts at one of them; peers; uploads."""
    cases = []
    for size in SIZES:
        largest = max(batches_of(size))
        for count in batches_of(size):
            has_target = size in LEAST and count == largest
            cases.append(
                GpuCase(
                    name_of("normalize", size, count), functools.partial(measure, "normalize", size, count, False),
                    importance=0 if has_target else 1, seconds=8, smoke=has_target, group="normalize, CUDA",
                    title=f"Macenko, {count} images of {size}",
                    targets=[f"images_per_second >= {LEAST[size]}"] if has_target else [],
                )
            )  # fmt: skip
    others = ["fit", "augment", "normalize, stains given", "normalize to bfloat16 input"]
    for size in ("224x224", "700x460"):
        for operation, channels_last in [*((other, False) for other in others), ("normalize", True)]:
            cases.append(
                GpuCase(
                    name_of(operation, size, 1024, channels_last),
                    functools.partial(measure, operation, size, 1024, channels_last), importance=1, seconds=8,
                    group=f"{operation}, CUDA", title=f"Macenko, {operation}, 1024 images of {size}",
                )
            )  # fmt: skip
    for size, plans in PLANS.items():
        for plan in plans:
            cases.append(
                GpuCase(
                    name_of("normalize", size, 1024, plan=plan),
                    functools.partial(measure, "normalize", size, 1024, False, plan=plan), importance=1, seconds=8,
                    group="normalize, CUDA", title=f"Macenko, 1024 images of {size}, {plan}",
                )
            )  # fmt: skip
    for size, importance in (("224x224", 0), ("256x256", 2), ("700x460", 1), ("1024x1024", 2)):
        targets = ["ratio_best_peer >= 15", "ratio_torchstain_torch >= 1000"] if importance < 2 else []
        count = 1024 if size != "1024x1024" else 256
        cases.append(
            GpuCase(
                f"peers {size}", functools.partial(against_peers, size, count=count), importance=importance,
                seconds=40, targets=targets, title=f"Macenko {size} against other packages",
            )
        )  # fmt: skip
    for page_locked in (False, True):
        kind = "page-locked" if page_locked else "ordinary"
        cases.append(
            GpuCase(
                f"upload 1024 x 224x224 from {kind} memory", functools.partial(upload, "224x224", 1024, page_locked),
                importance=1, seconds=20, title=f"Macenko 224x224 from {kind} host memory",
            )
        )  # fmt: skip
    return cases
