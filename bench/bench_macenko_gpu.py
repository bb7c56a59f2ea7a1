"""How many images a second does Macenko normalisation of device memory reach, and how many from the host?

One row is one call on a batch of one size: the time on the device, with the cache flushed before. `copy_time` is the
time that the bytes of the batch, read once and written once, take at the copy bandwidth of the same run. Rows that name
a plan ask for it (ERNET_MACENKO_PLAN); the others take what the library chooses. Uploads are compared with the
bandwidth of a copy from page-locked memory in the same run. Peers are timed interleaved with ours, per image.

Before anything is timed the result of the configuration is compared with the CPU path: at most one grey level and
0.05 % of the values; batches repeat a few images, generated or from `crops.py`, and every repeat must have the bits of
the first.

Run: python3 dev.py gpu --only bench_macenko_gpu
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from agreement import Error, asking_for, levels, relative, require
from crops import SIZE as CROPS_SIZE
from crops import given_crops
from gpu_case import Ceilings, GpuCase
from gpu_timing import milliseconds, wait
from measured import key_of
from record import Row, without_figures
from this_tree import macenko_peers, percentiles, time_interleaved
from tissue import tissue
from torch import Tensor

SIZES = {f"{w}x{h}": (h, w) for w, h in ((224, 224), (256, 256), (512, 512), (700, 460), (1024, 1024), (4096, 4096))}
"""Height and width by the name of a size, which is width x height."""
BATCHES = (1, 16, 256, 1024, 4096)
MOST_PIXELS = 1_400_000_000  # of a batch: 4 GB of images, and as much for the result
DIFFERENT = 8  # images of a batch that are not repeats
REPEATS = 30
MODULE = "bench_macenko_gpu"
DEVICE = "cuda"
# Plans that are compared with the library's choice, by size
PLANS = {"224x224": ("streaming", "cluster2"), "700x460": ("streaming", "cluster16"), "1024x1024": ("streaming",)}
LEAST = {"224x224": 1_000_000, "700x460": 160_000}  # images a second, at the largest batch
# Fixed-point ODs are off by at most 1.5 units of 2^-24, eigenvectors by up to 30 times that
STAIN_TOLERANCE = 30 * 1.5 * 2.0**-24
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def batch_of(size: str, count: int, channels_last: bool = False) -> tuple[Tensor, Tensor]:
    """The different images on the CPU, and a batch on the device that repeats them."""
    crops = given_crops() if size == CROPS_SIZE else None
    if crops is None:
        base = tissue(min(count, DIFFERENT), *SIZES[size], channels_last)
    else:
        base = crops.images[:count]
        base = base.contiguous(memory_format=torch.channels_last) if channels_last else base
    repeats = -(-count // len(base))
    batch = base.to(DEVICE).repeat(repeats, 1, 1, 1)[:count]
    return base, batch.contiguous(memory_format=torch.channels_last) if channels_last else batch


def origin_of(size: str, base: Tensor) -> str:
    """How many different images a batch holds, and where they are from."""
    crops = given_crops() if size == CROPS_SIZE else None
    return f"{len(base)} generated" if crops is None else f"{len(base)} of {crops.origin}"


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
    if operation == "normalize, stains given":
        source = MacenkoFit(*(part.clone() for part in macenko_fit(images)))
        return lambda: macenko_normalize(images, target, source)
    calls: dict[str, Callable[[], Any]] = {
        "normalize": lambda: macenko_normalize(images, target),
        "fit": lambda: macenko_fit(images),
        "augment": lambda: macenko_augment(images, generator=torch.Generator().manual_seed(0)),
        "normalize to bfloat16 input": lambda: macenko_normalize(
            images, target, output=torch.bfloat16, mean=MEAN, std=STD
        ),
    }
    return calls[operation]


def errors(operation: str, base: Tensor, call: Callable[[], Any]) -> Iterator[Error]:
    """Of a call on a batch that repeats `base`, from the same call on the CPU."""
    found, expected, period = call(), call_of(operation, base)(), len(base)
    if operation == "fit":
        for name, one, other in zip(found._fields, found, expected, strict=True):
            require_repeats(name, one, period)
            yield Error(name, relative(one[:period], other), STAIN_TOLERANCE)
        return
    if operation != "augment":  # where images that are alike come out different
        require_repeats(operation, found, period)
    if found.dtype == torch.uint8:
        yield from levels(operation, found[:period], expected)
    else:  # one grey level is 1 / (255 std); 0.05 % of the values may be off by it
        difference = (found[:period].float().cpu() - expected.float()).abs()
        yield Error(operation, float(difference.max()), 1.01 / (255 * min(STD)) + 2.0**-7)
        yield Error(operation, float((difference > 0).float().mean()), 5e-4)


def measure(operation: str, size: str, count: int, channels_last: bool, ceilings: Ceilings, plan: str = "") -> Row:
    height, width = SIZES[size]
    base, images = batch_of(size, count, channels_last)
    call = call_of(operation, images)
    with asking_for(plan):
        # the random numbers of a batch are not those of its first images alone
        require(errors(operation, base, call_of(operation, images[: len(base)]) if operation == "augment" else call))
        timing = milliseconds(call, REPEATS)
    written = {"fit": 0, "normalize to bfloat16 input": 2}.get(operation, 1)
    moved = images.numel() * (1 + written)
    where = {"operation": operation, "size": size, "pixels": height * width, "batch": count}
    return Row(
        MODULE, name_of(operation, size, count, channels_last, plan), f"{operation}, CUDA",
        {**where, "layout": "NHWC" if channels_last else "NCHW", "plan": plan or "chosen"},
        **timing, unit="ms", repeats=REPEATS,
        extra_info={
            "different_images": origin_of(size, base),
            "images_per_second": 1e3 * count / timing["p50"],
            "gigapixels_per_second": count * height * width / timing["p50"] / 1e6,
            "copy_time": moved / ceilings.copy_gigabytes_per_second / 1e6,
            "copy_why": f"{moved} bytes, each read or written once / copy bandwidth",
        },
    )  # fmt: skip


def name_of(operation: str, size: str, count: int, channels_last: bool = False, plan: str = "") -> str:
    return f"{operation} {count} x {size}" + (" NHWC" if channels_last else "") + (f" {plan}" if plan else "")


def against_peers(size: str, _: Ceilings, count: int = 1024) -> list[Row]:
    """An image's time, in microseconds: ours in the whole batch, each peer's in as many images as suit it."""
    base, images = batch_of(size, count)
    require(errors("normalize", base, call_of("normalize", images)))
    target = tissue(1, 256, 256)[0].to(DEVICE)
    peers = {peer.name: peer for peer in macenko_peers.peers_on(DEVICE)}
    counts = {"ernet_fast": count, **{name: min(count, peer.gpu_images) for name, peer in peers.items()}}
    calls = {name: lambda name=name: peers[name].normalize(images[: counts[name]], target) for name in peers}
    theirs, missing = macenko_peers.working(calls)
    times = time_interleaved({"ernet_fast": call_of("normalize", images), **theirs}, rounds=10, budget=20, wait=wait)
    rows = {
        name: Row(
            MODULE, f"peers {size} {name}", f"normalize {size}, CUDA, an image",
            {"size": size, "batch": counts[name], "who": name},
            **percentiles(seconds, 1e6 / counts[name]), unit="us", repeats=len(seconds),
        )
        for name, seconds in times.items()
    }  # fmt: skip
    ours = rows["ernet_fast"]
    ratios = {f"ratio_{key_of(name)}": rows[name].p50 / ours.p50 for name in theirs}
    ours.name = f"peers {size}"
    ours.extra_info = {**ratios, **({"ratio_best_peer": min(ratios.values())} if ratios else {}), "missing": missing}
    skipped = [without_figures(MODULE, f"peers {size} {name}", "skipped", reason) for name, reason in missing.items()]
    return [*rows.values(), *skipped]


def upload(size: str, count: int, page_locked: bool, _: Ceilings, batches: int = 24) -> Row:
    """Batches from the host, uploaded while the ones before are normalised: a whole pass of a Prefetcher."""
    from ernet_fast.data import Prefetcher
    from ernet_fast.stain import MacenkoNormalizer

    base = tissue(DIFFERENT, *SIZES[size]).repeat(-(-count // DIFFERENT), 1, 1, 1)[:count]
    pinned = [base.pin_memory() if DEVICE == "cuda" else base.clone() for _ in range(4)]
    source = pinned if page_locked else [base.clone() for _ in range(4)]
    given = [source[i % len(source)] for i in range(batches)]
    normalizer = MacenkoNormalizer().to(DEVICE)
    first = normalizer(next(iter(Prefetcher([given[0]], DEVICE))))
    require_repeats("upload", first, DIFFERENT)
    require(levels("upload", first[:DIFFERENT], MacenkoNormalizer()(base[:DIFFERENT])))

    def one_pass() -> None:
        for batch in Prefetcher(given, DEVICE, depth=2):
            normalizer(batch)

    seconds = time_interleaved({"pass": one_pass}, rounds=5, slice_seconds=0.0, budget=30, wait=wait)["pass"]
    figures = percentiles(seconds, 1e3 / batches)
    on_device = torch.empty_like(base, device=DEVICE)
    copied = milliseconds(lambda: on_device.copy_(pinned[0], non_blocking=True), 10)["p50"]
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
    height, width = SIZES[size]
    return (count for count in BATCHES if count * height * width <= MOST_PIXELS)


def case(
    operation: str, size: str, count: int, title: str, channels_last: bool = False, plan: str = "", **options: Any
) -> GpuCase:
    run = functools.partial(measure, operation, size, count, channels_last, plan=plan)
    name = name_of(operation, size, count, channels_last, plan)
    kernel = f"macenko {plan}" if plan else "macenko_normalize"
    group = f"{operation}, CUDA"
    return GpuCase(name, run, seconds=8, kernel=kernel, group=group, title=f"Macenko, {title}", **options)


def gpu_cases() -> list[GpuCase]:
    cases = []
    for size in SIZES:
        for count in batches_of(size):
            options: dict[str, Any] = {}
            if size in LEAST and count == max(batches_of(size)):
                options = {"importance": 0, "smoke": True, "headline": True}
                options["targets"] = [f"images_per_second >= {LEAST[size]}"]
            cases.append(case("normalize", size, count, f"{count} images of {size}", **options))
    others = ["fit", "augment", "normalize, stains given", "normalize to bfloat16 input"]
    for size in ("224x224", "700x460"):
        for operation, channels_last in [*((other, False) for other in others), ("normalize", True)]:
            cases.append(case(operation, size, 1024, f"{operation}, 1024 images of {size}", channels_last))
    for size, plans in PLANS.items():
        cases += [case("normalize", size, 1024, f"1024 images of {size}, {plan}", plan=plan) for plan in plans]
    for size, importance in (("224x224", 0), ("256x256", 2), ("700x460", 1), ("1024x1024", 2)):
        targets = ["ratio_best_peer >= 15", "ratio_torchstain_torch >= 1000"] if importance < 2 else []
        run = functools.partial(against_peers, size, count=1024 if size != "1024x1024" else 256)
        title = f"Macenko {size} against other packages"
        cases.append(GpuCase(f"peers {size}", run, importance=importance, seconds=40, targets=targets, title=title))
    for page_locked in (False, True):
        kind = "page-locked" if page_locked else "ordinary"
        name, title = f"upload 1024 x 224x224 from {kind} memory", f"Macenko 224x224 from {kind} host memory"
        cases.append(GpuCase(name, functools.partial(upload, "224x224", 1024, page_locked), seconds=20, title=title))
    return cases
