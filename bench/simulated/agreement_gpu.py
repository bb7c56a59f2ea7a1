"""The emulated kernels against the CPU path."""

from __future__ import annotations

import functools

import torch
from emulated import PLANS, emulator, images_of, largest_difference, whole_call
from gpu_case import Ceilings, GpuCase
from record import Row, without_figures

import ernet_fast  # noqa: F401  (registers the operators)

SIZES = [(7, 11), (33, 65)]


def moments(_: Ceilings) -> Row:
    """The bits of the CPU."""
    for size in SIZES:
        images = images_of(2, *size)
        expected = torch.ops.ernet.macenko_moments(torch.from_numpy(images), 240.0, 0.15)
        found = torch.from_numpy(emulator().moments(images))
        if not torch.equal(found, expected):
            raise AssertionError(f"moments of {size}: {found} instead of {expected}")
    return without_figures("agreement_gpu", "macenko_moments", "pass", "the bits of the CPU path")


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
    cases = [GpuCase("macenko_moments", moments, importance=0, seconds=3, smoke=True)]
    return cases + [
        GpuCase(f"macenko {plan}", functools.partial(normalize, plan), importance=0, seconds=3, smoke=True)
        for plan in PLANS
    ]
