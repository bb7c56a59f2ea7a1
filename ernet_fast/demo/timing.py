"""Medians of interleaved repeats: this library and its alternatives, at the same moment on the same machine."""

from __future__ import annotations

import importlib.util
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ernet_fast import models
from ernet_fast.benchmark.turns import TURN, in_turns
from ernet_fast.er.shortcut import ERShortcut
from ernet_fast.er.stage import StageMaps
from ernet_fast.stain import MacenkoNormalizer

BATCH = 8
_BUDGET = 15.0  # seconds a task
_TURN = TURN


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


def interleaved_medians(
    contestants: dict[str, Callable[[], Any]], repeats: int, budget: float = math.inf
) -> tuple[dict[str, float], int]:
    """Median seconds of each call, and the number of repeats, after a first round that does not count.

    In every round each takes its turn, of one call or of as many as take about 20 ms: a short call timed alone would
    be timed with the caches as the one before left them. Taking turns lets a disturbance of the machine fall on all.
    Once `budget` seconds are spent, no round follows (one is made in any case).
    """
    times = in_turns(contestants, repeats, budget, _TURN, _wait)
    done = len(next(iter(times.values())))
    return {name: statistics.median(values) for name, values in times.items()}, done


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class _StageTails(nn.Module):
    """Last BatchNorm, shortcuts, sum and ReLU of every block of a stage, without the convolutions."""

    def __init__(self, channels: int, num_maps: int) -> None:
        super().__init__()
        self.bns = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(num_maps - 1))
        self.shortcuts = nn.ModuleList(ERShortcut(channels, i + 1) for i in range(num_maps - 1))

    def forward(self, zs: list[Tensor], fused: bool) -> list[Tensor]:
        maps = StageMaps(fused=fused)
        ys = [maps.start(zs[0], self.shortcuts)]  # type: ignore[arg-type]  # every module of the list is an ERShortcut
        for z, bn, shortcut in zip(zs[1:], self.bns, self.shortcuts, strict=True):
            ys.append(maps.add(z, bn, shortcut))  # type: ignore[arg-type]
        return ys


def time_shortcuts(device: torch.device, repeats: int = 9) -> Timing:
    """Forward and backward of the shortcuts alone, stage 3 of ER-ResNet-50, fused against the naive composition."""
    shape, num_maps = (BATCH, 1024, 14, 14), 6
    generator = torch.Generator().manual_seed(0)
    zs = [_random_maps(shape, generator, device).requires_grad_() for _ in range(num_maps)]
    gradients = [_random_maps(shape, generator, device) for _ in range(num_maps)]
    tails = _StageTails(shape[1], num_maps).to(device)

    def step(fused: bool) -> None:
        for z in zs:
            z.grad = None
        torch.autograd.backward(tails(zs, fused), gradients)

    medians, repeats = interleaved_medians(
        {"fused": lambda: step(True), "naive": lambda: step(False)}, repeats, _BUDGET
    )
    task = f"ER shortcuts of stage 3 of ER-ResNet-50, forward and backward, batch {BATCH} at 224x224"
    return Timing(task, medians, repeats)


def time_training_step(device: torch.device, repeats: int = 5, side: int = 224) -> Timing:
    """Forward and backward of ER-ResNet-50, fused against the naive composition of the same weights."""
    network = models.er_resnet50(2).to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = _random_maps((BATCH, 3, side, side), torch.Generator().manual_seed(0), device)

    def step(fused: bool) -> None:
        network.set_fused(fused)
        network.zero_grad(set_to_none=True)
        network(images).square().mean().backward()

    medians, repeats = interleaved_medians(
        {"fused": lambda: step(True), "naive": lambda: step(False)}, repeats, _BUDGET
    )
    task = f"ER-ResNet-50 with all its convolutions, forward and backward, batch {BATCH} at {side}x{side}"
    return Timing(task, medians, repeats)


def _random_maps(shape: tuple[int, ...], generator: torch.Generator, device: torch.device) -> Tensor:
    return torch.randn(shape, generator=generator).to(device).contiguous(memory_format=torch.channels_last)


def time_macenko(image: Tensor, repeats: int = 15) -> Timing:
    """Normalisation of one uint8 image [3, H, W] to a fitted target, one thread; torchstain too if installed."""
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
        medians, repeats = interleaved_medians(contestants, repeats, _BUDGET)
    finally:
        torch.set_num_threads(threads)
    height, width = image.shape[1:]
    return Timing(f"Macenko, one {width}x{height} image, one thread", medians, repeats, remark)
