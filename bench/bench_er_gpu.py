"""How near to the copy bandwidth do the ER operators run on a CUDA device?

One row is one operator on the maps of one stage, bfloat16, channels-last, batch 256, with as many maps as the stage's
last block reads. GB/s counts what the operator must move, each map once:

    channel_moments  reads 1 map      weighted_sum  reads L, writes 1      weighted_dot  reads L + 2, writes 1

The copy bandwidth is measured in the same run, with the cache flushed before every call, as it is for the operators.

Run: python3 dev.py bench bench/bench_er_gpu.py    (or, with the other checks of a GPU, python3 dev.py gpu)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from gpu_timing import copy_bandwidth, milliseconds

# name: channels, height = width, maps
STAGES = {
    "resnet50-1": (256, 56, 3),
    "resnet50-2": (512, 28, 4),
    "resnet50-3": (1024, 14, 6),
    "resnet50-4": (2048, 7, 3),
    "resnet101-3": (1024, 14, 23),
}
OPERATORS = ("channel_moments", "weighted_sum", "weighted_dot")
BATCH = 256


class Case(NamedTuple):
    """One operator on one stage: the call and the bytes that it must move."""

    name: str
    call: Callable[[], Any]
    bytes_moved: int


def make(stage: str, operator: str, batch: int = BATCH) -> Case:
    """The call of `operator` on the maps of `stage`."""
    from ernet_fast.er import _ops

    channels, size, num_maps = STAGES[stage]
    torch.manual_seed(0)

    def one_map() -> torch.Tensor:
        x = torch.empty((batch, channels, size, size), dtype=torch.bfloat16, device="cuda")
        return x.contiguous(memory_format=torch.channels_last).normal_()

    maps = [one_map() for _ in range(1 if operator == "channel_moments" else num_maps)]
    map_bytes = maps[0].numel() * maps[0].element_size()
    name = f"{operator} {stage}: {channels} x {size} x {size}, {len(maps)} maps"
    if operator == "channel_moments":
        return Case(name, lambda: _ops.channel_moments(maps[0]), map_bytes)
    if operator == "weighted_sum":
        a, b = torch.randn(num_maps, channels, device="cuda"), torch.randn(channels, device="cuda")
        return Case(name, lambda: _ops.weighted_sum(maps, a, b, True), (num_maps + 1) * map_bytes)
    dy, y = one_map(), one_map().relu_()
    return Case(name, lambda: _ops.weighted_dot(dy, maps, y), (num_maps + 3) * map_bytes)


def measure(case: Case, bandwidth: float) -> dict[str, float]:
    """Times, GB/s and share of the copy bandwidth."""
    timing = milliseconds(case.call)
    rate = case.bytes_moved / timing["p50"] / 1e6
    return {"gigabytes_per_second": rate, "share_of_copy": rate / bandwidth, **timing}


def measure_all(bandwidth: float) -> Iterator[tuple[str, dict[str, float]]]:
    """Every operator on every stage."""
    for stage in STAGES:
        for operator in OPERATORS:
            case = make(stage, operator)
            yield case.name, measure(case, bandwidth)


@pytest.fixture(scope="module")
def bandwidth() -> tuple[float, dict[str, float]]:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return copy_bandwidth()


@pytest.mark.benchmark(group="er operators, CUDA")
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("stage", STAGES)
def test_operator(benchmark, bandwidth, stage, operator):
    """The row's own times include the launch from Python; `extra_info` has those of the device alone."""
    gigabytes, _ = bandwidth
    case = make(stage, operator)
    found = measure(case, gigabytes)

    def call() -> None:
        case.call()
        torch.cuda.synchronize()

    benchmark.pedantic(call, rounds=10, warmup_rounds=2)
    benchmark.extra_info.update(
        gpu=torch.cuda.get_device_name(), torch=torch.__version__, copy_gigabytes_per_second=gigabytes, **found
    )
