"""How fast are a stage's block epilogues (last BatchNorm, shortcuts, sum, ReLU) against naive ones, eager and compiled?

One row is forward + backward of the epilogues of one stage, the maps given; a stand-in that moves no bytes takes the
place of the convolutions between them (`er_branch.py`). All contestants are interleaved. `copy_time` is what the bytes
that the fused design must move (`er_stage_epilogues.py` counts them) take at the copy bandwidth measured at the working
set of the pass, all maps that it touches. It is no floor: caches hold some of the bytes from one pass to the next.
`moved_*` is what the contestants move by a count of their operators (`traffic.py`), `faults_*` the pages that the
system had to map and clear anew for newly allocated maps, `system_ms_*` the processor time it took (`page_faults.py`),
`in_<operator>_ms` where the fused pass spends its time (`operator_times.py`).

Run: python3 dev.py bench bench_er_stage        batch 8, against naive eager and compiled
     with --slow batch 16 too, there against the compiled one with --compiled alone (minutes)
"""

from __future__ import annotations

import pytest
import torch
from contestants import contestants
from copy_floor import copy_time
from er_kernel_counts import compiled_cost, profiled_kernels
from er_means import STAGE_101, mean_rows
from er_stage_epilogues import (
    LAYOUTS,
    QUICK,
    STAGES,
    EpilogueStage,
    cases,
    make_maps,
    map_accesses,
    maps_touched,
    steps_of,
)
from operator_times import operator_milliseconds
from page_faults import system_work
from traffic import bytes_moved

GROUP = "ER stage epilogues, forward + backward"
STAND_IN = ("ernet_bench::",)
SLICE = 0.1  # seconds: long beside the one call that finds the caches as another contestant has left them
MOST_COMPILED = 8  # maps; compiling the 253 pairs of a stage of 23 maps takes many minutes


@contestants("fused", "naive", "compiled")
@pytest.mark.parametrize(("stage", "batch", "layout", "threads"), cases())
def test_stage_epilogues(interleave, record_row, with_compiled, torch_threads, stage, batch, layout, threads, who):
    torch_threads(threads)
    shape = STAGES[stage]
    maps = make_maps(shape, batch, LAYOUTS[layout])

    def make():
        torch.manual_seed(0)
        fused = EpilogueStage(shape.channels, shape.num_maps)
        stages = {"fused": fused, "naive": fused.naive()}
        if (with_compiled or batch == QUICK) and shape.num_maps <= MOST_COMPILED:
            torch._dynamo.reset()
            stages["compiled"] = torch.compile(fused.naive(), dynamic=False)
        return steps_of(stages, maps)

    found = interleave(make, rounds=15, budget=5.0, slice_seconds=SLICE)
    if who != "fused":
        return
    accesses = map_accesses(shape.num_maps, tiled=layout == "contiguous")
    figures, steps = found.figures("fused"), found.calls or make()
    system = {name: system_work(step) for name, step in steps.items()}
    record_row(
        GROUP, **figures, peer="naive eager", peer_p50=figures["naive_ms"],
        **copy_time(accesses * maps.map_bytes, maps_touched(shape.num_maps) * maps.map_bytes, "the pass"),
        map_accesses=accesses, **{f"moved_{name}": bytes_moved(steps[name], STAND_IN) for name in ("naive", "fused")},
        **{f"faults_{name}": work.page_faults for name, work in system.items()},
        **{f"system_ms_{name}": work.milliseconds for name, work in system.items()},
        **{f"in_{name}_ms": value for name, value in operator_milliseconds(steps["fused"]).items()},
        target=["share_of_copy >= 0.75", *(["ratio_naive >= 6"] if stage == STAGE_101 else [])],
    )  # fmt: skip


def test_means(record):
    """The geometric means over the stages of ResNet-50 of what the record has by now."""
    if record is None:
        pytest.skip("nothing is recorded without --record")
    record.add(*mean_rows(record.rows(), "bench_er_stage", "stage_epilogues"))


@pytest.mark.parametrize("stage", list(STAGES))
def test_kernels(record_row, torch_threads, stage):
    """Kernels of forward + backward of a stage's epilogues, by the profiler, and of the compiled ones, by Inductor."""
    torch_threads(2)
    shape = STAGES[stage]
    maps = make_maps(shape, 8)
    fused = EpilogueStage(shape.channels, shape.num_maps)
    size = maps.zs[0].numel()
    steps = steps_of({"naive": fused.naive(), "fused": fused}, maps)
    naive, own = (profiled_kernels(steps[name], size) for name in ("naive", "fused"))
    info: dict[str, float] = {}
    if shape.num_maps <= MOST_COMPILED:
        compiled = compiled_cost(fused.naive(), maps)
        info = {
            "compiled_map_kernels": compiled.kernels.map,
            "compiled_vector_kernels": compiled.kernels.vector,
            "moved_compiled": compiled.bytes_moved,
        }
    record_row(
        "kernels of a stage's epilogues, forward + backward", *3 * [own.total], unit="kernels", repeats=1,
        naive_map_kernels=naive.map, naive_vector_kernels=naive.vector, fused_map_kernels=own.map,
        fused_vector_kernels=own.vector, blocks=shape.num_maps - 1, map_bytes=maps.map_bytes, **info,
    )  # fmt: skip
