"""What does a call of an ER operator cost beside its work? 64 channels of 7 x 7, batch 1, no gradient, one thread.

An addition of the same maps is timed in turns with them: what any PyTorch operator costs from Python.

Run: python3 dev.py bench bench_er_overhead
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from turns import in_turns, percentiles

from ernet_fast import ERShortcut, er_shortcut_sum
from ernet_fast.er import operators
from ernet_fast.er.epilogue import er_block, er_block_backward
from ernet_fast.er.epilogue_arguments import (
    NO_NORM,
    NO_SHORTCUT,
    BranchNorm,
    NormArguments,
    ShortcutArguments,
    block_coefficients,
    block_coefficients_backward,
    new_table,
    new_totals,
)

CHANNELS, NUM_MAPS = 64, 3
BAR_US = 30
COEFFICIENTS = ("block_coefficients", "block_coefficients_backward")
BLOCK = ("er_block", "er_block_backward")
OPERATORS = ("channel_moments", "weighted_sum", "weighted_dot", *COEFFICIENTS, *BLOCK)


def coefficient_calls(maps: list[Tensor], weight: Tensor) -> dict[str, Callable[[], Any]]:
    """The algebra of the last block, forward and backward."""
    table, index, elements, eps = new_table(maps[0], NUM_MAPS), NUM_MAPS - 1, 49, 1e-5
    for earlier in range(index):
        moments = operators.channel_moments(maps[earlier])
        block_coefficients(table, earlier, False, *moments, None, elements, *NO_NORM, *NO_SHORTCUT, eps)
    shortcut = ShortcutArguments(weight, None, None, None, False, 0.1)
    totals, da, db = new_totals(table), torch.randn(NUM_MAPS, CHANNELS), torch.randn(CHANNELS)
    a, _ = block_coefficients(table, index, False, None, None, None, elements, *NO_NORM, *shortcut, eps)
    return {
        COEFFICIENTS[0]: lambda: block_coefficients(
            table, index, False, None, None, None, elements, *NO_NORM, *shortcut, eps
        ),
        COEFFICIENTS[1]: lambda: block_coefficients_backward(
            table, index, False, totals, da, db, None, elements, 0, weight, None, None, False, eps, [a], False, False
        ),
    }


def block_calls(maps: list[Tensor], weight: Tensor) -> dict[str, Callable[[], Any]]:
    """The tail of the last block, forward and backward."""
    table, index, dy, y, eps = new_table(maps[0], NUM_MAPS), NUM_MAPS - 1, maps[0], maps[1], 1e-5
    shortcut = ShortcutArguments(weight, None, None, None, False, 0.1)
    vectors = [torch.ones(CHANNELS) for _ in range(4)]
    norm = NormArguments(BranchNorm.BATCH, *vectors, None, 0.1, eps)
    _, a = er_block(maps, table, 0, True, True, norm, shortcut, eps, True)
    return {
        BLOCK[0]: lambda: er_block(maps, table, index, True, True, norm, shortcut, eps, True),
        BLOCK[1]: lambda: er_block_backward(
            index, maps[-1], dy, y, a, [], None, table, norm.norm, eps, dots=True, measured=True, needed=True
        ),
    }


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
        "channel_moments": lambda: operators.channel_moments(maps[0]),
        "weighted_sum": lambda: operators.weighted_sum(maps, a, b, True),
        "weighted_dot": lambda: operators.weighted_dot(maps[0], maps, maps[1]),
        **coefficient_calls(maps, weight),
        **block_calls(maps, weight),
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
    record_row(
        "one call on tiny maps",
        **micro[name],
        unit="us",
        repeats=len(times[name]),
        add_us=micro["add"]["p50"],
        **({"bar": f"p50 <= {BAR_US}"} if name in OPERATORS else {}),
    )
