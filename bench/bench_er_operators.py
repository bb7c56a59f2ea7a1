"""How near to the copy bandwidth does each ER operator run on the CPU, alone?

One row is one call on the maps that the last block of a stage reads, float32, no gradient. `copy_time` is
what the operator must move, each map once, over the copy bandwidth at the working set of the call:

    channel_moments  reads 1 map      weighted_sum  reads L, writes 1      weighted_dot  reads L + 2, writes 1

Run: python3 dev.py bench bench_er_operators    (with --slow batch 16 too)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contestants import contestants
from er_stage_epilogues import LAYOUTS, QUICK, STAGES, make_maps

from ernet_fast.er import operators

OPERATORS = ("channel_moments", "weighted_sum", "weighted_dot")


def cases() -> list[object]:
    """Every operator, stage, batch, layout and number of threads; most are marked slow."""
    found = []
    for case in itertools.product(OPERATORS, STAGES, (8, 16), LAYOUTS, (1, 2)):
        marks = [] if case[2] == QUICK else [pytest.mark.slow]
        found.append(pytest.param(*case, marks=marks))
    return found


def make(operator: str, stage: str, batch: int, layout: str) -> tuple[Callable[[], Any], int, int]:
    """The call, the maps that it must move, and the bytes of one."""
    maps = make_maps(STAGES[stage], batch, LAYOUTS[layout])
    xs, dy = [z.detach() for z in maps.zs], maps.dys[0]
    if operator == "channel_moments":
        return lambda: operators.channel_moments(xs[0]), 1, maps.map_bytes
    if operator == "weighted_sum":
        a, b = torch.randn(len(xs), dy.shape[1]), torch.randn(dy.shape[1])
        return lambda: operators.weighted_sum(xs, a, b, True), len(xs) + 1, maps.map_bytes
    y = maps.dys[1].relu_()
    return lambda: operators.weighted_dot(dy, xs, y), len(xs) + 3, maps.map_bytes


@contestants("operator", "copy")
@pytest.mark.parametrize(("operator", "stage", "batch", "layout", "threads"), cases())
def test_operator(interleave, record_row, torch_threads, operator, stage, batch, layout, threads, who):
    torch_threads(threads)
    call, accesses, map_bytes = make(operator, stage, batch, layout)
    moved = accesses * map_bytes
    source = torch.ones(moved // 8)
    target = torch.ones_like(source)
    found = interleave(lambda: {"operator": call, "copy": lambda: target.copy_(source)}, rounds=25, budget=0.5)
    if who != "operator":
        return
    figures = found.figures("operator")
    record_row(
        f"{operator}, CPU",
        **figures,
        copy_time=figures["copy_ms"],
        copy_why=f"{accesses} maps read or written / copy of as many bytes, interleaved",
        gigabytes_per_second=moved / figures["p50"] / 1e6,
        copy_gigabytes_per_second=moved / figures["copy_ms"] / 1e6,
    )
