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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from er_networks import batch_of, networks, training_of
from gpu_case import Ceilings, GpuCase
from gpu_timing import wait
from measured import Measured
from record import Row
from this_tree import time_interleaved
from torch import Tensor, nn

HALF = torch.bfloat16
CHECKED = 32  # images of the comparison with the naive network
TRAINING, INFERENCE = "ER training step, CUDA", "ER inference, one image, CUDA"


@dataclass(frozen=True)
class Setting:
    """The device, and how large everything is."""

    device: str = "cuda"
    batch: int = 256
    size: int = 224
    base_channels: int = 64
    rounds: int = 10
    slice_seconds: float = 0.3

    def networks(self, depth: int) -> dict[str, nn.Module]:
        return networks(depth, self.device, base_channels=self.base_channels)

    def row(self, name: str, group: str, depth: int, batch: int, calls: Mapping[str, Callable[[], Any]]) -> Row:
        """The times of the fused network, interleaved with the others, and its ratio to each."""
        for call in calls.values():  # compiles, chooses algorithms, fills caches
            call()
            call()
        wait()
        times = time_interleaved(calls, self.rounds, slice_seconds=self.slice_seconds, wait=wait)
        figures = Measured(times).figures("fused")
        known = {key: figures.pop(key) for key in ("p20", "p50", "p80", "unit", "repeats")}
        params = {"depth": depth, "batch": batch, "size": self.size}
        return Row("bench_er_training_gpu", name, group, params, **known, extra_info=figures)


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


def training(depth: int, peers: tuple[str, ...], name: str, setting: Setting, _: Ceilings) -> Row:
    """A step of the fused network and of `peers`: "plain", "naive", "compiled" (the naive one)."""
    models = setting.networks(depth)
    images, labels = batch_of(setting.batch, setting.size, setting.device)
    require_agreement(depth, models, images[:CHECKED])
    if "compiled" in peers:
        torch._dynamo.reset()
        models["compiled"] = torch.compile(models["naive"], dynamic=False)
    steps, peaks = {}, {}
    for who in ("fused", *peers):
        steps[who], optimizer = training_of(models[who], images, labels, HALF)
        steps[who]()
        if setting.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            steps[who]()
            torch.cuda.synchronize()
            peaks[f"peak_mib_{who}"] = torch.cuda.max_memory_allocated() / 2**20
        optimizer.zero_grad(set_to_none=True)
    row = setting.row(name, TRAINING, depth, setting.batch, steps)
    row.extra_info |= {"images_per_second": 1e3 * setting.batch / row.p50, **peaks}
    if "plain" in peers:
        row.extra_info["plain_share"] = row.p50 / row.extra_info["plain_ms"]
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


def inference(depth: int, name: str, setting: Setting, _: Ceilings) -> Row:
    """One image through the fused network's CUDA graph, and through the naive network, eager and graphed."""
    models = setting.networks(depth)
    images, _labels = batch_of(8, setting.size, setting.device)
    with torch.inference_mode():
        for who in ("fused", "naive"):
            models[who](images)  # running statistics worth using
            models[who].eval()
        require_agreement(depth, models, images)
        one = images[:1].to(HALF).contiguous(memory_format=torch.channels_last)
        fused, naive = (models[who].to(HALF) for who in ("fused", "naive"))
        eager = functools.partial(naive, one)
        calls = {"fused": graphed(fused, one), "naive": eager, "naive_graphed": graphed(naive, one)}
        torch.testing.assert_close(calls["fused"](), fused(one))
        return setting.row(name, INFERENCE, depth, 1, calls)


# depth: targets against naive eager, compiled naive, and seconds of the compiled case
TARGETS = {50: (1.4, 1.08, 120), 101: (1.7, 1.25, 400)}


def gpu_cases() -> list[GpuCase]:
    cases = []
    setting = Setting()
    for depth, (naive, compiled, seconds) in TARGETS.items():
        network = f"ER-ResNet-{depth}"
        for name, run, group, options in (
            (f"training er_resnet{depth}, eager peers", functools.partial(training, depth, ("plain", "naive")),
             TRAINING, {"importance": 0, "seconds": 60, "title": f"training step, {network}, batch {setting.batch}",
              "targets": [f"ratio_naive >= {naive}", "plain_share <= 1.0"]}),
            (f"training er_resnet{depth}, compiled peer", functools.partial(training, depth, ("compiled",)), TRAINING,
             {"seconds": seconds, "title": f"training step, {network}, against compiled naive",
              "targets": [f"ratio_compiled >= {compiled}"]}),
            (f"inference er_resnet{depth}, one image", functools.partial(inference, depth), INFERENCE,
             {"importance": 0, "seconds": 20, "title": f"inference, {network}, one image, CUDA graph",
              "targets": ["ratio_naive >= 3"]}),
        ):  # fmt: skip
            headline = depth == 50 and options.get("importance") == 0
            cases.append(GpuCase(
                name, functools.partial(run, name, setting), group=group, headline=headline,
                kernel="stage forward and backward", **options,
            ))  # fmt: skip
    return cases
