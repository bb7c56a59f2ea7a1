"""How fast is `er_shortcut_sum`, on maps that are given as they are, against the reference, eager and compiled?

One row is forward + backward of one call with ReLU in training mode, on as many maps as the last block of the stage
reads. `copy_time` counts what must move when each call is on its own: forward L maps and y; backward dy, y and L - 1
earlier maps, and L gradients, g being that of the last map. Over whole maps, which channels-last ones are, the earlier
maps are read once more each way, forward for their moments, and g once, backward for their gradients.

Run: python3 dev.py bench bench_er_functional   batch 8, against the reference, eager and compiled
     with --slow batch 16 too, there against the compiled one with --compiled alone (minutes)
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from contestants import contestants
from copy_floor import copy_time
from er_means import STAGES_50, mean_rows
from er_stage_epilogues import LAYOUTS, QUICK, STAGES, cases, make_maps
from torch import Tensor
from traffic import bytes_moved

from ernet_fast import er_shortcut_sum, reference


def map_accesses(num_maps: int, *, tiled: bool) -> int:
    """Reads and writes of one map in forward + backward of one call on `num_maps` maps.

    Channel tile by channel tile (contiguous maps) each map is read once each way; see the module's docstring.
    """
    earlier = num_maps - 1
    once = (num_maps + 1) + (2 + earlier + num_maps)
    return once if tiled else once + earlier + earlier + 1


def train(function: Callable[..., Tensor], xs: list[Tensor], weight: Tensor, dy: Tensor) -> None:
    for tensor in (*xs, weight):
        tensor.grad = None
    function(xs, weight, relu=True).backward(dy)


@contestants("fused", "naive", "compiled")
@pytest.mark.parametrize(("stage", "batch", "layout", "threads"), cases(STAGES_50))
def test_shortcut_sum(interleave, record_row, with_compiled, torch_threads, stage, batch, layout, threads, who):
    torch_threads(threads)
    shape = STAGES[stage]
    maps = make_maps(shape, batch, LAYOUTS[layout])
    xs, dy = [z.requires_grad_() for z in maps.zs], maps.dys[0]
    weight = torch.ones(shape.num_maps - 1, shape.channels, requires_grad=True)

    def make():
        functions = {"fused": er_shortcut_sum, "naive": reference.er_shortcut_sum}
        if with_compiled or batch == QUICK:
            torch._dynamo.reset()
            functions["compiled"] = torch.compile(reference.er_shortcut_sum, dynamic=False)
        return {name: functools.partial(train, function, xs, weight, dy) for name, function in functions.items()}

    found = interleave(make, rounds=15, budget=3.0)
    if who != "fused":
        return
    figures, steps = found.figures("fused"), found.calls or make()
    accesses = map_accesses(shape.num_maps, tiled=layout == "contiguous")
    touched = 2 * shape.num_maps + 3  # maps, their gradients, y, dy, g
    record_row(
        "er_shortcut_sum, forward + backward", **figures, peer="naive eager", peer_p50=figures["naive_ms"],
        **copy_time(accesses * maps.map_bytes, touched * maps.map_bytes, "the call"), map_accesses=accesses,
        **{f"moved_{name}": bytes_moved(steps[name]) for name in ("naive", "fused")},
    )  # fmt: skip


def test_means(record):
    """The geometric means over the stages of ResNet-50 of what the record has by now."""
    if record is None:
        pytest.skip("nothing is recorded without --record")
    record.add(*mean_rows(record.rows(), "bench_er_functional", "shortcut_sum"))
