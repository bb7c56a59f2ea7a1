"""Medians of interleaved repeats: this library and its alternatives, at the same moment on the same machine."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ernet_fast import models
from ernet_fast.stain import MacenkoNormalizer

_BATCH = 8


@dataclass(frozen=True)
class Timing:
    """Median seconds of each contestant of one task, this library's own first."""

    task: str
    seconds: dict[str, float]
    repeats: int
    remark: str = ""

    @property
    def line(self) -> str:
        """One line: times, and how many times faster the first is."""
        (own, first), *others = self.seconds.items()
        shown = [f"{own} {format_seconds(first)}"]
        shown += [f"{name} {format_seconds(value)} ({value / first:.1f}x)" for name, value in others]
        return f"{self.task}: {', '.join(shown)}{f'. {self.remark}' if self.remark else ''}"


def format_seconds(value: float) -> str:
    """Three significant digits, in s or ms."""
    return f"{value:.3g} s" if value >= 1 else f"{1e3 * value:.3g} ms"


def interleaved_medians(contestants: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each call; in every round each is called once, after one round that does not count.

    Interleaving lets a disturbance of the machine fall on all of them.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for round_ in range(repeats + 1):
        for name, call in contestants.items():
            start = time.perf_counter()
            call()
            _wait()
            if round_:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def time_training_step(device: torch.device, repeats: int = 5, side: int = 112) -> Timing:
    """Forward and backward of ER-ResNet-50, fused against the naive composition of the same weights."""
    network = models.er_resnet50(2).to(device=device, memory_format=torch.channels_last).train()
    generator = torch.Generator().manual_seed(0)
    images = (
        torch.randn(_BATCH, 3, side, side, generator=generator)
        .to(device)
        .contiguous(memory_format=torch.channels_last)
    )

    def step(fused: bool) -> Callable[[], None]:
        def run() -> None:
            network.set_fused(fused)
            network.zero_grad(set_to_none=True)
            network(images).square().mean().backward()

        return run

    medians = interleaved_medians({"fused": step(True), "naive": step(False)}, repeats)
    where = f"{torch.get_num_threads()} threads" if device.type == "cpu" else torch.cuda.get_device_name(device)
    task = f"ER-ResNet-50, forward and backward of {_BATCH} images of {side}x{side}, float32, {where}"
    return Timing(task, medians, repeats)


def time_macenko(image: Tensor, repeats: int = 15) -> Timing:
    """Normalisation of one uint8 image [3, H, W] to a fitted target, one thread; against torchstain where it is installed."""
    own = MacenkoNormalizer(layout="CHW").fit(image)
    contestants: dict[str, Callable[[], Any]] = {"ernet_fast": lambda: own.normalize(image, stains=False)}
    remark = "torchstain is not installed, so there is nothing to compare with"
    if importlib.util.find_spec("torchstain") is not None:
        import torchstain

        remark = ""
        with_torch = torchstain.normalizers.MacenkoNormalizer(backend="torch")
        with_torch.fit(image)
        contestants["torchstain (torch)"] = lambda: with_torch.normalize(I=image, stains=False)
        pixels = image.permute(1, 2, 0).contiguous().numpy()
        with_numpy = torchstain.normalizers.MacenkoNormalizer(backend="numpy")
        with_numpy.fit(pixels)
        contestants["torchstain (numpy)"] = lambda: with_numpy.normalize(I=pixels, stains=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        medians = interleaved_medians(contestants, repeats)
    finally:
        torch.set_num_threads(threads)
    height, width = image.shape[1:]
    return Timing(f"Macenko, one {width}x{height} image, one thread", medians, repeats, remark)
