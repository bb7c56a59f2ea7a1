"""`ernet-fast bench model` as a record: step, memory and inference of an ER-ResNet beside what one would take instead.

A plain ResNet of the same depth, the naive ER-ResNet, eager and under torch.compile, the ER-ResNet with usual and with
lean memory, and DenseNet-121. A row is a network; README.md's table and picture are drawn from the rows of
ER-ResNet-50 at batch 8. Compiling the naive network takes minutes once, and its place is empty without a compiler.

Run: python3 dev.py bench bench_models    (--slow adds ER-ResNet-18 and 101)
"""

from __future__ import annotations

import os

import pytest

from ernet_fast.benchmark.model import ModelBenchConfig, run_model_bench
from ernet_fast.console.progress import Reporter

SECONDS = 120.0
CASES = [
    pytest.param("er_resnet50", 8),
    pytest.param("er_resnet18", 8, marks=pytest.mark.slow),
    pytest.param("er_resnet101", 8, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("model", "batch"), CASES)
def test_models(record_row, torch_threads, model, batch):
    torch_threads(len(os.sched_getaffinity(0)))
    figures = run_model_bench(ModelBenchConfig(model, batch, seconds=SECONDS), Reporter(bars=False))
    for one in figures["missing"]:
        print(f"not measured: {one['name']}: {one['reason']}")
    plain, *_ = figures["networks"]
    for place, row in enumerate(figures["networks"]):
        step = row["step"]
        record_row(
            f"bench model, {model}, batch {batch}", step["p20_ms"], step["p50_ms"], step["p80_ms"], "ms",
            step["repeats"], name=f"models[{model}-{batch}-{row['key']}]",
            params={"model": model, "batch": batch, "size": figures["size"], "network": row["key"]},
            title=f"training step, {row['name']}, batch {batch}", place=place, threads=figures["threads"], figures=row,
            peer=plain["name"], peer_p50=plain["step"]["p50_ms"],
        )  # fmt: skip
