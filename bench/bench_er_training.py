"""How long is a training step, and an evaluation, of an ER-ResNet against a plain ResNet and the naive ER-ResNet?

Images of 224 x 224, float32, channels-last, all cores; SGD with momentum. The three networks take turns. `peak_*` is
the most memory that a process of its own takes for a network's training (`process_memory.py`), `tensors_*` the most
that tensors take, kept memory left out (`tensor_memory.py`).

Run: python3 dev.py bench -k bench_er_training --slow    (without --slow: a step of the 50-layer net at batch 2)
"""

from __future__ import annotations

import functools
import os
import statistics

import pytest
import torch
from er_networks import batch_of, networks, train_step
from process_memory import peak_of_training
from tensor_memory import training_peak
from turns import in_turns, percentiles

# depth, batch: times faster than naive
FASTER_THAN_NAIVE = {(50, 8): 1.8, (50, 16): 2.4, (101, 8): 3.0, (101, 16): 3.0}
CASES = [pytest.param(50, 2), *(pytest.param(*case, marks=pytest.mark.slow) for case in FASTER_THAN_NAIVE)]


@pytest.mark.parametrize(("depth", "batch"), CASES)
def test_training_step(record_row, torch_threads, depth, batch):
    torch_threads(len(os.sched_getaffinity(0)))
    models = networks(depth)
    images, labels = batch_of(batch)
    optimizers = {name: torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9) for name, model in models.items()}
    steps = {
        name: functools.partial(train_step, model, optimizers[name], images, labels) for name, model in models.items()
    }
    times = in_turns(steps, rounds=7, budget=20.0)
    milliseconds = {name: 1e3 * statistics.median(values) for name, values in times.items()}
    tensors = {name: training_peak(models[name], optimizers[name], step) for name, step in steps.items()}
    peaks = {name: peak_of_training(name, depth, batch) for name in steps}
    bars = ["plain_share <= 1.05", "peak_share <= 1.05"]
    if (depth, batch) in FASTER_THAN_NAIVE:
        bars.append(f"ratio_naive >= {FASTER_THAN_NAIVE[depth, batch]}")
    record_row(
        "training step",
        **percentiles([1e3 * value for value in times["fused"]]),
        unit="ms",
        repeats=len(times["fused"]),
        peer="plain ResNet",
        peer_p50=milliseconds["plain"],
        **{f"{name}_ms": value for name, value in milliseconds.items()},
        ratio_plain=milliseconds["plain"] / milliseconds["fused"],
        ratio_naive=milliseconds["naive"] / milliseconds["fused"],
        plain_share=milliseconds["fused"] / milliseconds["plain"],
        peak_share=peaks["fused"] / peaks["plain"],
        tensors_share=tensors["fused"] / tensors["plain"],
        **{f"peak_{name}": value for name, value in peaks.items()},
        **{f"tensors_{name}": value for name, value in tensors.items()},
        bar=bars,
    )


@pytest.mark.parametrize(("depth", "batch"), CASES)
def test_evaluation(record_row, torch_threads, depth, batch):
    torch_threads(len(os.sched_getaffinity(0)))
    images, _ = batch_of(batch)
    steps = {name: functools.partial(model.eval(), images) for name, model in networks(depth).items()}
    with torch.inference_mode():
        times = in_turns(steps, rounds=9, budget=10.0)
    milliseconds = {name: 1e3 * statistics.median(values) for name, values in times.items()}
    record_row(
        "evaluation",
        **percentiles([1e3 * value for value in times["fused"]]),
        unit="ms",
        repeats=len(times["fused"]),
        peer="plain ResNet",
        peer_p50=milliseconds["plain"],
        **{f"{name}_ms": value for name, value in milliseconds.items()},
        ratio_plain=milliseconds["plain"] / milliseconds["fused"],
        ratio_naive=milliseconds["naive"] / milliseconds["fused"],
    )
