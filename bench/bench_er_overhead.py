"""What does a call of an ER operator cost beside its work? 64 channels of 7 x 7, batch 1, no gradient, one thread.

An addition of the same maps is timed in turns with them: what any PyTorch operator costs from Python.

Run: python3 dev.py bench bench_er_overhead
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from turns import in_turns, percentiles

from ernet_fast import ERShortcut, er_shortcut_sum
from ernet_fast.er import _ops

CHANNELS, NUM_MAPS = 64, 3
BAR_US = 30


def calls() -> dict[str, Callable[[], Any]]:
    """The calls by name, and the addition under the name "add"."""
    maps = [torch.randn(1, CHANNELS, 7, 7) for _ in range(NUM_MAPS)]
    a, b = torch.randn(NUM_MAPS, CHANNELS), torch.randn(CHANNELS)
    weight = torch.ones(NUM_MAPS - 1, CHANNELS)
    running = [list(torch.zeros(NUM_MAPS - 1, CHANNELS)), list(torch.ones(NUM_MAPS - 1, CHANNELS))]
    module = ERShortcut(CHANNELS, NUM_MAPS - 1).eval()
    evaluation = {"running_mean": running[0], "running_var": running[1], "training": False}
    return {
        "add": lambda: torch.add(maps[0], maps[1]),
        "channel_moments": lambda: _ops.channel_moments(maps[0]),
        "weighted_sum": lambda: _ops.weighted_sum(maps, a, b, True),
        "weighted_dot": lambda: _ops.weighted_dot(maps[0], maps, maps[1]),
        "er_shortcut_sum, training": lambda: er_shortcut_sum(maps, weight, relu=True),
        "er_shortcut_sum, evaluation": lambda: er_shortcut_sum(maps, weight, relu=True, **evaluation),
        "ERShortcut, evaluation": lambda: module(maps),
    }


@pytest.mark.parametrize("name", list(calls())[1:])
def test_call(record_row, torch_threads, name):
    torch_threads(1)
    every = calls()
    with torch.no_grad():
        times = in_turns({"add": every["add"], name: every[name]}, rounds=25, turn=0.005)
    micro = {who: percentiles([1e6 * value for value in values]) for who, values in times.items()}
    operator = name in ("channel_moments", "weighted_sum", "weighted_dot")
    record_row(
        "one call on tiny maps",
        **micro[name],
        unit="us",
        repeats=len(times[name]),
        add_us=micro["add"]["p50"],
        **({"bar": f"p50 <= {BAR_US}"} if operator else {}),
    )
