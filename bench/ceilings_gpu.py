"""The two ceilings of the device at hand, which every other row is compared with; small ones of a CPU."""

from __future__ import annotations

import torch
from gpu_case import Ceilings, GpuCase
from gpu_timing import milliseconds
from record import Row

COPY, MATMUL = "copy bandwidth", "bf16 matrix product"
DEVICE, BYTES, SIDE, REPEATS = ("cuda", 1 << 30, 8192, 30) if torch.cuda.is_available() else ("cpu", 1 << 24, 256, 9)


def row_of(name: str, timing: dict[str, float], work: float, unit: str, **params: int) -> Row:
    rates = {f"p{q}": work / timing[f"p{100 - q}"] for q in (20, 50, 80)}
    return Row("ceilings_gpu", name, "ceilings", params, **rates, unit=unit, repeats=REPEATS)


def copy(_: Ceilings) -> Row:
    """GB/s, read and written."""
    source = torch.ones(BYTES, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return row_of(COPY, milliseconds(lambda: target.copy_(source), REPEATS), 2 * BYTES / 1e6, "GB/s", bytes=BYTES)


def matmul(_: Ceilings) -> Row:
    """TFLOP/s of a product of two square matrices of random numbers."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    a, b = (torch.randn(SIDE, SIDE, dtype=torch.bfloat16, device=DEVICE, generator=generator) for _ in range(2))
    return row_of(MATMUL, milliseconds(lambda: a @ b, REPEATS), 2 * SIDE**3 / 1e9, "TFLOP/s", side=SIDE)


def gpu_cases() -> list[GpuCase]:
    return [
        GpuCase(name, run, importance=0, seconds=5, smoke=True, title=name, group="ceilings")
        for name, run in ((COPY, copy), (MATMUL, matmul))
    ]
