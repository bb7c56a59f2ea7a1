"""What does a call of an ER operator cost beside its work? 64 channels of 7 x 7, batch 1, one thread.

An addition of the same maps is interleaved with them: what any PyTorch operator costs from Python. A stage is one of
three maps whose convolutions do nothing (`er_stage_epilogues.py`).

Run: python3 dev.py bench bench_er_overhead
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contestants import contestants
from er_stage_epilogues import EpilogueStage, StageShape, give, make_maps, train_epilogues

from ernet_fast import ERShortcut, er_shortcut_sum
from ernet_fast.er import operators

CHANNELS, NUM_MAPS = 64, 3
TARGET_US = 30  # of one operator
ER_CALLS = (
    "channel_moments", "weighted_sum", "weighted_dot", "er_shortcut_sum, training", "er_shortcut_sum, evaluation",
    "ERShortcut, evaluation", "stage, evaluation", "stage, forward + backward",
)  # fmt: skip


def calls() -> dict[str, Callable[[], Any]]:
    """The calls by name, and the addition under the name "add"."""
    maps = [torch.randn(1, CHANNELS, 7, 7) for _ in range(NUM_MAPS)]
    a, b = torch.randn(NUM_MAPS, CHANNELS), torch.randn(CHANNELS)
    weight = torch.ones(NUM_MAPS - 1, CHANNELS)
    running = [list(torch.zeros(NUM_MAPS - 1, CHANNELS)), list(torch.ones(NUM_MAPS - 1, CHANNELS))]
    module = ERShortcut(CHANNELS, NUM_MAPS - 1).eval()
    evaluation = {"running_mean": running[0], "running_var": running[1], "training": False}
    stage_maps = make_maps(StageShape(CHANNELS, 7, NUM_MAPS), 1, torch.contiguous_format)
    for index, z in enumerate(stage_maps.zs[1:], start=1):
        give(index, z, stage_maps.dys[index - 1])
    stage, training_stage = EpilogueStage(CHANNELS, NUM_MAPS).eval(), EpilogueStage(CHANNELS, NUM_MAPS)
    return {
        "add": lambda: torch.add(maps[0], maps[1]),
        "channel_moments": lambda: operators.channel_moments(maps[0]),
        "weighted_sum": lambda: operators.weighted_sum(maps, a, b, True),
        "weighted_dot": lambda: operators.weighted_dot(maps[0], maps, maps[1]),
        "er_shortcut_sum, training": lambda: er_shortcut_sum(maps, weight, relu=True),
        "er_shortcut_sum, evaluation": lambda: er_shortcut_sum(maps, weight, relu=True, **evaluation),
        "ERShortcut, evaluation": lambda: module(maps),
        "stage, evaluation": lambda: stage(stage_maps.zs[0]),
        "stage, forward + backward": functools.partial(train_epilogues, training_stage, stage_maps),
    }


@contestants("call", "add")
@pytest.mark.parametrize("name", ER_CALLS)
def test_call(interleave, record_row, torch_threads, name, who):
    torch_threads(1)
    every = calls()
    with torch.set_grad_enabled("backward" in name):
        found = interleave(lambda: {"call": every[name], "add": every["add"]}, rounds=25, slice_seconds=0.005)
    if who == "call":
        targets = {"target": f"p50 <= {TARGET_US}"} if hasattr(operators, name) else {}
        record_row("one call on tiny maps", **found.figures("call", "us"), **targets)
