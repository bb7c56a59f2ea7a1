"""The emulated kernels, timed as the real ones are: the times are the emulator's and say nothing about a GPU."""

from __future__ import annotations

import functools

from agreement import require
from emulated import PLANS, differences, images_of, whole_call
from gpu_case import Ceilings, GpuCase
from gpu_timing import milliseconds
from record import Row

COUNT, HEIGHT, WIDTH, ROUNDS = 2, 33, 65, 5


def normalize(plan: str, ceilings: Ceilings) -> Row:
    """A whole call by one plan, compared with the CPU operator before it is timed."""
    images = images_of(COUNT, HEIGHT, WIDTH)
    call = functools.partial(whole_call, images, plan)
    off = require(differences(call(), images))
    return Row(
        "bench_emulated_gpu", f"normalize, {plan}", "emulated", {"images": COUNT, "height": HEIGHT, "width": WIDTH},
        **milliseconds(call, ROUNDS), unit="ms", repeats=ROUNDS,
        extra_info={
            "copy_time": 2 * images.nbytes / ceilings.copy_gigabytes_per_second / 1e6,
            "copy_why": "bytes read and written / copy bandwidth", "share_of_values_off": off / images.size,
        },
    )  # fmt: skip


def gpu_cases() -> list[GpuCase]:
    return [
        GpuCase(
            f"normalize, {plan}", functools.partial(normalize, plan), seconds=3, smoke=plan == "resident",
            title=f"whole call, {plan}, emulated", targets=["share_of_values_off <= 0.0005"],
        )
        for plan in PLANS
    ]  # fmt: skip
