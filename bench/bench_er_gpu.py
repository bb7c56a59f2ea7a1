"""How near to the copy bandwidth do the ER operators run on a CUDA device?

One row is one operator on the maps of one stage, bfloat16, channels-last, batch 256, with as many maps as the stage's
last block reads. `copy_time` is the time that what the operator must move (`er_operator_call.py`) takes at the copy
bandwidth. The copy is measured in the same run, with the cache flushed before every call, as it is for the operators.

Run: python3 dev.py gpu --only bench_er_gpu
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from agreement import Error, bound, relative, require
from er_operator_call import OperatorCall, operator_call
from er_stage_epilogues import STAGES, make_maps
from gpu_case import Ceilings, GpuCase
from gpu_timing import milliseconds
from record import Row

# Streams of 16-byte loads lose little to a copy, more where each block reads many maps
OPERATORS = {"weighted_sum": ["share_of_copy >= 0.9"], "weighted_dot": ["share_of_copy >= 0.85"], "channel_moments": []}
BATCH, REPEATS = 256, 30


def errors(operator: str, call: OperatorCall) -> Iterator[Error]:
    """Of the result, from the same formula in float32: both sides are sums of that type, one map at a time."""
    found, given = call.run(), call.arguments
    if operator == "weighted_sum":
        maps, a, b, _ = given
        expected = b[:, None, None].expand(maps[0].shape)
        for weight, x in zip(a, maps, strict=True):
            expected = torch.addcmul(expected, weight[:, None, None], x.float())
        expected = expected.relu_()
        error = float((found - expected).norm() / expected.norm())
        yield Error("weighted_sum", error, bound(maps[0].dtype, len(maps)))
        return
    limit = 2 * bound(torch.float32, given[0][:, 0].numel(), stored=False)
    if operator == "channel_moments":
        var, mean = torch.var_mean(given[0].float(), (0, 2, 3), correction=0)
        yield Error("variance", relative(found[1], var), limit)
        yield Error("mean", relative(found[0], mean, var.sqrt()), limit)
        return
    dy, maps, y = given
    masked = torch.where(y > 0, dy, 0)
    yield Error("g", float((found[2] != masked).sum()), 0)
    for name, sums, other in (("db", found[1], 1), *(("da", row, x) for row, x in zip(found[0], maps, strict=True))):
        product = masked.float() * other
        yield Error(name, relative(sums, product.sum((0, 2, 3)), product.abs().sum((0, 2, 3))), limit)


def measure(stage: str, operator: str, ceilings: Ceilings) -> Row:
    channels, size, num_maps = STAGES[stage]
    maps = make_maps(STAGES[stage], BATCH, dtype=torch.bfloat16, device="cuda")
    call = operator_call(operator, maps)
    require(errors(operator, call))
    torch.cuda.empty_cache()
    moved = call.accesses * maps.map_bytes
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
    return [
        GpuCase(
            f"{operator} {stage}", functools.partial(measure, stage, operator), importance=0 if targets else 1,
            seconds=6, smoke=stage == "resnet50-1", headline=bool(targets) and stage == "resnet50-1", kernel=operator,
            group="ER operators, CUDA", targets=targets, title=f"{operator}, {channels} x {size} x {size}, {maps} maps",
        )
        for operator, targets in OPERATORS.items()
        for stage, (channels, size, maps) in STAGES.items()
    ]  # fmt: skip
