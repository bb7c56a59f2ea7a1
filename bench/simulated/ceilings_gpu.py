"""The ceilings of the machine that emulates: a copy and a matrix product of the CPU."""

from __future__ import annotations

import torch
from gpu_case import Ceilings, GpuCase
from record import Row
from this_tree import percentiles, time_interleaved

SIZE, SIDE, ROUNDS = 1 << 24, 256, 9


def copy(_: Ceilings) -> Row:
    """GB/s, read and written."""
    source = torch.ones(SIZE, dtype=torch.uint8)
    target = torch.empty_like(source)
    times = time_interleaved({"copy": lambda: target.copy_(source)}, ROUNDS)["copy"]
    rates = percentiles([2 * SIZE / seconds / 1e9 for seconds in times])
    return Row("ceilings_gpu", "copy bandwidth", "ceilings", {"bytes": SIZE}, **rates, unit="GB/s", repeats=ROUNDS)


def matmul(_: Ceilings) -> Row:
    """TFLOP/s of a product of random matrices."""
    a, b = (torch.randn(SIDE, SIDE).bfloat16() for _ in range(2))
    times = time_interleaved({"product": lambda: a @ b}, ROUNDS)["product"]
    rates = percentiles([2 * SIDE**3 / seconds / 1e12 for seconds in times])
    return Row(
        "ceilings_gpu", "bf16 matrix product", "ceilings", {"side": SIDE}, **rates, unit="TFLOP/s", repeats=ROUNDS
    )


def gpu_cases() -> list[GpuCase]:
    """Both."""
    return [
        GpuCase("copy bandwidth", copy, importance=0, seconds=2, smoke=True),
        GpuCase("bf16 matrix product", matmul, importance=0, seconds=2, smoke=True),
    ]
