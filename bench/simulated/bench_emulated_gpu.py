"""The emulated kernels, timed as the real ones are: the times are the emulator's and say nothing about a GPU."""

from __future__ import annotations

import functools

import numpy as np
import torch
from emulated import PLANS, emulator, images_of, largest_difference, whole_call
from gpu_case import Ceilings, GpuCase
from record import Row
from this_tree import percentiles, time_interleaved

from ernet_fast.stain import MacenkoNormalizer, macenko_fit

COUNT, HEIGHT, WIDTH, ROUNDS = 2, 33, 65, 5
NAME = "macenko_reconstruct"


def reconstruct(ceilings: Ceilings) -> Row:
    """Images rebuilt from given stains, compared with the CPU operator before they are timed."""
    images = images_of(COUNT, HEIGHT, WIDTH)
    target = MacenkoNormalizer().target
    source = [part.double().numpy() for part in macenko_fit(torch.from_numpy(images))[:2]]
    reference = [target.stain_matrix.double().numpy(), target.max_concentration.double().numpy()]
    machine = emulator()

    def call() -> np.ndarray:
        return machine.reconstruct(images, source, reference)

    given = [torch.from_numpy(part) for part in (*source, *reference)]
    expected = torch.ops.ernet.macenko_reconstruct(torch.from_numpy(images), *given, 240.0).numpy()
    off = np.abs(call().astype(int) - expected.astype(int))
    if off.max() > 1:
        raise AssertionError(f"values are off by {off.max()} grey levels")
    times = time_interleaved({"emulated": call}, ROUNDS)["emulated"]
    floor = 2 * images.nbytes / ceilings.copy_gigabytes_per_second / 1e6
    return Row(
        "bench_emulated_gpu", NAME, "emulated", {"images": COUNT, "height": HEIGHT, "width": WIDTH},
        **percentiles([1e3 * seconds for seconds in times]), unit="ms", repeats=ROUNDS,
        extra_info={
            "copy_time": floor, "copy_why": "bytes read and written / copy bandwidth",
            "share_of_values_off": float((off != 0).mean()),
        },
    )  # fmt: skip


def normalize(plan: str, ceilings: Ceilings) -> Row:
    """A whole call by one plan, compared with the CPU operator before it is timed."""
    images = images_of(COUNT, HEIGHT, WIDTH)
    levels, share = largest_difference(whole_call(images, plan), images)
    if levels > 1:
        raise AssertionError(f"values are off by {levels} grey levels")
    times = time_interleaved({plan: lambda: whole_call(images, plan)}, ROUNDS)[plan]
    floor = 2 * images.nbytes / ceilings.copy_gigabytes_per_second / 1e6
    return Row(
        "bench_emulated_gpu", f"normalize, {plan}", "emulated", {"images": COUNT, "height": HEIGHT, "width": WIDTH},
        **percentiles([1e3 * seconds for seconds in times]), unit="ms", repeats=ROUNDS,
        extra_info={
            "copy_time": floor, "copy_why": "bytes read and written / copy bandwidth", "share_of_values_off": share,
        },
    )  # fmt: skip


def gpu_cases() -> list[GpuCase]:
    """The reconstruction, and whole calls by every plan."""
    targets = ["share_of_values_off <= 0.0005"]
    cases = [
        GpuCase(
            NAME, reconstruct, importance=0, seconds=3, smoke=True, title="reconstruction, emulated", targets=targets
        )
    ]
    return cases + [
        GpuCase(
            f"normalize, {plan}", functools.partial(normalize, plan), importance=1, seconds=3,
            smoke=plan == "resident", title=f"whole call, {plan}, emulated", targets=targets,
        )
        for plan in PLANS
    ]  # fmt: skip
