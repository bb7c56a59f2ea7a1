"""The emulated kernels against the CPU path."""

from __future__ import annotations

import functools

from emulated import PLANS, images_of, largest_difference, whole_call
from gpu_case import Ceilings, GpuCase
from record import Row, without_figures

SIZES = [(7, 11), (33, 65)]


def normalize(plan: str, _: Ceilings) -> Row:
    """A whole call by one plan: within a grey level of the CPU."""
    worst = 0.0
    for size in SIZES:
        images = images_of(2, *size)
        levels, share = largest_difference(whole_call(images, plan), images)
        if levels > 1 or share > max(5e-4, 2 / images.size):
            raise AssertionError(f"{size}: off by {levels} grey levels, {100 * share:.3f} % of the values")
        worst = max(worst, share)
    return without_figures("agreement_gpu", f"macenko {plan}", "pass", f"as the CPU path; off by one: {worst:.2g}")


def gpu_cases() -> list[GpuCase]:
    """Every kernel."""
    return [
        GpuCase(f"macenko {plan}", functools.partial(normalize, plan), importance=0, seconds=3, smoke=True)
        for plan in PLANS
    ]
