"""How near to the copy bandwidth does each ER operator run on the CPU, alone?

One row is one call on the maps that the last block of a stage reads, float32, no gradient. `copy_time` is what the
operator must move (`er_operator_call.py`) over the copy bandwidth at the working set of the call.

Run: python3 dev.py bench bench_er_operators    (with --slow batch 16 too)
"""

from __future__ import annotations

import pytest
import torch
from contestants import contestants
from er_operator_call import operator_call
from er_stage_epilogues import LAYOUTS, STAGES, cases, make_maps


@contestants("operator", "copy")
@pytest.mark.parametrize(("stage", "batch", "layout", "threads"), cases())
@pytest.mark.parametrize("operator", ["channel_moments", "weighted_sum", "weighted_dot"])
def test_operator(interleave, record_row, torch_threads, operator, stage, batch, layout, threads, who):
    torch_threads(threads)
    maps = make_maps(STAGES[stage], batch, LAYOUTS[layout])
    call, _, accesses = operator_call(operator, maps)
    moved = accesses * maps.map_bytes
    source = torch.ones(moved // 8)
    target = torch.ones_like(source)
    found = interleave(lambda: {"operator": call, "copy": lambda: target.copy_(source)}, rounds=25, budget=0.5)
    if who != "operator":
        return
    figures = found.figures("operator")
    record_row(
        f"{operator}, CPU", **figures, copy_time=figures["copy_ms"],
        copy_why=f"{accesses} maps read or written / copy of as many bytes, interleaved",
        gigabytes_per_second=moved / figures["p50"] / 1e6, copy_gigabytes_per_second=moved / figures["copy_ms"] / 1e6,
    )  # fmt: skip
