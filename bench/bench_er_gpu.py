"""How near to the copy bandwidth do the ER operators run on a CUDA device?

One row is one operator on the maps of one stage, bfloat16, channels-last, batch 256, with as many maps as the stage's
last block reads. `copy_time` is the time that what the operator must move, each map once, takes at the copy bandwidth:

    channel_moments  reads 1 map      weighted_sum  reads L, writes 1      weighted_dot  reads L + 2, writes 1

The copy is measured in the same run, with the cache flushed before every call, as it is for the operators.

Run: python3 dev.py gpu --only bench_er_gpu
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from agreement_gpu import bound, relative, require
from er_stage_epilogues import STAGES
from gpu_case import Ceilings, GpuCase
from gpu_timing import milliseconds
from record import Row
from torch import Tensor

# Streams of 16-byte loads lose little to a copy, more where each block reads many maps
OPERATORS = {
    "weighted_sum": ["share_of_copy >= 0.9"],
    "weighted_dot": ["share_of_copy >= 0.85"],
    "channel_moments": [],
}
BATCH, REPEATS = 256, 30


class Call(NamedTuple):
    """One operator on one stage: the call, its reference, and the maps that it must read and write."""

    run: Callable[[], Any]
    verify: Callable[[], None]
    accesses: int


def channels_first(values: Tensor) -> Tensor:
    """A value a channel, to be multiplied with maps."""
    return values[:, None, None]


def sum_of(maps: list[Tensor], a: Tensor, b: Tensor) -> Callable[[], None]:
    """Compares a weighted sum with the same formula in float32."""

    def verify() -> None:
        from ernet_fast.er import operators

        found = operators.weighted_sum(maps, a, b, True)
        expected = functools.reduce(
            lambda y, pair: torch.addcmul(y, channels_first(pair[0]), pair[1].float()),
            zip(a, maps, strict=True),
            channels_first(b).expand(maps[0].shape),
        ).relu_()
        error = float((found - expected).norm() / expected.norm())
        require("weighted_sum", error, bound(maps[0].dtype, len(maps)))

    return verify


def make(stage: str, operator: str, batch: int = BATCH) -> Call:
    """The call of `operator` on the maps of `stage`."""
    from ernet_fast.er import operators

    channels, size, num_maps = STAGES[stage]
    torch.manual_seed(0)

    def one_map() -> Tensor:
        x = torch.empty((batch, channels, size, size), dtype=torch.bfloat16, device="cuda")
        return x.contiguous(memory_format=torch.channels_last).normal_()

    maps = [one_map() for _ in range(1 if operator == "channel_moments" else num_maps)]
    terms = batch * size * size
    if operator == "channel_moments":

        def verify_moments() -> None:
            mean, var = operators.channel_moments(maps[0])
            expected = torch.var_mean(maps[0].float(), (0, 2, 3), correction=0)
            limit = 2 * bound(torch.float32, terms, stored=False)  # both sides are float32 sums
            require("variance", relative(var, expected[0]), limit)
            require("mean", relative(mean, expected[1], expected[0].sqrt()), limit)

        return Call(lambda: operators.channel_moments(maps[0]), verify_moments, 1)
    if operator == "weighted_sum":
        a, b = torch.randn(num_maps, channels, device="cuda"), torch.randn(channels, device="cuda")
        return Call(lambda: operators.weighted_sum(maps, a, b, True), sum_of(maps, a, b), num_maps + 1)
    dy, y = one_map(), one_map().relu_()

    def verify_dot() -> None:
        da, db, g = operators.weighted_dot(dy, maps, y)
        masked = torch.where(y > 0, dy, 0)
        require("g", float((g != masked).sum()), 0)
        wide = masked.float()
        limit = 2 * bound(torch.float32, terms, stored=False)
        require("db", relative(db, wide.sum((0, 2, 3)), wide.abs().sum((0, 2, 3))), limit)
        for found, x in zip(da, maps, strict=True):
            product = wide * x
            require("da", relative(found, product.sum((0, 2, 3)), product.abs().sum((0, 2, 3))), limit)

    return Call(lambda: operators.weighted_dot(dy, maps, y), verify_dot, num_maps + 3)


def measure(stage: str, operator: str, ceilings: Ceilings) -> Row:
    """Verify, then time."""
    call = make(stage, operator)
    call.verify()
    torch.cuda.empty_cache()
    channels, size, num_maps = STAGES[stage]
    moved = call.accesses * BATCH * channels * size * size * torch.bfloat16.itemsize
    timing = milliseconds(call.run, REPEATS)
    return Row(
        "bench_er_gpu", f"{operator} {stage}", "ER operators, CUDA",
        {"operator": operator, "stage": stage, "channels": channels, "size": size, "maps": num_maps, "batch": BATCH},
        **timing, unit="ms", repeats=REPEATS,
        extra_info={
            "copy_time": moved / ceilings.copy_gigabytes_per_second / 1e6,
            "copy_why": f"{call.accesses} maps read or written / copy bandwidth",
            "gigabytes_per_second": moved / timing["p50"] / 1e6,
        },
    )  # fmt: skip


def gpu_cases() -> list[GpuCase]:
    """Every operator on every stage; the first stage of each is the smoke level."""
    return [
        GpuCase(
            f"{operator} {stage}", functools.partial(measure, stage, operator), importance=0 if targets else 1,
            seconds=6, smoke=stage == "resnet50-1", group="ER operators, CUDA", targets=targets,
            title=f"{operator}, {channels} x {size} x {size}, {maps} maps",
        )
        for operator, targets in OPERATORS.items()
        for stage, (channels, size, maps) in STAGES.items()
    ]  # fmt: skip
