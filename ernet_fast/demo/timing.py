"""The speed section of the demo: three questions of `ernet-fast bench`, each within a few seconds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ernet_fast.benchmark.er_questions import shortcut_sum, training_step
from ernet_fast.benchmark.question import Question, ask
from ernet_fast.benchmark.run import wait_for
from ernet_fast.benchmark.stain_questions import macenko

SECONDS = 3.0  # a question, beside the rounds that are made in any case


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


def timed(question: Question, device: torch.device, seconds: float = SECONDS) -> Timing:
    """Ask one question.

    Raises:
        RuntimeError: this library's own result is wrong.
    """
    answer = ask(question, seconds, wait_for(device))
    medians = {figure["name"]: figure["p50_ms"] / 1e3 for figure in answer.figures}
    threads = "one thread" if answer.threads == 1 else f"{answer.threads} threads"
    remark = "No other package is installed, so there is nothing to compare with" if len(medians) == 1 else ""
    return Timing(f"{answer.title}, {threads}", medians, answer.figures[0]["repeats"], remark)


def time_shortcuts(device: torch.device, seconds: float = SECONDS) -> Timing:
    """Forward and backward of one ER shortcut sum, against its composition of PyTorch operators."""
    return timed(shortcut_sum(device, compiled=False), device, seconds)


def time_training_step(device: torch.device, seconds: float = SECONDS, side: int = 160) -> Timing:
    """Forward and backward of ER-ResNet-50, fused against the naive composition of the same weights."""
    return timed(training_step(device, side), device, seconds)


def time_macenko(image: Tensor, seconds: float = SECONDS) -> Timing:
    """Normalisation of one uint8 image [3, H, W] on one thread, against the packages that are installed."""
    height, width = image.shape[1:]
    pixels = image.permute(1, 2, 0).contiguous().numpy()
    cpu = torch.device("cpu")
    return timed(macenko("macenko", f"Macenko, one {width}x{height} image", [pixels], cpu, 1), cpu, seconds)
