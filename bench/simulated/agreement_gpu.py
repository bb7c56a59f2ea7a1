"""The emulated kernels against the CPU path."""

from __future__ import annotations

import functools

from agreement import require
from emulated import PLANS, differences, images_of, whole_call
from gpu_case import Ceilings, GpuCase
from record import Row, without_figures

SIZES = [(7, 11), (33, 65)]


def normalize(plan: str, _: Ceilings) -> Row:
    every = [images_of(2, *size) for size in SIZES]
    worst = max(require(differences(whole_call(images, plan), images)) for images in every)
    return without_figures("agreement_gpu", f"macenko {plan}", "pass", f"as the CPU path; off by one: {worst:.2g}")


def gpu_cases() -> list[GpuCase]:
    return [
        GpuCase(f"macenko {plan}", functools.partial(normalize, plan), importance=0, seconds=3, smoke=True)
        for plan in PLANS
    ]
