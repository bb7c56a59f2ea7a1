"""How long is a training step, and an evaluation, of an ER-ResNet against a plain ResNet and the naive ER-ResNet?

Images of 224 x 224, float32, channels-last, all cores; SGD with momentum. The networks are interleaved; `lean` is the
fused one with memory="lean". `peak_*` is the most memory that a process of its own takes for a network's training
(`process_memory.py`), `tensors_*` the most that tensors take, kept memory left out (`tensor_memory.py`),
`activations_*` of it what is neither parameter nor gradient nor state of the optimizer.

Run: python3 dev.py bench bench_er_training    (--slow adds the 101-layer net at batch 16, and memory at batch 16)
"""

from __future__ import annotations

import functools
import os

import pytest
import torch
from contestants import contestants
from er_networks import batch_of, networks, training_of
from process_memory import peak_of_training
from tensor_memory import activation_peak, training_peak

# depth, batch
STEPS = [(depth, batch) for depth in (18, 34, 50, 101) for batch in (8, 16)]
CASES = {"step": STEPS, "memory": [case for case in STEPS if case[0] >= 50]}
NETWORKS = ("fused", "plain", "naive", "lean")
SLOW = {"step": [(101, 16)], "memory": [(50, 16), (101, 16)]}


def cases(what: str) -> list[object]:
    marks = {case: [pytest.mark.slow] for case in SLOW[what]}
    return [pytest.param(*case, marks=marks.get(case, [])) for case in CASES[what]]


@contestants(*NETWORKS)
@pytest.mark.parametrize(("depth", "batch"), cases("step"))
def test_training_step(interleave, record_row, torch_threads, depth, batch, who):
    torch_threads(len(os.sched_getaffinity(0)))
    images, labels = batch_of(batch)

    def make():
        models = networks(depth, names=NETWORKS)
        return {name: training_of(model, images, labels)[0] for name, model in models.items()}

    figures = interleave(make, rounds=7, budget=25.0).figures("fused")
    if who != "fused":
        return
    record_row(
        "training step", **figures, peer="plain ResNet", peer_p50=figures["plain_ms"],
        plain_share=figures["fused_ms"] / figures["plain_ms"], lean_share=figures["lean_ms"] / figures["plain_ms"],
        target=["plain_share <= 0.9", *["lean_share <= 1.08"] * (depth == 50)],
    )  # fmt: skip


@pytest.mark.parametrize(("depth", "batch"), cases("memory"))
def test_training_memory(record_row, torch_threads, depth, batch):
    torch_threads(len(os.sched_getaffinity(0)))
    images, labels = batch_of(batch)
    tensors, peaks, activations = {}, {}, {}
    for name, model in networks(depth, names=NETWORKS).items():
        step, optimizer = training_of(model, images, labels)
        step()
        tensors[name] = training_peak(model, optimizer, step)
        peaks[name] = peak_of_training(name, depth, batch)
        activations[name] = activation_peak(model, images, labels)
    record_row(
        "memory of training", *3 * [peaks["fused"] / 2**20], unit="MiB", repeats=1, peer="plain ResNet",
        peer_p50=peaks["plain"] / 2**20, **{f"peak_{name}": value for name, value in peaks.items()},
        **{f"tensors_{name}": value for name, value in tensors.items()}, peak_share=peaks["fused"] / peaks["plain"],
        tensors_share=tensors["fused"] / tensors["plain"],
        **{f"activations_{name}": value for name, value in activations.items()},
        lean_activations_share=activations["lean"] / activations["plain"],
        target=["peak_share <= 1.05", "tensors_share <= 1.05", "lean_activations_share <= 0.6"],
    )  # fmt: skip


@contestants("fused", "plain", "naive")
@pytest.mark.parametrize(("depth", "batch"), cases("memory"))
def test_evaluation(interleave, record_row, torch_threads, depth, batch, who):
    torch_threads(len(os.sched_getaffinity(0)))
    images, _ = batch_of(batch)

    def make():
        return {name: functools.partial(model.eval(), images) for name, model in networks(depth).items()}

    with torch.inference_mode():
        figures = interleave(make, rounds=9, budget=10.0).figures("fused")
    if who == "fused":
        record_row("evaluation", **figures, peer="plain ResNet", peer_p50=figures["plain_ms"])
