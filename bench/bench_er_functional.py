"""How fast is `er_shortcut_sum`, on maps that are given as they are, against the reference, eager and compiled?

One row is forward + backward of one call with ReLU in training mode, on as many maps as the last block of the stage
reads. The floor counts what must move when each call is on its own: forward L maps and y; backward dy, y and L - 1
earlier maps, and L gradients, g being that of the last map. Over whole maps, which channels-last ones are, the earlier
maps are read once more each way, forward for their moments, and g once, backward for their gradients.

Run: python3 dev.py bench bench_er_functional   batch 8, against the reference, eager and compiled
     with --slow batch 16 too, there against the compiled one with --compiled alone (minutes)
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable

import pytest
import torch
from copy_floor import copy_seconds_per_byte
from er_means import record_means
from er_tails import LAYOUTS, STAGES, make_maps
from torch import Tensor
from traffic import bytes_moved
from turns import in_turns, percentiles

from ernet_fast import er_shortcut_sum, reference

QUICK = 8  # batch of the rows that are not slow


def map_accesses(num_maps: int, *, strips: bool) -> int:
    """Reads and writes of one map in forward + backward of one call on `num_maps` maps.

    Strip by strip (contiguous maps) each map is read once each way; see the module's docstring.
    """
    earlier = num_maps - 1
    once = (num_maps + 1) + (2 + earlier + num_maps)
    return once if strips else once + earlier + earlier + 1


def cases() -> list[object]:
    """The stages of the 50-layer net in every batch, layout and number of threads; most are marked slow."""
    found = []
    for stage in STAGES:
        for batch in (8, 16):
            for layout in LAYOUTS:
                marks = [] if batch == QUICK else [pytest.mark.slow]
                found += [pytest.param(stage, batch, layout, threads, marks=marks) for threads in (1, 2)]
    return [case for case in found if "resnet101" not in case.values[0]]


def train(function: Callable[..., Tensor], xs: list[Tensor], weight: Tensor, dy: Tensor) -> None:
    """Forward and backward of one call."""
    for tensor in (*xs, weight):
        tensor.grad = None
    function(xs, weight, relu=True).backward(dy)


@pytest.mark.parametrize(("stage", "batch", "layout", "threads"), cases())
def test_shortcut_sum(record_row, with_compiled, torch_threads, stage, batch, layout, threads):
    torch_threads(threads)
    shape = STAGES[stage]
    maps = make_maps(shape, batch, LAYOUTS[layout])
    xs, dy = [z.requires_grad_() for z in maps.zs], maps.dys[0]
    weight = torch.ones(shape.num_maps - 1, shape.channels, requires_grad=True)
    functions = {"naive": reference.er_shortcut_sum, "fused": er_shortcut_sum}
    if with_compiled or batch == QUICK:
        torch._dynamo.reset()
        functions["compiled"] = torch.compile(reference.er_shortcut_sum, dynamic=False)
    steps = {name: functools.partial(train, function, xs, weight, dy) for name, function in functions.items()}
    for step in steps.values():
        step()
    times = in_turns(steps, rounds=15, budget=3.0)
    milliseconds = {name: 1e3 * statistics.median(values) for name, values in times.items()}
    working_set = (2 * shape.num_maps + 3) * maps.map_bytes  # maps, their gradients, y, dy, g
    accesses = map_accesses(shape.num_maps, strips=layout == "contiguous")
    must_move = accesses * maps.map_bytes
    record_row(
        "er_shortcut_sum, forward + backward",
        **percentiles([1e3 * value for value in times["fused"]]),
        unit="ms",
        repeats=len(times["fused"]),
        peer="naive eager",
        peer_p50=milliseconds["naive"],
        **{f"{name}_ms": value for name, value in milliseconds.items()},
        **{f"ratio_{name}": milliseconds[name] / milliseconds["fused"] for name in times if name != "fused"},
        must_move=must_move,
        **{f"moved_{name}": bytes_moved(steps[name]) for name in ("naive", "fused")},
        floor=1e3 * must_move * copy_seconds_per_byte(working_set),
        floor_why="bytes that one call must move / copy bandwidth at the working set of the call",
        map_accesses=accesses,
    )


def test_means(record, record_row):
    """The geometric means over the stages of ResNet-50 of what the record has by now."""
    if record is None:
        pytest.skip("nothing is recorded without --record")
    record_means(record, record_row, "bench_er_functional", "shortcut_sum")
