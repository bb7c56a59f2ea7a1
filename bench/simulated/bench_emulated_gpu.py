"""The emulated kernels, timed as the real ones are: the times are the emulator's and say nothing about a GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from agreement import levels, require
from emulated import PLANS, differences, emulator, images_of, whole_call
from gpu_case import Ceilings, GpuCase
from gpu_timing import milliseconds
from record import Row

from ernet_fast.stain import MacenkoNormalizer, macenko_fit

COUNT, HEIGHT, WIDTH, ROUNDS = 2, 33, 65, 5
NAME = "macenko_reconstruct"


def row_of(name: str, call: Callable[[], Any], images: np.ndarray, off: float, ceilings: Ceilings) -> Row:
    """The times of a call with `off` values that differ from those of the CPU."""
    return Row(
        "bench_emulated_gpu", name, "emulated", {"images": COUNT, "height": HEIGHT, "width": WIDTH},
        **milliseconds(call, ROUNDS), unit="ms", repeats=ROUNDS,
        extra_info={
            "copy_time": 2 * images.nbytes / ceilings.copy_gigabytes_per_second / 1e6,
            "copy_why": "bytes read and written / copy bandwidth", "share_of_values_off": off / images.size,
        },
    )  # fmt: skip


def reconstruct(ceilings: Ceilings) -> Row:
    """Images of given stains, compared with the CPU operator before they are timed."""
    images = images_of(COUNT, HEIGHT, WIDTH)
    target = MacenkoNormalizer().target
    source = [part.double().numpy() for part in macenko_fit(torch.from_numpy(images))[:2]]
    reference = [target.stain_matrix.double().numpy(), target.max_concentration.double().numpy()]
    call = functools.partial(emulator().reconstruct, images, source, reference)
    given = [torch.from_numpy(part) for part in (*source, *reference)]
    expected = torch.ops.ernet.macenko_reconstruct(torch.from_numpy(images), *given, 240.0)
    return row_of(NAME, call, images, require(levels(NAME, torch.from_numpy(call()), expected)), ceilings)


def normalize(plan: str, ceilings: Ceilings) -> Row:
    """A whole call by one plan, compared with the CPU operator before it is timed."""
    images = images_of(COUNT, HEIGHT, WIDTH)
    call = functools.partial(whole_call, images, plan)
    return row_of(f"normalize, {plan}", call, images, require(differences(call(), images)), ceilings)


def gpu_cases() -> list[GpuCase]:
    case = functools.partial(GpuCase, seconds=3, targets=["share_of_values_off <= 0.0005"])
    return [
        case(NAME, reconstruct, importance=0, smoke=True, title="reconstruction, emulated"),
        *(
            case(f"normalize, {plan}", functools.partial(normalize, plan), smoke=plan == "resident",
                 title=f"whole call, {plan}, emulated")
            for plan in PLANS
        ),
    ]  # fmt: skip
