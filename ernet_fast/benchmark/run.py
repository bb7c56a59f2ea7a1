"""Asks every question within the time given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ernet_fast import __version__
from ernet_fast.benchmark.er_questions import shortcut_sum, training_step
from ernet_fast.benchmark.question import Question, ask
from ernet_fast.benchmark.stain_questions import stain_questions
from ernet_fast.console.progress import Reporter
from ernet_fast.diagnosis import diagnose

KINDS = ("macenko", "er")
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class BenchmarkConfig:
    """What is measured, where and how long.

    Attributes:
        seconds: about how long everything takes; the first call of each contestant comes on top.
        device: "auto", "cpu" or "cuda".
        only: "macenko" or "er"; None for both.
        compiled: compare with torch.compile too, which takes half a minute to compile where nothing is cached.
        images: a folder of images to normalise; None for generated ones.
    """

    seconds: float = 100.0
    device: str = "auto"
    only: str | None = None
    compiled: bool = True
    images: str | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.seconds < 86400:
            raise ValueError(f"seconds={self.seconds:g}; expected at least 1, and less than a day.")
        if self.only is not None and self.only not in KINDS:
            raise ValueError(f"only={self.only!r}; expected one of {', '.join(KINDS)}.")
        if self.images is not None and self.only == "er":
            raise ValueError(f"images={self.images!r}: only='er' normalises none. Leave one of them out.")


def planned(config: BenchmarkConfig, device: torch.device) -> list[tuple[float, Callable[[], Question]]]:
    """Each question's weight in the time there is, and how to make it; made one by one, only one holds memory."""
    found: list[tuple[float, Callable[[], Question]]] = []
    if config.only != "er":
        found += [(1.0, question) for question in stain_questions(device, config.images)]
    if config.only != "macenko":
        found += [(1.5, partial(shortcut_sum, device, config.compiled)), (1.5, partial(training_step, device))]
    return found


def device_of(name: str) -> torch.device:
    """The device that is meant.

    Raises:
        ValueError: there is no such device.
    """
    if name not in DEVICES:
        raise ValueError(f"device={name!r}; expected one of {', '.join(DEVICES)}.")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda', but torch sees no CUDA device here. Use --device cpu.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def wait_for(device: torch.device) -> Callable[[], Any]:
    """What makes sure that `device` has finished, before the clock is read."""
    return torch.cuda.synchronize if device.type == "cuda" else int


def run_benchmark(config: BenchmarkConfig, reporter: Reporter) -> dict[str, Any]:
    """All figures, as plain values: `version`, `machine`, `device`, `packages`, `compiled_operators`, `isa`, `answers`.

    Raises:
        RuntimeError: a result of this library is wrong; no speed is reported then.
        ValueError: there is no such device, or the folder has no image to measure.
        FileNotFoundError, NotADirectoryError: there is no such folder.
    """
    device = device_of(config.device)
    wait = wait_for(device)
    plan = planned(config, device)
    whole = sum(weight for weight, _ in plan)
    answers: list[dict[str, Any]] = []
    with reporter.task("bench", len(plan)) as task:
        for weight, make in plan:
            question = make()
            task.advance(0, question.title)
            answers.append(ask(question, config.seconds * weight / whole, wait).to_json())
            task.advance(1, question.title)
    found = diagnose()
    return {
        "version": __version__,
        "machine": found["machine"],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "packages": {package["name"]: package["version"] for package in found["packages"] if package["version"]},
        "compiled_operators": found["extension"]["available"],
        "isa": (found["extension"]["build"] or {}).get("isa"),
        "answers": answers,
    }
