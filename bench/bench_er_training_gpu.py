"""How long are a training step and a one-image evaluation of an ER-ResNet on a GPU, against its peers?

Training: batch 256 at 224 x 224, autocast to bfloat16, channels-last, SGD with momentum; the fused network runs eagerly
and takes turns with the plain ResNet and the naive ER-ResNet in eager mode, or with the naive one compiled.
Inference: batch 1 in bfloat16; the fused network's CUDA graph is replayed, the naive network runs in eager mode (and,
beside the target, from a CUDA graph of its own).

What a case runs does not depend on the device: `Setting` makes one small enough for a CPU, where the tests run it.

Run: python3 dev.py gpu --only bench_er_training_gpu
"""

from __future__ import annotations

import copy
import functools
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from er_networks import batch_of, networks, train_step
from gpu_case import Ceilings, GpuCase
from record import Row
from this_tree import percentiles, time_interleaved
from torch import Tensor, nn

BENCH = "bench_er_training_gpu"
HALF = torch.bfloat16
CHECKED = 32  # images of the comparison with the naive network


@dataclass(frozen=True)
class Setting:
    """The device, and how large everything is."""

    device: str = "cuda"
    batch: int = 256
    size: int = 224
    base_channels: int = 64
    rounds: int = 10
    slice_seconds: float = 0.3

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def networks(self, depth: int) -> dict[str, nn.Module]:
        """The three networks on the device."""
        return networks(depth, self.device, base_channels=self.base_channels)

    def times(self, calls: Mapping[str, Callable[[], Any]]) -> dict[str, list[float]]:
        """Milliseconds of every round of every call, interleaved."""
        for call in calls.values():  # compiles, chooses algorithms, fills caches
            call()
            call()
        self.wait()
        times = time_interleaved(calls, self.rounds, slice_seconds=self.slice_seconds, wait=self.wait)
        return {name: [1e3 * seconds for seconds in values] for name, values in times.items()}


def require_agreement(depth: int, models: Mapping[str, nn.Module], images: Tensor) -> None:
    """In float32, the fused network must compute what the naive one does, in the mode that both are in.

    Both round in every layer. How much one rounding becomes at the output is what the naive network makes of an input
    that is off by one; a layer may add as much, times 4 where terms cancel. Running statistics stay as they were.
    """
    states = {name: copy.deepcopy(models[name].state_dict()) for name in ("naive", "fused")}
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(2)).to(images.device)
    nudged = images * (1 + torch.finfo(torch.float32).eps * noise)
    with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):
        fused, naive, moved = models["fused"](images), models["naive"](images), models["naive"](nudged)
    for name, state in states.items():
        models[name].load_state_dict(state)
    error, response = (float((found - naive).norm() / naive.norm()) for found in (fused, moved))
    if not error <= 4 * depth * response:
        raise AssertionError(f"fused network: error {error:.3g}, at most {4 * depth * response:.3g} expected")


def peak_megabytes(call: Callable[[], Any], setting: Setting) -> float | None:
    """Peak of allocated memory during a call on a CUDA device, in MiB."""
    if setting.device != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**20


def row_of(name: str, group: str, params: dict[str, Any], times: Mapping[str, list[float]], **info: Any) -> Row:
    """The fused network's times, and its ratio to every other contestant."""
    medians = {who: statistics.median(values) for who, values in times.items()}
    ratios = {f"ratio_{who}": value / medians["fused"] for who, value in medians.items() if who != "fused"}
    shares = {"plain_share": medians["fused"] / medians["plain"]} if "plain" in medians else {}
    return Row(
        BENCH, name, group, params, **percentiles(times["fused"]), unit="ms", repeats=len(times["fused"]),
        extra_info={**{f"{who}_ms": value for who, value in medians.items()}, **ratios, **shares, **info},
    )  # fmt: skip


def training(depth: int, peers: tuple[str, ...], name: str, setting: Setting, ceilings: Ceilings) -> Row:
    """A step of the fused network and of `peers`: "plain", "naive", "compiled" (the naive one)."""
    models = setting.networks(depth)
    images, labels = batch_of(setting.batch, setting.size, setting.device)
    require_agreement(depth, models, images[:CHECKED])
    if "compiled" in peers:
        torch._dynamo.reset()
        models["compiled"] = torch.compile(models["naive"], dynamic=False)
    steps, peaks = {}, {}
    for who in ("fused", *peers):
        optimizer = torch.optim.SGD(models[who].parameters(), lr=1e-4, momentum=0.9)
        steps[who] = functools.partial(train_step, models[who], optimizer, images, labels, HALF)
        steps[who]()
        peaks[f"peak_mib_{who}"] = peak_megabytes(steps[who], setting)
        optimizer.zero_grad(set_to_none=True)
    params = {"depth": depth, "batch": setting.batch, "size": setting.size}
    images_per_second = {"images_per_second": 1e3 * setting.batch}
    row = row_of(name, "ER training step, CUDA", params, setting.times(steps), **peaks, **images_per_second)
    row.extra_info["images_per_second"] /= row.p50
    return row


def graphed(model: nn.Module, images: Tensor) -> Callable[[], Tensor]:
    """The model's evaluation as a CUDA graph that is replayed; on other devices the call itself."""
    if images.device.type != "cuda":
        return functools.partial(model, images)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            model(images)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = model(images)

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def inference(depth: int, name: str, setting: Setting, ceilings: Ceilings) -> Row:
    """One image through the fused network's CUDA graph, and through the naive network, eager and graphed."""
    models = setting.networks(depth)
    images, _ = batch_of(8, setting.size, setting.device)
    with torch.inference_mode():
        for who in ("fused", "naive"):
            models[who](images)  # running statistics worth using
            models[who].eval()
        require_agreement(depth, models, images)
        one = images[:1].to(HALF).contiguous(memory_format=torch.channels_last)
        fused, naive = (models[who].to(HALF) for who in ("fused", "naive"))
        calls = {
            "fused": graphed(fused, one),
            "naive": functools.partial(naive, one),
            "naive_graphed": graphed(naive, one),
        }
        torch.testing.assert_close(calls["fused"](), fused(one))
        times = setting.times(calls)
    return row_of(name, "ER inference, one image, CUDA", {"depth": depth, "batch": 1, "size": setting.size}, times)


# depth: targets against naive eager, compiled naive
BARS = {50: (1.4, 1.08), 101: (1.7, 1.25)}


def gpu_cases() -> list[GpuCase]:
    """Training steps and inference of both depths."""
    cases = []
    setting = Setting()
    for depth, (naive, compiled) in BARS.items():
        eager = f"training er_resnet{depth}, eager peers"
        cases.append(
            GpuCase(
                eager, functools.partial(training, depth, ("plain", "naive"), eager, setting), importance=0,
                seconds=60, smoke=False, title=f"training step, ER-ResNet-{depth}, batch {setting.batch}",
                group="ER training step, CUDA", targets=[f"ratio_naive >= {naive}", "plain_share <= 1.0"],
            )
        )  # fmt: skip
        name = f"training er_resnet{depth}, compiled peer"
        cases.append(
            GpuCase(
                name, functools.partial(training, depth, ("compiled",), name, setting), importance=1,
                seconds=120 if depth == 50 else 400, title=f"training step, ER-ResNet-{depth}, against compiled naive",
                group="ER training step, CUDA", targets=[f"ratio_compiled >= {compiled}"],
            )
        )  # fmt: skip
        name = f"inference er_resnet{depth}, one image"
        cases.append(
            GpuCase(
                name, functools.partial(inference, depth, name, setting), importance=0, seconds=20,
                title=f"inference, ER-ResNet-{depth}, one image, CUDA graph",
                group="ER inference, one image, CUDA", targets=["ratio_naive >= 3"],
            )
        )  # fmt: skip
    return cases
