"""How fast are a stage's tails - last BatchNorm, shortcuts, sum, ReLU - against the naive ones, eager and compiled?

One row is forward + backward of the tails of one stage, the maps given; a stand-in that moves no bytes takes the place
of the convolutions between them (`er_branch.py`). All contestants take turns. The floor is what the bytes that the
fused design must move (`er_tails.py` counts them) take at the copy bandwidth measured at the working set of the pass,
all maps that it touches; `floor_cached` is the same at the working set of one block, as though a block found in the
caches whatever the passes over earlier blocks had left there.
`moved_*` is what the contestants move by a count of their operators (`traffic.py`), `faults_*` the pages that the
system had to map and clear anew for newly allocated maps, `system_ms_*` the processor time it took (`page_faults.py`),
`in_<operator>_ms` where the fused pass spends its time (`operator_times.py`).

Run: python3 dev.py bench bench_er_stage        batch 8, against naive eager and compiled
     with --slow batch 16 too, there against the compiled one with --compiled alone (minutes)
"""

from __future__ import annotations

import functools
import statistics

import pytest
import torch
from copy_floor import copy_seconds_per_byte
from er_kernel_counts import compiled_cost, profiled_kernels
from er_means import STAGE_101, record_means
from er_tails import LAYOUTS, STAGES, Tails, make_maps, map_accesses, maps_touched, train_tails
from operator_times import operator_milliseconds
from page_faults import system_work
from traffic import bytes_moved
from turns import in_turns, percentiles

GROUP = "ER stage tails, forward + backward"
QUICK = 8  # batch of the rows that are not slow
FLOOR_WHY = "bytes the design must move / copy bandwidth at the working set of the pass"
STAND_IN = ("ernet_bench::",)
TURN = (
    0.1  # seconds: long beside the one call that finds the caches as another contestant has left them, like the copies
)
MOST_COMPILED = 8  # maps; compiling the 253 pairs of a stage of 23 maps takes many minutes


def cases() -> list[object]:
    """Every stage, batch, layout and number of threads; most are marked slow."""
    found = []
    for stage in STAGES:
        for batch in (8, 16):
            for layout in LAYOUTS:
                marks = [] if batch == QUICK else [pytest.mark.slow]
                found += [pytest.param(stage, batch, layout, threads, marks=marks) for threads in (1, 2)]
    return found


@pytest.mark.parametrize(("stage", "batch", "layout", "threads"), cases())
def test_stage_tails(record_row, with_compiled, torch_threads, stage, batch, layout, threads):
    torch_threads(threads)
    shape = STAGES[stage]
    torch.manual_seed(0)
    fused = Tails(shape.channels, shape.num_maps)
    contestants = {"naive": fused.naive(), "fused": fused}
    if (with_compiled or batch == QUICK) and shape.num_maps <= MOST_COMPILED:
        torch._dynamo.reset()
        contestants["compiled"] = torch.compile(fused.naive(), dynamic=False)
    maps = make_maps(shape, batch, LAYOUTS[layout])
    steps = {name: functools.partial(train_tails, tails, maps) for name, tails in contestants.items()}
    for step in steps.values():
        step()
    times = in_turns(steps, rounds=15, budget=5.0, turn=TURN)
    milliseconds = {name: 1e3 * statistics.median(values) for name, values in times.items()}
    accesses = map_accesses(shape.num_maps, strips=layout == "contiguous")
    must_move = accesses * maps.map_bytes
    seconds_per_byte = copy_seconds_per_byte(maps_touched(shape.num_maps) * maps.map_bytes)
    cached = 1e3 * must_move * copy_seconds_per_byte((shape.num_maps + 2) * maps.map_bytes)
    system = {name: system_work(steps[name]) for name in steps}
    moved = {f"moved_{name}": bytes_moved(steps[name], STAND_IN) for name in ("naive", "fused")}
    ratios = {f"ratio_{name}": milliseconds[name] / milliseconds["fused"] for name in times if name != "fused"}
    record_row(
        GROUP,
        **percentiles([1e3 * value for value in times["fused"]]),
        unit="ms",
        repeats=len(times["fused"]),
        peer="naive eager",
        peer_p50=milliseconds["naive"],
        **{f"{name}_ms": value for name, value in milliseconds.items()},
        **ratios,
        must_move=must_move,
        **moved,
        floor=1e3 * must_move * seconds_per_byte,
        floor_why=FLOOR_WHY,
        floor_cached=cached,
        share_of_floor_cached=cached / milliseconds["fused"],
        **{f"faults_{name}": work.page_faults for name, work in system.items()},
        **{f"system_ms_{name}": work.milliseconds for name, work in system.items()},
        **{f"in_{name}_ms": value for name, value in operator_milliseconds(steps["fused"]).items()},
        map_accesses=accesses,
        bar=["share_of_floor >= 0.75", *(["ratio_naive >= 6"] if stage == STAGE_101 else [])],
    )


def test_means(record, record_row):
    """The geometric means over the stages of ResNet-50 of what the record has by now."""
    if record is None:
        pytest.skip("nothing is recorded without --record")
    record_means(record, record_row, "bench_er_stage", "stage_tails")


@pytest.mark.parametrize("stage", list(STAGES))
def test_kernels(record_row, torch_threads, stage):
    """Kernels of forward + backward of a stage's tails, by the profiler, and of the compiled ones, by Inductor."""
    torch_threads(2)
    shape = STAGES[stage]
    maps = make_maps(shape, 8)
    fused = Tails(shape.channels, shape.num_maps)
    size = maps.zs[0].numel()
    naive = profiled_kernels(functools.partial(train_tails, fused.naive(), maps), size)
    own = profiled_kernels(functools.partial(train_tails, fused, maps), size)
    info: dict[str, float] = {}
    if shape.num_maps <= MOST_COMPILED:
        compiled = compiled_cost(fused.naive(), maps)
        info = {
            "compiled_map_kernels": compiled.kernels.map,
            "compiled_vector_kernels": compiled.kernels.vector,
            "moved_compiled": compiled.bytes_moved,
        }
    record_row(
        "kernels of a stage's tails, forward + backward",
        **dict.fromkeys(("p20", "p50", "p80"), own.total),
        unit="kernels",
        repeats=1,
        naive_map_kernels=naive.map,
        naive_vector_kernels=naive.vector,
        fused_map_kernels=own.map,
        fused_vector_kernels=own.vector,
        blocks=shape.num_maps - 1,
        map_bytes=maps.map_bytes,
        **info,
    )
