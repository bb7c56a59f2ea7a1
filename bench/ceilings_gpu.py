"""The two ceilings of the device at hand, which every other row is compared with."""

from __future__ import annotations

import torch
from gpu_case import Ceilings, GpuCase
from gpu_timing import copy_bandwidth, milliseconds
from record import Row

COPY, MATMUL = "copy bandwidth", "bf16 matrix product"
SIDE = 8192


def copy(_: Ceilings) -> Row:
    """GB/s, read and written, of a copy of 1 GiB."""
    size = 1 << 30
    _, timing = copy_bandwidth(size)
    rates = {f"p{q}": 2 * size / timing[f"p{100 - q}"] / 1e6 for q in (20, 50, 80)}
    return Row("ceilings_gpu", COPY, "ceilings", {"bytes": size}, **rates, unit="GB/s", repeats=30)


def matmul(_: Ceilings) -> Row:
    """TFLOP/s of a product of two 8192 x 8192 matrices of random numbers."""
    generator = torch.Generator("cuda").manual_seed(0)
    a, b = (torch.randn(SIDE, SIDE, dtype=torch.bfloat16, device="cuda", generator=generator) for _ in range(2))
    timing = milliseconds(lambda: a @ b)
    rates = {f"p{q}": 2 * SIDE**3 / timing[f"p{100 - q}"] / 1e9 for q in (20, 50, 80)}
    return Row("ceilings_gpu", MATMUL, "ceilings", {"side": SIDE}, **rates, unit="TFLOP/s", repeats=30)


def gpu_cases() -> list[GpuCase]:
    """Both."""
    return [
        GpuCase(COPY, copy, importance=0, seconds=5, smoke=True, title="copy bandwidth", group="ceilings"),
        GpuCase(MATMUL, matmul, importance=0, seconds=5, smoke=True, title="bf16 matrix product", group="ceilings"),
    ]
