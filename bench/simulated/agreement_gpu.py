"""The emulated kernels against the CPU path."""

from __future__ import annotations

import torch
from emulated import emulator, images_of
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


def gpu_cases() -> list[GpuCase]:
    """One kernel."""
    return [GpuCase("macenko_moments", moments, importance=0, seconds=3, smoke=True)]
