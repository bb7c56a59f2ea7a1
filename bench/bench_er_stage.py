"""How fast is a stage's tail - last BatchNorm, shortcuts, sum, ReLU - against the naive composition?

One row is forward + backward of the tails of one stage, the maps given. `floor` is the time that the bytes the fused
design must move take at the copy bandwidth measured for the same working set:

    forward   moments 1 L, weighted sums  sum_l (l + 2)          map accesses (reads + writes)
    backward  dots    sum_l (l + 1 + 3),  map gradients  sum_i (L - max(i, 1) + 2), and 1 for the gradient of y_0

Run: python3 dev.py bench bench/bench_er_stage.py
"""

from __future__ import annotations

import copy
import time

import pytest
import torch
from torch import Tensor, nn

from ernet_fast import ERShortcut
from ernet_fast.er.stage_maps import StageMaps

# name: channels, height = width, maps: the four stages of ER-ResNet-50, and the third of ER-ResNet-101
STAGES = {
    "resnet50-1": (256, 56, 3),
    "resnet50-2": (512, 28, 4),
    "resnet50-3": (1024, 14, 6),
    "resnet50-4": (2048, 7, 3),
    "resnet101-3": (1024, 14, 23),
}
LAYOUTS = {"channels-last": torch.channels_last, "contiguous": torch.contiguous_format}


class Tails(nn.Module):
    """The tails of one stage, without its convolutions."""

    def __init__(self, channels: int, num_maps: int) -> None:
        super().__init__()
        self.bns = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(num_maps - 1))
        self.shortcuts = nn.ModuleList(ERShortcut(channels, i + 1) for i in range(num_maps - 1))
        self.fused = True

    def forward(self, zs: list[Tensor]) -> list[Tensor]:
        maps = StageMaps(fused=self.fused)
        ys = [maps.start(zs[0], self.shortcuts)]
        ys += [maps.add(z, bn, s) for z, bn, s in zip(zs[1:], self.bns, self.shortcuts, strict=True)]
        return ys


def map_accesses(num_maps: int) -> int:
    """Reads and writes of one map that the fused design makes in forward + backward; see the module's docstring."""
    blocks = range(1, num_maps)
    forward = num_maps + sum(block + 2 for block in blocks)
    dots = sum(block + 1 + 3 for block in blocks)
    gradients = sum(num_maps - max(i, 1) + 2 for i in range(num_maps)) + 1
    return forward + dots + gradients


def copy_seconds_per_byte(working_set: int) -> float:
    """Seconds a byte read or written by a copy whose source and target together are `working_set` bytes."""
    source = torch.empty(working_set // 8, dtype=torch.float32).fill_(1)
    target = torch.empty_like(source)
    times = []
    for _ in range(15):
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2] / (2 * source.numel() * 4)


def make(stage: str, batch: int, layout: torch.memory_format):
    channels, size, num_maps = STAGES[stage]
    torch.manual_seed(0)
    zs = [torch.randn(batch, channels, size, size).contiguous(memory_format=layout) for _ in range(num_maps)]
    zs[0].relu_()
    gradients = [torch.randn_like(zs[0]) for _ in range(num_maps)]
    return Tails(channels, num_maps), [z.requires_grad_() for z in zs], gradients


@pytest.mark.benchmark(group="er stage tails")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", [8, 16])
@pytest.mark.parametrize("stage", STAGES)
def test_stage_tails(benchmark, stage, batch, layout, threads):
    """Fused against naive eager, interleaved; the ratio is that of the medians."""
    if stage == "resnet101-3" and batch == 16:
        pytest.skip("23 maps at batch 16 and their naive graph need 20 GB")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        fused, zs, gradients = make(stage, batch, LAYOUTS[layout])
        naive = copy.deepcopy(fused)
        naive.fused = False

        def step(module: Tails) -> float:
            for z in zs:
                z.grad = None
            start = time.perf_counter()
            torch.autograd.backward(module(zs), gradients)
            return time.perf_counter() - start

        step(fused), step(naive)
        times = [(step(naive), step(fused)) for _ in range(5)]
        benchmark.pedantic(step, args=(fused,), rounds=5)
        naive_seconds, fused_seconds = (sorted(column)[len(times) // 2] for column in zip(*times, strict=True))
        num_maps = len(zs)
        map_bytes = zs[0].numel() * 4
        floor = map_accesses(num_maps) * map_bytes * copy_seconds_per_byte((num_maps + 2) * map_bytes)
        benchmark.extra_info.update(
            naive_ms=naive_seconds * 1e3,
            fused_ms=fused_seconds * 1e3,
            ratio=naive_seconds / fused_seconds,
            map_accesses=map_accesses(num_maps),
            floor_ms=floor * 1e3,
            share_of_floor=floor / fused_seconds,
        )
    finally:
        torch.set_num_threads(before)
